"""What the experts' products cost: each way to multiply grouped rows, with its gradients.

    python -m benchmarks.experts            # on the first device: shapes for a GPU, or for a CPU
    python -m benchmarks.experts --tune     # lets tokamax tune itself, which takes minutes

Prints a table. Rows are grouped unevenly and fill seven eighths of the capacity; the batch has
groups of one size, so that it multiplies all of the capacity. Times are medians of runs in turn;
TFLOP/s count the rows in use. tokamax is in the table where it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

import jax_sm_free as smf
from benchmarks import timing
from jax_sm_free import mosaic_matmul

_TUNE = flags.DEFINE_bool("tune", False, "Whether tokamax tunes itself first.")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "Time for each shape.")
_RUNS = 10  # of a measurement, one behind the other


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows [capacity, width] times weights [num_experts, width, columns]."""

    capacity: int
    num_experts: int
    width: int
    columns: int

    def sizes(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        shares = rng.dirichlet(np.full(self.num_experts, 8.0))
        return rng.multinomial(self.capacity * 7 // 8, shares).astype(np.int32)

    def __str__(self) -> str:
        return (
            f"rows [{self.capacity}, {self.width}], weights [{self.num_experts}, {self.width}, "
            f"{self.columns}]"
        )


_ON_GPUS = Shape(32768, 32, 7168, 2048), Shape(32768, 16, 2048, 768), Shape(4096, 32, 7168, 2048)
_ON_CPU = Shape(2048, 4, 256, 512), Shape(256, 2, 64, 128)

Multiply = Callable[[Array, Array, smf.Received], Array]


def _contestants(args: tuple[Array, Array, smf.Received]) -> dict[str, Multiply]:
    rows, weights, _ = args
    names = ["ragged_dot", "blocked"]
    if mosaic_matmul.why_not(rows, weights) is None:
        names.append("mosaic")
    ways: dict[str, Multiply] = {
        name: functools.partial(smf.grouped_matmul, implementation=name) for name in names
    }
    ways["batched"] = functools.partial(_batched, weights.shape[0])
    if importlib.util.find_spec("tokamax") is not None:
        ways["tokamax"] = _tokamax
        if _TUNE.value:
            ways["tokamax, tuned"] = _tuned(args)
    return ways


def _batched(num_experts: int, rows: Array, weights: Array, recv: smf.Received) -> Array:
    capacity = rows.shape[0] // num_experts
    recv = dataclasses.replace(recv, expert_capacity=capacity)
    return smf.grouped_matmul(rows, weights, recv)


def _tokamax(rows: Array, weights: Array, recv: smf.Received) -> Array:
    import tokamax

    return tokamax.ragged_dot(rows, weights, recv.group_sizes, implementation="mosaic")


def _tuned(args: tuple[Array, Array, smf.Received]) -> Multiply:
    import tokamax

    tuned = tokamax.autotune(jax.jit(_with_gradients(_tokamax)), *args)

    def multiply(*args: Any) -> Array:
        with tuned:
            return _tokamax(*args)

    return multiply


def _with_gradients(multiply: Multiply) -> Callable[..., Any]:
    def run(rows: Array, weights: Array, recv: smf.Received) -> Any:
        product, pull = jax.vjp(lambda r, w: multiply(r, w, recv), rows, weights)
        return product, pull(product)

    return run


def _race(args: Any, fns: dict[str, Callable[..., Any]]) -> dict[str, float]:
    """Seconds of a run, by name."""

    def repeated(run: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready([run(*args) for _ in range(_RUNS)][-1])

    runners = {}
    for name, fn in fns.items():
        try:
            run = jax.jit(fn)
            jax.block_until_ready(run(*args))
        except Exception as error:  # of a peer, or a kernel that does not fit the shape
            print(f"  {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        runners[name] = repeated(run)
    times = timing.race(runners, _SECONDS.value, 3, 20)
    return {name: statistics.median(seconds) / _RUNS for name, seconds in times.items()}


def _measure(shape: Shape, dtype: Any) -> None:
    sizes = shape.sizes()
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (shape.capacity, shape.width), dtype)
    weights = jax.random.normal(keys[1], (shape.num_experts, shape.width, shape.columns), dtype)
    group_sizes = jnp.asarray(sizes)
    used = jnp.arange(shape.capacity) < group_sizes.sum()
    rows = jnp.where(used[:, None], rows, 0)
    recv = smf.Received(rows, group_sizes, group_sizes, used.astype(jnp.float32), None, None)
    args = rows, weights * shape.width**-0.5, recv
    ways = _contestants(args)
    forward = _race(args, ways)
    gradients = _race(args, {name: _with_gradients(way) for name, way in ways.items()})
    flops = 2 * int(sizes.sum()) * shape.width * shape.columns
    print(f"\n{shape}, {jnp.dtype(dtype).name}, {sizes.sum()} rows in use, at most {sizes.max()}")
    print(f"{'':16}{'forward':>12}{'':12}{'with gradients':>16}")
    for name in ways:
        cells = []
        for seconds, work in ((forward.get(name), flops), (gradients.get(name), 3 * flops)):
            text = (
                "-" if seconds is None else f"{seconds * 1e3:8.3f} ms {work / seconds / 1e12:7.2f}"
            )
            cells.append(f"{text:>24}")
        print(f"{name:16}{''.join(cells)}   TFLOP/s", flush=True)


def main(argv: list[str]) -> None:
    del argv
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}; command: {' '.join(sys.argv[1:])}")
    on_cpu = device.platform == "cpu"
    for shape in _ON_CPU if on_cpu else _ON_GPUS:
        _measure(shape, jnp.float32 if on_cpu else jnp.bfloat16)


if __name__ == "__main__":
    app.run(main)
