"""`inspect`: what the compiler made of an overlap, read from a compiled program.

A compiled module holds its schedule: the lines of a computation stand in the order in which they
are issued. XLA:GPU keeps this order. XLA:CPU does not keep it: there only the flow of data orders
calls.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax_sm_free import hlo
from jax_sm_free.mapped_axes import PLACE
from jax_sm_free.schedule import Kind, Pair, Schedule, Step, num_common

_PREFIX = "smf_"
_BUFFER = re.compile(r'\bbuffer\s*=\s*"((?:[^"\\]|\\.)*)"')
_MATRIX_OPS = frozenset({"dot", "convolution", "ragged-dot", "scaled-dot"})
_MATRIX_CALL = re.compile(r"gemm|matmul|cublas|cudnn|onednn|triton|mosaic", re.IGNORECASE)
_NESTING_OPS = ("while", "call", "conditional", "async")
_RECV: Kind = "recv"
# The kinds of our other calls, by the end of the name of the op.
_KINDS: tuple[tuple[str, Kind], ...] = (("_send", "send"), ("_forward", "forward"))
_BRANCHING_OPS = ("while", "conditional")


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
    return _schedule(tuple(steps.values()), _givers(module, steps), frames)


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
        kind = next((kind for end, kind in _KINDS if op.endswith(end)), _RECV)
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


def _givers(module: hlo.Module, steps: dict[hlo.Place, Step]) -> dict[Step, frozenset[Step]]:
    """For each recv and forward the sends and forwards from which its token can come at once.

    The token is the first operand. The tokens of a mapped send travel as one array. A recv takes
    the token of its own place.
    """
    origins = frozenset(place for place, step in steps.items() if step.kind in ("send", "forward"))
    givers = {}
    for place, step in steps.items():
        if step.kind in ("forward", "recv"):
            token = hlo.operand(place, module.at(place).operands[0])
            found = (steps[giver] for giver in hlo.origins(module, token, (), origins))
            givers[step] = frozenset(s for s in found if _mapped(s) == _mapped(step))
    return givers


def _senders(givers: dict[Step, frozenset[Step]]) -> dict[Step, frozenset[Step]]:
    """For each recv and forward the sends from which its token can come, also through forwards."""

    def sends(taker: Step) -> frozenset[Step]:
        found: set[Step] = set()
        seen, todo = {taker}, [taker]
        while todo:
            ours = givers[todo.pop()]
            found |= {step for step in ours if step.kind == "send"}
            forwards = {step for step in ours if step.kind == "forward"} - seen
            seen |= forwards
            todo.extend(forwards)
        return frozenset(found)

    return {taker: sends(taker) for taker in givers}


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
    givers: dict[Step, frozenset[Step]],
    frames: dict[Step, hlo.Place],
) -> Schedule:
    senders = _senders(givers)
    pairs = tuple(
        _pair(steps, position, givers, senders)
        for position, step in enumerate(steps)
        if step.kind == "send"
    )
    repeated: set[Step] = set()
    for giver in (step for step in steps if step.kind in ("send", "forward")):
        takers = [step for step in steps if giver in givers.get(step, ())]
        for alike in _alike(takers, frames.__getitem__):
            repeated.update(alike)
    named = [step for step in steps if step.kind != "gemm" and step.op_name]
    return Schedule(
        steps=steps,
        pairs=pairs,
        unmatched=tuple(_unmatched(pairs, givers, senders)),
        repeated=tuple(step for step in steps if step in repeated),
        copied=tuple(_alike(named, lambda step: (step.op_name, step.buffer, frames[step]))),
        num_slots=_num_slots(steps, senders),
    )


def _unmatched(
    pairs: tuple[Pair, ...],
    givers: dict[Step, frozenset[Step]],
    senders: dict[Step, frozenset[Step]],
) -> Iterator[Step]:
    yield from (pair.send for pair in pairs if pair.recv is None)
    taken = frozenset[Step]().union(*givers.values())
    for taker, sends in senders.items():
        if not sends or (taker.kind == "forward" and taker not in taken):
            yield taker


def _alike(steps: Sequence[Step], key: Callable[[Step], Any]) -> list[tuple[Step, ...]]:
    """The steps that have the same key as another step, grouped by key."""
    groups: dict[Any, list[Step]] = {}
    for step in steps:
        groups.setdefault(key(step), []).append(step)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _pair(
    steps: tuple[Step, ...],
    position: int,
    givers: dict[Step, frozenset[Step]],
    senders: dict[Step, frozenset[Step]],
) -> Pair:
    """The pair of the send at `position`."""
    send = steps[position]
    recvs = [i for i, step in enumerate(steps) if step.kind == "recv" and send in senders[step]]
    if not recvs:
        return Pair(send, None)

    # If a loop hands a token on to its next round, the recv of that round is nearer than a recv
    # behind the loop.
    def distance(recv: int) -> tuple[int, bool, int]:
        return -num_common(send.callers, steps[recv].callers), recv < position, recv

    recv = min(recvs, key=distance)
    between = _between(steps, position, recv)
    gemms = tuple(step for step in between if step.kind == "gemm")
    forwards = (step for step in between if step.kind == "forward" and step in givers[steps[recv]])
    forward = next(forwards, None)
    if forward is None:
        return Pair(send, steps[recv], gemms, before=gemms)
    before = tuple(s for s in between[: between.index(forward)] if s.kind == "gemm")
    return Pair(send, steps[recv], gemms, forward, before, gemms[len(before) :])


def _between(steps: tuple[Step, ...], send: int, recv: int) -> tuple[Step, ...]:
    """The steps from a send to its recv, if need be through the end of a loop to its beginning."""
    if send < recv:
        return steps[send:recv]
    loop = steps[send].callers[: num_common(steps[send].callers, steps[recv].callers)]
    inside = [i for i, step in enumerate(steps) if step.callers[: len(loop)] == loop]
    return steps[send : inside[-1] + 1] + steps[inside[0] : recv]


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
