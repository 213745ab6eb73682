"""The floor: bytes that have to move, over bandwidths measured in the same run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_sm_free as smf
from benchmarks.cases import Case, Load

FORMULAS = """\
floors (rows counted from the routing, of the rank that has most):
  route + pack  (token rows read + rows written, one for each of a token's ranks) / local
  wire          rows for other ranks / link
  unpack        (rows received, read + recv_capacity rows written) / local
  reduce-pack   (expert rows read + rows written, one for each of a token's ranks) / local
  sum           (rows received, read + token rows written) / local
  end to end    the longer of the wire and of all the others together
  exposed       all the others, and what the wire is longer than the GEMMs"""
_REPEATS = 8


@dataclasses.dataclass(frozen=True)
class Bandwidths:
    """Bytes per second: local copy, read and written bytes together; egress of a GPU; or None."""

    local: float
    link: float | None


def measure(devices: list[Any], num_bytes: int) -> Bandwidths:
    """Copies arrays of `num_bytes` on one device, and from every device to every other at once."""
    return Bandwidths(_local(devices[0], num_bytes), _link(devices, num_bytes))


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _local(device: Any, num_bytes: int) -> float:
    """The faster of a kernel that reads and writes, and XLA's copy."""
    x = jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), device)

    # Launched back to back, so that the cost of launching is hidden.
    def seconds(fn: Callable[[Array], Array]) -> float:
        return _best(lambda: [fn(x) for _ in range(_REPEATS)])

    best = min(seconds(jax.jit(lambda x: x + 1)), seconds(jax.jit(jnp.copy)))
    return 2 * num_bytes * _REPEATS / best


def _link(devices: list[Any], num_bytes: int) -> float | None:
    """Egress of each device by `jax.device_put`, which uses copy engines; None for one device."""
    if len(devices) == 1:
        return None
    parts = [jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), d) for d in devices]
    steps = range(1, len(devices))

    def exchange() -> list[Any]:
        # Each device starts with its neighbour, so that no two start with the same one.
        return [
            jax.device_put(part, devices[(rank + step) % len(devices)])
            for step in steps
            for rank, part in enumerate(parts)
        ]

    return len(steps) * num_bytes / _best(exchange)


@dataclasses.dataclass(frozen=True)
class Floors:
    """Microseconds of each phase; `dispatch` and `combine` are the others' sums on SMs."""

    route_pack: float
    dispatch_wire: float
    unpack: float
    reduce_pack: float
    combine_wire: float
    sum: float

    def sms(self, op: str) -> float:
        """All that SMs have to do for "dispatch" or "combine"."""
        return self.route_pack + self.unpack if op == "dispatch" else self.reduce_pack + self.sum

    def wire(self, op: str) -> float:
        return self.dispatch_wire if op == "dispatch" else self.combine_wire

    def end_to_end(self, op: str) -> float:
        return max(self.sms(op), self.wire(op))

    def exposed(self, op: str, gemms_us: float) -> float:
        return self.sms(op) + max(0.0, self.wire(op) - gemms_us)


def of_case(case: Case, load: Load, bandwidths: Bandwidths) -> Floors:
    """By `FORMULAS`; without a link, its times are 0."""
    sent, received = load.pairs.sum(1), load.pairs.sum(0)
    own = np.diag(load.pairs)

    row, dispatched = case.row_bytes, _dispatched_row_bytes(case)

    def local(num_bytes: np.ndarray) -> float:
        return float(num_bytes.max()) / bandwidths.local * 1e6

    def wire(num_bytes: np.ndarray) -> float:
        return float(num_bytes.max()) / bandwidths.link * 1e6 if bandwidths.link else 0.0

    return Floors(
        route_pack=local(case.tokens * row + sent * dispatched),
        dispatch_wire=wire((sent - own) * dispatched),
        unpack=local(received * dispatched + load.recv_capacity * row),
        reduce_pack=local((load.expert_rows_of + received) * row),
        combine_wire=wire((received - own) * row),
        sum=local((sent + case.tokens) * row),
    )


def _dispatched_row_bytes(case: Case) -> int:
    """Of a row on its way to an expert."""
    config = smf.Config(
        ep_size=case.ep_size,
        hidden=case.hidden,
        num_experts=case.num_experts,
        top_k=case.top_k,
        max_tokens=case.tokens,
        dtype=case.dtype,
        wire_dtype=case.wire_dtype,
    )
    return config.dispatched_row_bytes
