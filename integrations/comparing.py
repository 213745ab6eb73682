"""What the programs of this folder share: devices, errors, times."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np


def error(got: Any, want: Any) -> float:
    """The largest difference between two pytrees of arrays, each array's over its largest value."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    errors = [0.0]
    for one, other in pairs:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if one.shape != other.shape:
            raise ValueError(f"expected the shape {other.shape}, got {one.shape}")
        errors.append(float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-30)))
    return float(np.max(errors))  # NaN, if one is


class Checks:
    """Prints comparisons, and remembers which of them are not as near as they should be."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    def near(self, what: str, bound: float, **errors: float) -> None:
        """Each of the errors is at most `bound`."""
        ok = all(value <= bound for value in errors.values())  # not for NaN
        told = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
        print(f"{'ok' if ok else 'TOO FAR'}  {what}: {told} (at most {bound:.0e})", flush=True)
        self._count(ok, what)

    def equal(self, what: str, got: Any, want: Any) -> None:
        """`got` is `want`."""
        ok = got == want
        print(f"{'ok' if ok else 'DIFFERS'}  {what}: {got}", "" if ok else f"expected {want}")
        self._count(ok, what)

    def _count(self, ok: bool, what: str) -> None:
        self.passed += ok
        if not ok:
            self.failed.append(what)

    def end(self) -> None:
        """Ends the program, with an error if a check failed."""
        print(f"{self.passed} passed, {len(self.failed)} failed", flush=True)
        sys.exit(f"failed: {'; '.join(self.failed)}" if self.failed else 0)


def take_times(programs: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Runs all programs in turn, `rounds` times; returns and prints the median of each, in ms."""
    for program in programs.values():
        jax.block_until_ready(program())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        low, high = min(times[name]), max(times[name])
        print(f"{name}: median {median:.1f} ms ({low:.1f} to {high:.1f}, {rounds} runs)")
    return medians


def main(**commands: Callable[[], None]) -> None:
    """Runs the commands that the command line names, or the first."""
    import jax_sm_free

    print(f"jax {jax.__version__}, jax_sm_free {jax_sm_free.__version__}, {jax.devices()[0]}")
    chosen: Iterable[str] = sys.argv[1:] or list(commands)[:1]
    for name in chosen:
        if name not in commands:
            sys.exit(f"expected some of {', '.join(commands)}, got {name!r}")
        commands[name]()
