"""`inspect`: what the compiler made of an overlap, read from a compiled program.

A compiled module holds its schedule: the lines of a computation stand in the order in which they
are issued. XLA:GPU keeps this order. XLA:CPU does not keep it: there only the flow of data orders
calls.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax_sm_free import hlo
from jax_sm_free.mapped_axes import PLACE

Kind = Literal["send", "recv", "gemm"]

_PREFIX = "smf_"
_BUFFER = re.compile(r'\bbuffer\s*=\s*"((?:[^"\\]|\\.)*)"')
_MATRIX_OPS = frozenset({"dot", "convolution", "ragged-dot", "scaled-dot"})
_MATRIX_CALL = re.compile(r"gemm|matmul|cublas|cudnn|onednn|triton|mosaic", re.IGNORECASE)
_NESTING_OPS = ("while", "call", "conditional", "async")
_BRANCHING_OPS = ("while", "conditional")


@dataclasses.dataclass(frozen=True)
class Step:
    """One of our calls, or a matrix product, in a schedule.

    Attributes:
      kind: "send", "recv" or "gemm". A gemm is a dot, a convolution or a ragged dot, a fusion that
        contains one of these, or a call of a library or a hand-written kernel (cuBLAS, cuDNN,
        Triton, Mosaic).
      op: the op of our call, such as "dispatch_send"; the opcode of a gemm.
      name: of the HLO instruction.
      callers: names of the loops, calls and conditionals around the step, outermost first.
      buffer: the number of the buffer that our call is for, in order of first use in the program;
        None for a gemm.
      op_name: the operation of the JAX program that became this step, as far as XLA tells.
    """

    kind: Kind
    op: str
    name: str
    callers: tuple[str, ...] = ()
    buffer: int | None = None
    op_name: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A send, its recv, and the gemms scheduled between them.

    Attributes:
      send: the send.
      recv: the recv that the send's token reaches; the next one if the token reaches several; None
        if it reaches none.
      gemms: the gemms between the two. If a loop carries the token to its next round, these are the
        gemms from the send to the end of the loop, and from its beginning to the recv.
    """

    send: Step
    recv: Step | None
    gemms: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Our calls and the gemms of a compiled program, in schedule order.

    The steps of a loop are listed once, and so are the steps of each branch of a conditional.

    Attributes:
      steps: all steps.
      pairs: one pair for each send, in the order of the sends.
      unmatched: sends whose token reaches no recv, and recvs whose token comes from no send.
      repeated: recvs whose token another recv of the same loop or branch takes, too. Such a
        program ends in a fault.
      copied: the calls that stand several times in one loop or branch, for each operation of the
        JAX program. Either XLA has unrolled the loop, or it runs the exchange several times, or the
        program makes the call in a loop of Python, whose rounds have the same `Step.op_name`.
      num_slots: the most exchanges of one buffer that are in flight at once. `Buffer` needs at
        least so many as its `num_slots`. 0 without our calls.
    """

    steps: tuple[Step, ...]
    pairs: tuple[Pair, ...]
    unmatched: tuple[Step, ...]
    repeated: tuple[Step, ...]
    copied: tuple[tuple[Step, ...], ...]
    num_slots: int

    @property
    def counts(self) -> dict[str, int]:
        """How often each of our sends and recvs stands in the program. A loop counts once."""
        return dict(Counter(step.op for step in self.steps if step.kind != "gemm"))

    def __str__(self) -> str:
        """The timeline: one line for each step, indented by the loops and calls around it."""
        lines = []
        callers: tuple[str, ...] = ()
        for step in self.steps:
            common = _num_common(callers, step.callers)
            for depth, caller in enumerate(step.callers[common:], common):
                lines.append(f"{'  ' * depth}{caller}:")
            callers = step.callers
            lines.append("  " * len(callers) + self._describe(step))
        for copies in self.copied:
            where = copies[0].callers[-1] if copies[0].callers else "the program"
            lines.append(f"{len(copies)} calls in {where} of {copies[0].op_name}")
        lines.append(f"slots needed: {self.num_slots}")
        return "\n".join(lines)

    def _describe(self, step: Step) -> str:
        if step.kind == "gemm":
            return f"  {step.op:<26}{step.name}"
        text = f"{step.op:<28}{step.name}, buffer {step.buffer}"
        sends = [pair.send.name for pair in self.pairs if pair.recv == step]
        if sends:
            text += f", of {' or '.join(sends)}"
        text += ", UNMATCHED" if step in self.unmatched else ""
        return text + (", REPEATED" if step in self.repeated else "")


def inspect(compiled: Any) -> Schedule:
    """Reads from a compiled program where our calls are, and the matrix products between them.

    On CUDA the order is that in which the program is issued. XLA:CPU does not keep the order that
    it prints. There the pairs are right, but the steps between them may run before or after, and
    `num_slots` is for the printed order only.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returned, or its HLO text.

    Returns:
      The schedule. In a program without our calls it has gemms only.

    Raises:
      TypeError: if `compiled` is neither.
      ValueError: if `compiled` has no schedule (it was lowered, but not compiled), or is no HLO.
    """
    module = hlo.parse(_text_of(compiled))
    if not module.is_scheduled:
        raise ValueError(
            "inspect: expected a compiled program with a schedule (is_scheduled=true), got one "
            "without; pass what .lower(...).compile() returned"
        )
    steps = {}
    buffers: dict[str, int] = {}  # their numbers, by name
    for place in hlo.walk(module, functools.partial(_is_entered, module)):
        step = _step(module, place, buffers)
        if step is not None:
            steps[place] = step
    frames = {step: _frame(module, place) for place, step in steps.items()}
    return _schedule(tuple(steps.values()), _senders(module, steps), frames)


def _text_of(compiled: Any) -> str:
    text = compiled if isinstance(compiled, str) else getattr(compiled, "as_text", lambda: None)()
    if not isinstance(text, str):
        raise TypeError(
            "inspect: expected what .lower(...).compile() returned, or HLO text, got "
            f"{type(compiled).__name__}"
        )
    return text


def _is_entered(module: hlo.Module, instruction: hlo.Instruction) -> bool:
    """Whether the computations that an instruction calls are part of the timeline.

    A fusion is, if it has one of our calls: newer XLA:GPU puts a call that reads slices of a loop's
    state into a fusion with the slices.
    """
    if instruction.is_op("fusion"):
        return module.contains(instruction, _is_ours)
    return any(map(instruction.is_op, _NESTING_OPS))


def _is_ours(instruction: hlo.Instruction) -> bool:
    return instruction.target.startswith(_PREFIX)


def _step(module: hlo.Module, place: hlo.Place, buffers: dict[str, int]) -> Step | None:
    instruction = module.at(place)
    outer = (place[:depth] for depth in range(1, len(place)))
    callers = tuple(p[-1][1] for p in outer if not module.at(p).is_op("fusion"))
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    describe = functools.partial(
        Step, name=instruction.name, callers=callers, op_name=op_name[1] if op_name else ""
    )
    if _is_ours(instruction):
        op = instruction.target.removeprefix(_PREFIX)
        name = _BUFFER.search(instruction.attributes.partition("backend_config=")[2])
        kind: Kind = "send" if op.endswith("_send") else "recv"
        buffer = buffers.setdefault(name[1], len(buffers)) if name else None
        return describe(kind, op, buffer=buffer)
    is_gemm = _is_gemm(instruction) or (
        instruction.is_op("fusion")
        and not _is_entered(module, instruction)
        and module.contains(instruction, _is_gemm)
    )
    return describe("gemm", instruction.opcode) if is_gemm else None


def _is_gemm(instruction: hlo.Instruction) -> bool:
    return any(map(instruction.is_op, _MATRIX_OPS)) or bool(_MATRIX_CALL.search(instruction.target))


def _senders(module: hlo.Module, steps: dict[hlo.Place, Step]) -> dict[Step, frozenset[Step]]:
    """For each recv the sends from which its token, the first operand, can come.

    The tokens of a mapped send travel as one array. A recv takes the token of its own place.
    """
    sends = frozenset(place for place, step in steps.items() if step.kind == "send")
    senders = {}
    for place, step in steps.items():
        if step.kind == "recv":
            token = hlo.operand(place, module.at(place).operands[0])
            found = (steps[send] for send in hlo.origins(module, token, (), sends))
            senders[step] = frozenset(s for s in found if _mapped(s) == _mapped(step))
    return senders


def _mapped(step: Step) -> list[str]:
    """The place of a call on each axis that was mapped by `jax.vmap`."""
    return re.findall(rf"\b{PLACE}(\d+)\b", step.op_name)


def _frame(module: hlo.Module, place: hlo.Place) -> hlo.Place:
    """The loops and branches around an instruction: (computation, caller) of each.

    Instructions in the same loops and branches run equally often.
    """
    depths = range(1, len(place))
    enters = (
        (place[depth][0], place[depth - 1][1])
        for depth in depths
        if any(map(module.at(place[:depth]).is_op, _BRANCHING_OPS))
    )
    return tuple(enters)


def _schedule(
    steps: tuple[Step, ...],
    senders: dict[Step, frozenset[Step]],
    frames: dict[Step, hlo.Place],
) -> Schedule:
    pairs = []
    repeated: set[Step] = set()
    for position, step in enumerate(steps):
        if step.kind == "send":
            recvs = [i for i, recv in enumerate(steps) if step in senders.get(recv, ())]
            pairs.append(_pair(steps, position, recvs))
            for alike in _alike([steps[i] for i in recvs], frames.__getitem__):
                repeated.update(alike)
    unmatched = [pair.send for pair in pairs if pair.recv is None]
    unmatched += [recv for recv, sends in senders.items() if not sends]
    named = [step for step in steps if step.kind != "gemm" and step.op_name]
    return Schedule(
        steps=steps,
        pairs=tuple(pairs),
        unmatched=tuple(unmatched),
        repeated=tuple(step for step in steps if step in repeated),
        copied=tuple(_alike(named, lambda step: (step.op_name, step.buffer, frames[step]))),
        num_slots=_num_slots(steps, senders),
    )


def _alike(steps: Sequence[Step], key: Callable[[Step], Any]) -> list[tuple[Step, ...]]:
    """The steps that have the same key as another step, grouped by key."""
    groups: dict[Any, list[Step]] = {}
    for step in steps:
        groups.setdefault(key(step), []).append(step)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _pair(steps: tuple[Step, ...], position: int, recvs: list[int]) -> Pair:
    """The pair of the send at `position`, whose token reaches the recvs at positions `recvs`."""
    send = steps[position]
    if not recvs:
        return Pair(send, None)

    # If a loop hands a token on to its next round, the recv of that round is nearer than a recv
    # behind the loop.
    def distance(recv: int) -> tuple[int, bool, int]:
        return -_num_common(send.callers, steps[recv].callers), recv < position, recv

    recv = min(recvs, key=distance)
    between = range(position, recv)
    wrapped: tuple[Step, ...] = ()
    if recv < position:
        loop = send.callers[: _num_common(send.callers, steps[recv].callers)]
        inside = [i for i, step in enumerate(steps) if step.callers[: len(loop)] == loop]
        between = range(position, inside[-1] + 1)
        wrapped = steps[inside[0] : recv]
    gemms = tuple(s for s in (*steps[between.start : between.stop], *wrapped) if s.kind == "gemm")
    return Pair(send, steps[recv], gemms)


def _num_slots(steps: tuple[Step, ...], senders: dict[Step, frozenset[Step]]) -> int:
    """The most sends of one buffer that wait for their recv at any time."""
    in_flight: list[Step] = []
    most = 0
    for step in steps:
        if step.kind == "send":
            in_flight.append(step)
            most = max(most, Counter(s.buffer for s in in_flight)[step.buffer])
        elif step.kind == "recv":
            # If several sends reach a recv, one of each round of a loop, it takes the oldest one.
            for send in [s for s in in_flight if s in senders[step]][:1]:
                in_flight.remove(send)
    return most


def _num_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The length of the longest common beginning."""
    same = (x == y for x, y in zip(a, b, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))
