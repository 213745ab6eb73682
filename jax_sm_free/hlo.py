"""A reader of compiled HLO text: instructions in schedule order, and where a value comes from.

The reader knows only the parts of HLO that are needed to find our calls: names, opcodes, operands
and called computations. It skips all other text.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

# Opcodes whose result is their first operand, or a part of it.
_SAME_VALUE = frozenset({"bitcast", "copy", "opt-barrier", "reshape", "slice"})

_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(
    r"\b(body|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)

# The place of an instruction in the program: the (computation, name) of each instruction that
# called the computation around it, outermost first, and then its own.
Place = tuple[tuple[str, str], ...]
# A part of a result that is a tuple, perhaps of tuples. () is the whole result.
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `attributes` is the text behind the operands."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def target(self) -> str:
        """The target of a custom call; empty for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, without the condition of a loop."""
        head = self.attributes.partition("metadata=")[0]
        lists = (names for _, names in _CALLED.findall(head))
        return tuple(name for names in lists for name in re.findall(r"[\w.\-]+", names))

    def is_op(self, opcode: str) -> bool:
        """Whether it is this operation, or the start of the same operation done asynchronously."""
        return self.opcode in (opcode, f"{opcode}-start")


@dataclasses.dataclass
class Computation:
    """Instructions by name, in schedule order."""

    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""


@dataclasses.dataclass
class Module:
    computations: dict[str, Computation] = dataclasses.field(default_factory=dict)
    entry: str = ""
    is_scheduled: bool = False

    def at(self, place: Place) -> Instruction:
        computation, name = place[-1]
        return self.computations[computation].instructions[name]

    def called(self, place: Place) -> list[str]:
        """The computations that run as part of an instruction."""
        return [name for name in self.at(place).called if name in self.computations]

    def contains(self, instruction: Instruction, wanted: Callable[[Instruction], bool]) -> bool:
        """Whether a computation that it calls, at any depth, holds a wanted instruction."""
        return any(
            wanted(inner) or self.contains(inner, wanted)
            for name in instruction.called
            if name in self.computations
            for inner in self.computations[name].instructions.values()
        )


def parse(text: str) -> Module:
    """Reads one module.

    Raises:
      ValueError: if `text` is no HLO.
    """
    module = Module()
    current = None
    for line in text.splitlines():
        if line.startswith("HloModule"):
            if current is not None:
                break  # This is a second module.
            module.is_scheduled = "is_scheduled=true" in line
        elif found := _HEADER.match(line):
            current = module.computations[found[2]] = Computation()
            if found[1]:
                module.entry = found[2]
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(found[2], found[3])
            if instruction is not None:
                current.instructions[instruction.name] = instruction
                if found[1]:
                    current.root = instruction.name
    if not module.entry:
        raise ValueError(
            "expected the HLO text of a program that .lower(...).compile() returned, got "
            f"{text[:40]!r}"
        )
    return module


def _parse_instruction(name: str, rest: str) -> Instruction | None:
    """Parses what follows the equals sign: type opcode(operands), attributes."""
    type_end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, type_end)
    if opcode is None:
        return None
    end = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end - 1]
    # Constants spell out their elements.
    operands = () if opcode[1] == "constant" else tuple(_operands(inside))
    return Instruction(name, opcode[1], operands, rest[end:])


def _closing(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    return len(text)


def _operands(text: str) -> Iterator[str]:
    """Names in `%a, %b` and in `f32[8,2]{1,0} %a, (s32[], f32[2]) %b`."""
    text = re.sub(r"/\*.*?\*/", "", text)
    if "%" in text:
        yield from re.findall(r"%([\w.\-]+)", text)
    else:
        yield from (part.split()[-1] for part in text.split(",") if part.strip())


def walk(module: Module, enters: Callable[[Instruction], bool]) -> Iterator[Place]:
    """All instructions in schedule order.

    Behind an instruction for which `enters` is true come those of the computations that it calls.
    The body of a loop comes once, and so does every branch of a conditional.
    """

    def visit(computation: str, callers: Place) -> Iterator[Place]:
        for instruction in module.computations[computation].instructions.values():
            place = (*callers, (computation, instruction.name))
            yield place
            if enters(instruction):
                for called in module.called(place):
                    yield from visit(called, place)

    return visit(module.entry, ())


def origins(module: Module, place: Place, index: Index, is_origin: frozenset[Place]) -> set[Place]:
    """The places of `is_origin` from which a value can come.

    The search goes through tuples, copies, barriers, fusions and async wrappers, into and out of
    calls and branches, and round loops. A slice of a concatenation counts as coming from all its
    parts.
    """
    found = set()
    seen = {(place, index)}
    todo = [(place, index)]
    while todo:
        place, index = todo.pop()
        if place in is_origin:
            found.add(place)
            continue
        before = set(_step_back(module, place, index)) - seen
        seen |= before
        todo.extend(before)
    return found


def operand(place: Place, name: str) -> Place:
    return (*place[:-1], (place[-1][0], name))


def _step_back(module: Module, place: Place, index: Index) -> Iterator[tuple[Place, Index]]:
    """Where part `index` of a result was one step before; nothing if it was made here."""
    instruction = module.at(place)
    operands = [operand(place, name) for name in instruction.operands]
    if instruction.opcode == "parameter":
        yield from _step_out(module, place, index)
    elif instruction.opcode == "get-tuple-element":
        number = re.search(r"\bindex=(\d+)", instruction.attributes)
        if number:
            yield operands[0], (int(number[1]), *index)
    elif instruction.opcode == "tuple":
        if index:
            yield operands[index[0]], index[1:]
    elif instruction.opcode == "concatenate":
        yield from ((part, index) for part in operands)
    elif instruction.opcode in _SAME_VALUE or instruction.opcode.endswith("-update"):
        yield operands[0], index
    elif instruction.opcode.endswith("-done"):
        yield operands[0], (1, *index)
    elif instruction.opcode.endswith("-start"):
        yield from _step_into_start(module, place, operands, index)
    elif instruction.opcode in ("while", "call", "fusion", "conditional"):
        if instruction.opcode == "while":  # The loop may run no round.
            yield operands[0], index
        for called in module.called(place):
            yield (*place, (called, module.computations[called].root)), index


def _step_into_start(
    module: Module, place: Place, operands: list[Place], index: Index
) -> Iterator[tuple[Place, Index]]:
    """From the result of a start, ((operands), result, ...). A copy-start has its operand twice."""
    if module.at(place).opcode == "copy-start":
        yield operands[0], index[1:]
    elif index[:1] == (0,) and len(index) > 1:
        yield operands[index[1]], index[2:]
    elif index[:1] == (1,):
        for called in module.called(place):
            yield (*place, (called, module.computations[called].root)), index[1:]


def _step_out(module: Module, place: Place, index: Index) -> Iterator[tuple[Place, Index]]:
    """From a parameter to the operand that the caller passed for it."""
    caller = place[:-1]
    if not caller:
        return
    instruction = module.at(caller)
    called = module.called(caller)
    number = int(module.at(place).operands[0])
    if instruction.opcode == "conditional":  # It has the branch number, and an operand per branch.
        number = 1 + called.index(place[-1][0])
    if instruction.opcode == "while":  # In a later round, the body's result is the parameter.
        for body in called:
            yield (*caller, (body, module.computations[body].root)), index
    yield operand(caller, instruction.operands[number]), index
