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
    """Bytes per second: local copy, read and written bytes together; egress of a GPU; or None."""

    local: float
    link: float | None


def measure(devices: list[Any], num_bytes: int) -> Bandwidths:
    """Copies arrays of `num_bytes` on one device, and from every device to every other."""
    return Bandwidths(_local(devices[0], num_bytes), _link(devices, num_bytes))


def measure_host(num_bytes: int) -> float:
    """Bytes per second, read and written, of one thread that copies `num_bytes`; pages are warm."""
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
    """The faster of a kernel that reads and writes, and XLA's copy."""
    x = jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), device)

    # Launched back to back, so that the cost of launching is hidden.
    def seconds(fn: Callable[[Array], Array]) -> float:
        return _best(lambda: [fn(x) for _ in range(_REPEATS)])

    best = min(seconds(jax.jit(lambda x: x + 1)), seconds(jax.jit(jnp.copy)))
    return 2 * num_bytes * _REPEATS / best


def _link(devices: list[Any], num_bytes: int) -> float | None:
    """Egress of each device by `jax.device_put`, which uses copy engines; None for one device.

    All devices send at once, each to another one: two that sent to the same would share its link,
    and on 4 GPUs nothing but a wait between the steps keeps them apart.
    """
    if len(devices) == 1:
        return None
    parts = [jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), d) for d in devices]
    steps = range(1, len(devices))

    def shift(step: int) -> list[Any]:
        return [
            jax.device_put(part, devices[(rank + step) % len(devices)])
            for _ in range(_ROUNDS)  # Back to back: the cost of launching is hidden.
            for rank, part in enumerate(parts)
        ]

    seconds = sum(_best(functools.partial(shift, step)) for step in steps)
    return _ROUNDS * len(steps) * num_bytes / seconds
