"""How long the phases of an exchange took, from the events of a loop of exchanges."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable

from benchmarks import trace
from benchmarks.trace import Event

_NEARLY_ALL = 0.9
_WARM_UP = 2  # Exchanges at the start of a loop, when the ranks are not in step yet.


@dataclasses.dataclass(frozen=True)
class Phases:
    """Medians over exchanges and GPUs.

    Attributes:
      kernels_us: time in the kernels of each phase.
      wire_us: from the first byte copied to the last.
      busy_us: of these, with at least one copy running.
      egress: GB/s that leave a GPU while copies run; None where the profile has no sizes.
      sm_us: kernel time times the share of the SMs that hold a block; None where it has no grids.
    """

    kernels_us: dict[str, float]
    wire_us: float
    busy_us: float
    egress: float | None
    sm_us: float | None


def of_ours(events: list[Event], num_sms: int, having: str | None = None) -> Phases | None:
    """The phases of our exchanges; None if there are none in the events.

    Args:
      events: of loops of exchanges.
      num_sms: of a GPU.
      having: a phase that the exchanges in question have; None for all exchanges.
    """
    parts = [
        _of_exchange(part, num_sms)
        for mine in trace.by_gpu(events).values()
        for part in _warm(trace.exchanges(mine))
    ]
    parts = [part for part in parts if having is None or having in part.kernels_us]
    if not parts:
        return None
    names = dict.fromkeys(name for part in parts for name in part.kernels_us)
    return Phases(
        kernels_us={
            name: statistics.median(part.kernels_us.get(name, 0.0) for part in parts)
            for name in names
        },
        wire_us=statistics.median(part.wire_us for part in parts),
        busy_us=statistics.median(part.busy_us for part in parts),
        egress=_median(part.egress for part in parts),
        sm_us=_median(part.sm_us for part in parts),
    )


def of_peer(events: list[Event], num_exchanges: int, num_sms: int) -> Phases | None:
    """Wire and SM time of XLA's collectives, over all exchanges; None if there are no events."""
    wires, sms = [], []
    for mine in trace.by_gpu(events).values():
        collectives = [event for event in mine if event.kind == "collective"]
        wires.append(trace.length(trace.union(collectives)) / num_exchanges)
        sm = _sm_us(_beside_gemms(mine), num_sms)
        sms.append(None if sm is None else sm / num_exchanges)
    if not wires:
        return None
    wire = statistics.median(wires)
    return Phases({}, wire, wire, None, _median(sms))


def gemm_slowdown(alone: list[Event], beside: list[Event]) -> float | None:
    """By how much GEMMs slow down while bytes are in flight, 0.02 for 2 %.

    Compared with GEMMs of the same loop: one of GEMMs alone runs at another clock.

    Args:
      alone: a loop of GEMMs.
      beside: the same GEMMs between send and recv, all of one shape.

    Returns:
      The median of those beside which copies or collectives ran nearly all the time, over the
      median of those beside which none did, less 1. Where there are none of these, those of `alone`
      take their place; None where none of the others are.
    """
    moved: list[float] = []
    undisturbed: list[float] = []
    for mine in trace.by_gpu(beside).values():
        moving = trace.union(
            [*trace.peer_copies(mine), *(e for e in mine if e.kind == "collective")]
        )
        for gemm in (event for event in mine if event.kind == "gemm"):
            shared = trace.common([gemm.interval], moving)
            if shared > _NEARLY_ALL * gemm.duration_us:
                moved.append(gemm.duration_us)
            elif shared == 0:
                undisturbed.append(gemm.duration_us)
    slow = _median(moved)
    base = _median(undisturbed or (e.duration_us for e in alone if e.kind == "gemm"))
    return slow / base - 1 if slow and base else None


def _warm(exchanges: list[list[Event]]) -> list[list[Event]]:
    return exchanges[_WARM_UP:] if len(exchanges) > _WARM_UP else exchanges


def _of_exchange(events: list[Event], num_sms: int) -> Phases:
    kernels = _one_by_one([event for event in events if event.kind == "ours"])
    times: dict[str, float] = {}
    for kernel in kernels:
        times[kernel.phase] = times.get(kernel.phase, 0.0) + kernel.duration_us
    copies = trace.peer_copies(events)
    moving = trace.union(copies)
    busy = trace.length(moving)
    num_bytes = sum(event.num_bytes for event in copies)
    return Phases(
        kernels_us=times,
        wire_us=moving[-1][1] - moving[0][0] if moving else 0.0,
        busy_us=busy,
        egress=num_bytes / busy / 1e3 if num_bytes and busy else None,
        sm_us=_sm_us(kernels, num_sms),
    )


def _one_by_one(kernels: list[Event]) -> list[Event]:
    """The kernels of one stream, each from the end of the one before.

    One whose blocks are there before that waits for it first.
    """
    clipped, end = [], 0.0
    for kernel in kernels:
        start = max(kernel.start_us, end)
        end = max(kernel.end_us, end)
        clipped.append(dataclasses.replace(kernel, start_us=start, duration_us=end - start))
    return clipped


def _beside_gemms(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.kind in ("ours", "collective", "other")]


def _sm_us(kernels: Iterable[Event], num_sms: int) -> float | None:
    kernels = [event for event in kernels if event.num_blocks]
    if not kernels or not num_sms:
        return None
    return sum(event.duration_us * min(1.0, event.num_blocks / num_sms) for event in kernels)


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
