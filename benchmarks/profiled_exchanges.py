"""The exchanges of a profile: whether compute ran between send and recv, beside copies."""

from __future__ import annotations

import dataclasses

from benchmarks import trace
from benchmarks.trace import Event


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One exchange on one GPU.

    Attributes:
      op: "dispatch" or "combine".
      send: our kernels before the bytes move, in order.
      recv: our kernels that wait for bytes and unpack them, in order.
      gemms: GEMMs from the first kernel of the send to the last of the recv. One that begins when
        the last has begun is behind the exchange: XLA launches some kernels ahead, so that they
        begin as that one ends.
      copies: to the other GPUs.
    """

    op: str
    send: list[Event]
    recv: list[Event]
    gemms: list[Event]
    copies: list[Event]

    @property
    def hidden_us(self) -> float:
        """How long a GEMM and a copy ran at the same time."""
        return trace.common(trace.union(self.gemms), trace.union(self.copies))

    def check(self) -> None:
        """Checks what `smf.overlap` promises.

        Raises:
          AssertionError: unless at least one GEMM ran between send and recv, none of our kernels
            began between or beside those GEMMs, and a copy ran at the same time as one of them.
            The first GEMM may begin while the send ends, as said of `gemms`.
        """
        where = f"GPU {self.send[0].gpu}, {self.op} at {self.send[0].start_us:.1f} us"
        if not self.recv:
            raise AssertionError(f"{where}: expected kernels of a recv, got none")
        if not self.gemms:
            raise AssertionError(f"{where}: expected a GEMM between send and recv, got none")
        first, last = self.gemms[0].start_us, max(gemm.end_us for gemm in self.gemms)
        for kernel in self.send:
            if kernel.start_us > first:
                raise AssertionError(
                    f"{where}: expected {kernel.short_name} before the first GEMM, which began at "
                    f"{first:.1f} us, got its start at {kernel.start_us:.1f} us"
                )
        for kernel in self.recv:
            if kernel.start_us < last:
                raise AssertionError(
                    f"{where}: expected {kernel.short_name} after the last GEMM, which ended at "
                    f"{last:.1f} us, got its start at {kernel.start_us:.1f} us"
                )
        if self.hidden_us <= 0:
            raise AssertionError(
                f"{where}: expected copies while GEMMs run, got {len(self.copies)} copies, none "
                "beside a GEMM"
            )


def exchanges(events: list[Event]) -> list[Exchange]:
    """The exchanges of all GPUs, for programs in which one ends before the next begins."""
    return [
        _exchange(part) for mine in trace.by_gpu(events).values() for part in trace.exchanges(mine)
    ]


def _exchange(events: list[Event]) -> Exchange:
    kernels = [event for event in events if event.kind == "ours"]
    packs = [i for i, kernel in enumerate(kernels) if kernel.phase in trace.PACK_PHASES]
    ends = packs[-1] + 1 if packs else len(kernels)
    send, recv = kernels[:ends], kernels[ends:]  # The recv of a combine routes, too.
    begin, end = send[0].start_us, kernels[-1].start_us
    return Exchange(
        op="combine" if any(kernel.phase == "reduce-pack" for kernel in send) else "dispatch",
        send=send,
        recv=recv,
        gemms=[e for e in events if e.kind == "gemm" and begin <= e.start_us < end],
        copies=trace.peer_copies(events),
    )
