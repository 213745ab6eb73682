"""Bandwidths of devices, measured with XLA's own copies, and of the host."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_REPEATS = 8
_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Bandwidths:
    """Bytes per second.

    Attributes:
      local: of a copy on one device, the bytes read and the bytes written together.
      link: that leave each device; None for one device.
    """

    local: float
    link: float | None


def measure(devices: list[Any], num_bytes: int) -> Bandwidths:
    """Copies arrays of `num_bytes` on one device, and from every device to every other."""
    return Bandwidths(_local(devices[0], num_bytes), _link(devices, num_bytes))


def measure_host(num_bytes: int) -> float:
    """Bytes per second, read and written, of one thread that copies `num_bytes` in warm pages."""
    source, target = (np.ones(num_bytes, np.uint8) for _ in range(2))

    def copy() -> None:
        for _ in range(_REPEATS):
            np.copyto(target, source)

    return 2 * num_bytes * _REPEATS / _best(copy)


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _local(device: Any, num_bytes: int) -> float:
    """Bytes per second of a kernel that reads and writes, or of XLA's copy if that is faster."""
    x = jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), device)

    # The copies are launched back to back, so that the cost of launching is hidden.
    def seconds(fn: Callable[[Array], Array]) -> float:
        return _best(lambda: [fn(x) for _ in range(_REPEATS)])

    best = min(seconds(jax.jit(lambda x: x + 1)), seconds(jax.jit(jnp.copy)))
    return 2 * num_bytes * _REPEATS / best


def _link(devices: list[Any], num_bytes: int) -> float | None:
    """Bytes per second that leave each device by `jax.device_put`, which uses copy engines.

    All devices send at once, each to a different one, because two devices that send to the same one
    share its link. A wait between the steps keeps them apart. None for one device.
    """
    if len(devices) == 1:
        return None
    parts = [jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), d) for d in devices]
    steps = range(1, len(devices))

    def shift(step: int) -> list[Any]:
        return [
            jax.device_put(part, devices[(rank + step) % len(devices)])
            for _ in range(_ROUNDS)  # Back to back, so that the cost of launching is hidden.
            for rank, part in enumerate(parts)
        ]

    seconds = sum(_best(functools.partial(shift, step)) for step in steps)
    return _ROUNDS * len(steps) * num_bytes / seconds
