"""`Schedule`: our calls and the matrix products of a compiled program, as `inspect` reads them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Literal

Kind = Literal["send", "forward", "recv", "gemm"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One of our calls, or a matrix product, in a schedule.

    Attributes:
      kind: "send", "forward", "recv" or "gemm". A gemm is a dot, a convolution or a ragged dot, a
        fusion that contains one of these, or a call of a library or a hand-written kernel (cuBLAS,
        cuDNN, Triton, Mosaic).
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
    """A send, its recv, the forward between the two if there is one, and the gemms between them.

    Attributes:
      send: the send.
      recv: the recv that the send's token reaches; the next one if the token reaches several; None
        if it reaches none.
      gemms: the gemms between the two. If a loop carries the token to its next round, these are the
        gemms from the send to the end of the loop, and from its beginning to the recv.
      forward: the forward through which the token reaches the recv; None if there is none.
      before: the gemms between the send and the forward; all without a forward.
      after: the gemms between the forward and the recv; none without a forward.
    """

    send: Step
    recv: Step | None
    gemms: tuple[Step, ...] = ()
    forward: Step | None = None
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Our calls and the gemms of a compiled program, in schedule order.

    The steps of a loop are listed once, and so are the steps of each branch of a conditional.

    Attributes:
      steps: all steps.
      pairs: one pair for each send, in the order of the sends.
      unmatched: sends whose token reaches no recv, recvs whose token comes from no send, and
        forwards for which one of the two holds.
      repeated: recvs and forwards whose token another recv or forward of the same loop or branch
        takes, too. Such a program ends in a fault.
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
        """How often each of our calls stands in the program. A loop counts once."""
        return dict(Counter(step.op for step in self.steps if step.kind != "gemm"))

    def __str__(self) -> str:
        """The timeline: one line for each step, indented by the loops and calls around it."""
        lines = []
        callers: tuple[str, ...] = ()
        for step in self.steps:
            common = num_common(callers, step.callers)
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
        sends = [pair.send.name for pair in self.pairs if step in (pair.forward, pair.recv)]
        if sends:
            text += f", of {' or '.join(sends)}"
        text += ", UNMATCHED" if step in self.unmatched else ""
        return text + (", REPEATED" if step in self.repeated else "")


def num_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The length of the longest common beginning."""
    same = (x == y for x, y in zip(a, b, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))
