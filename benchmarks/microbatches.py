"""A transformer block's step on GPUs: two microbatches interleaved, one, and XLA's collectives.

    python -m benchmarks.microbatches                  # the table
    python -m benchmarks.microbatches --picture=out/two_microbatches.png

The block is that of examples/two_microbatches.py. All contestants step through the same tokens with
the same routing, each expert's rows in a batch that holds the fullest. Prints a table: time of a
step, forward, with gradients, and with gradients under jax.checkpoint. Times are medians of runs in
turn. The other columns are of a profile of one step, milliseconds, means of the GPUs: how long
GEMMs, other kernels of XLA, our kernels and kernels of collectives ran, and none; how long copies
between GPUs took, how long our kernels stood still for them, and the part of the copies that was
hidden, 1 - waited / copies.
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array, P
from jax.sharding import NamedSharding

import jax_sm_free as smf
from benchmarks import contestants, drawing, layer, programs, timing, trace
from benchmarks.cases import Case, Load, make_inputs, measure_load
from examples import two_microbatches as example

_SEQUENCE = flags.DEFINE_integer("sequence", 4096, "Tokens of a sequence.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences of a microbatch on each rank.")
_HIDDEN = flags.DEFINE_integer("hidden", 7168, "Columns of a row.")
_EXPERTS = flags.DEFINE_integer("local_experts", 16, "Experts of each rank.")
_TOP_K = flags.DEFINE_integer("top_k", 8, "Experts of a token.")
_EXPERT_WIDTH = flags.DEFINE_integer("expert_width", 512, "Width of a routed expert.")
_SHARED_WIDTH = flags.DEFINE_integer("shared_width", 2048, "Width of the shared expert.")
_HEADS = flags.DEFINE_integer("heads", 16, "Heads of the attention, 128 columns each.")
_ATTENTION = flags.DEFINE_enum(
    "attention", "cudnn", ["cudnn", "xla"], "What computes attention on GPUs."
)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Time for each kind of step.")
_PICTURE = flags.DEFINE_string("picture", None, "Where to draw ours with two microbatches.")
_OUT = flags.DEFINE_string("out", "out/microbatches", "Where profiles go.")

_COLUMNS = "gemms", "other", "ours", "coll.", "idle", "copies", "waited", "hidden"
Block = Callable[..., tuple[Array, Array]]
# Without it, XLA may run a collective beside nothing.
_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}


def _case(tokens: int) -> Case:
    return Case(
        tokens,
        _HIDDEN.value,
        jax.device_count(),
        "float32" if jax.default_backend() == "cpu" else "bfloat16",
        num_experts=_EXPERTS.value * jax.device_count(),
        top_k=_TOP_K.value,
        slack=1.1,
    )


class Setting:
    """Mesh, parameters, and two microbatches with a routing that is known beforehand."""

    def __init__(self) -> None:
        tokens = _BATCH.value * _SEQUENCE.value
        self.half, self.whole = _case(tokens), _case(2 * tokens)
        ranks = self.half.ep_size
        self.mesh = contestants.make_mesh(ranks)
        idx = [make_inputs(self.half, seed).topk_idx for seed in (0, 1)]
        both = np.stack([part.reshape(ranks, tokens, -1) for part in idx], axis=1)
        self.load_of_half = _larger(*(measure_load(self.half, part) for part in idx))
        self.load_of_whole = measure_load(self.whole, both.reshape(2 * ranks * tokens, -1))
        rows = NamedSharding(self.mesh, P(contestants.AXIS))
        params, specs = example.make_params(
            jax.random.key(0),
            _HIDDEN.value,
            self.half.num_experts,
            _EXPERT_WIDTH.value,
            _SHARED_WIDTH.value,
            _HEADS.value,
            self.half.dtype,
        )
        # Each rank has dense parameters of its own: their gradients need no collective, which would
        # be the same for all contestants.
        params = {
            name: value if specs[name] == rows.spec else jnp.stack([value] * ranks)
            for name, value in params.items()
        }
        self.is_dense = {name: spec != rows.spec for name, spec in specs.items()}
        shape = (2, ranks * _BATCH.value, _SEQUENCE.value, _HIDDEN.value)
        halves = jax.random.normal(jax.random.key(1), shape, self.half.dtype)
        self.args = (
            {name: jax.device_put(value, rows) for name, value in params.items()},
            *(jax.device_put(half, rows) for half in halves),
            *(jax.device_put(part, rows) for part in idx),
        )
        on_cpu = jax.default_backend() == "cpu"
        self.attention = None if on_cpu else _ATTENTION.value


def _larger(first: Load, second: Load) -> Load:
    """Sizes that hold either."""
    return Load(*(np.maximum(a, b) for a, b in zip(first, second, strict=True)))


def _routed(setting: Setting, params: Any, x: Array, idx: Array) -> tuple[Array, ...]:
    """As the example's `attend_and_route`, but for the choice of experts, which is given."""
    k = setting.half.top_k
    x, h, _, _ = example.attend_and_route(params, x, k, setting.attention)
    scores = jax.nn.softmax((h @ params["router"]).astype(jnp.float32))
    return x, h, idx, jnp.take_along_axis(scores, idx, axis=1)


def _at_once(block: Callable[..., Array], params: Any, a: Array, b: Array, *idx: Array) -> Any:
    """Both microbatches as one."""
    out = block(params, jnp.concatenate([a, b]), jnp.concatenate(idx))
    return jnp.split(out, 2)


def _in_turn(block: Callable[..., Array], params: Any, a: Array, b: Array, *idx: Array) -> Any:
    return [block(params, x, i) for x, i in zip((a, b), idx, strict=True)]


def _collectives(setting: Setting, one: Any, load: Load) -> Callable[..., Array]:
    """The block on XLA's collectives, the shared expert where XLA puts it."""

    def block(params: Any, x: Array, idx: Array) -> Array:
        x, h, idx, weights = _routed(setting, params, x, idx)
        shared, grouped = one.dispatch_beside(example.shared_expert, (params, h), h, idx, weights)
        y = layer.experts(
            grouped, params["up"], params["down"], load.expert_capacity, grouped.weights
        )
        out = one.combine(y, grouped.handle, jnp.ones_like(grouped.weights))
        return x + (shared + out).reshape(x.shape)

    return block


def _one(setting: Setting, buffer: smf.Buffer) -> Callable[..., Array]:
    def block(params: Any, x: Array, idx: Array) -> Array:
        before = functools.partial(_routed, setting)
        return example.shared_beside_dispatch(buffer, before, params, x, idx)

    return block


def _two(setting: Setting, buffer: smf.Buffer, params: Any, a: Array, b: Array, *idx: Array) -> Any:
    before = functools.partial(_routed, setting)
    return example.interleave(buffer, before, params, (a, idx[0]), (b, idx[1]))


def _contestants(setting: Setting) -> tuple[dict[str, Block], list[smf.Buffer]]:
    make_ours = functools.partial(contestants.make_ours, mesh=setting.mesh, in_batches=True)
    of_half = make_ours(setting.half, setting.load_of_half).buffer
    of_whole = make_ours(setting.whole, setting.load_of_whole).buffer
    dense = {
        "XLA's all-to-all, one": (_at_once, setting.whole, setting.load_of_whole),
        "XLA's all-to-all, two": (_in_turn, setting.half, setting.load_of_half),
    }
    blocks: dict[str, Block] = {
        name: functools.partial(way, _collectives(setting, contestants.make_peer(case, load), load))
        for name, (way, case, load) in dense.items()
    }
    if jax.default_backend() != "cpu":
        ragged = contestants.make_ragged(setting.whole, setting.load_of_whole, 256)
        blocks["XLA's ragged all-to-all, one"] = functools.partial(
            _at_once, _collectives(setting, ragged, setting.load_of_whole)
        )
    blocks["ours, one"] = functools.partial(_at_once, _one(setting, of_whole))
    blocks["ours, two, one after the other"] = functools.partial(_in_turn, _one(setting, of_half))
    blocks["ours, two interleaved"] = functools.partial(_two, setting, of_half)
    return blocks, [of_half, of_whole]


def _loss(setting: Setting, block: Block) -> Callable[..., Array]:
    def of_rank(params: Any, *args: Array) -> Array:
        own = {name: p[0] if setting.is_dense[name] else p for name, p in params.items()}
        out = block(own, *args)
        squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in out]
        return jax.lax.psum(sum(squares), contestants.AXIS)

    return jax.shard_map(
        of_rank,
        mesh=setting.mesh,
        in_specs=P(contestants.AXIS),
        out_specs=P(),
        check_vma=False,
    )


def _remat(block: Block) -> Block:
    saved = jax.checkpoint_policies.save_only_these_names(smf.DISPATCHED)
    return jax.checkpoint(block, policy=saved)


def _steps(setting: Setting, blocks: dict[str, Block]) -> dict[str, dict[str, Any]]:
    """Compiled steps: by kind, then by contestant."""
    kinds: dict[str, Callable[[Block], Any]] = {
        "forward": lambda block: _loss(setting, block),
        "with gradients": lambda block: jax.grad(_loss(setting, block)),
        "with remat": lambda block: jax.grad(_loss(setting, _remat(block))),
    }
    jobs = {
        (kind, name): (jax.jit(make(block), compiler_options=_options(name)), setting.args)
        for kind, make in kinds.items()
        for name, block in blocks.items()
    }
    compiled = programs.compile_all(jobs)
    steps: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for (kind, name), run in compiled.items():
        if isinstance(run, Exception):
            print(f"{kind}, {name}: {type(run).__name__}: {' '.join(str(run).split())[:300]}")
        else:
            steps[kind][name] = run
    return steps


def _options(name: str) -> dict[str, Any] | None:
    on_cpu = jax.default_backend() == "cpu"
    return _OPTIONS if name.startswith("XLA") and not on_cpu else None


def _measure(run: Callable[[], Any], directory: pathlib.Path) -> list[float]:
    """What GPUs did in a step, means of all of them: numbers for `_COLUMNS`."""
    parts = list(trace.by_gpu(trace.record(run, directory)).values())

    def union(part: list[trace.Event], *kinds: str) -> list[trace.Interval]:
        return trace.union(e for e in part if e.kind in kinds)

    def mean_ms(measure: Callable[[list[trace.Event]], float]) -> float:
        return 1e-3 * statistics.mean(map(measure, parts))

    gemms, other, ours, collectives = (
        mean_ms(lambda part, kind=kind: trace.length(union(part, kind)))
        for kind in ("gemm", "other", "ours", "collective")
    )
    idle = mean_ms(
        lambda part: (
            max(e.end_us for e in part)
            - min(e.start_us for e in part)
            - trace.length(union(part, "gemm", "other", "ours", "collective"))
        )
    )
    waited = mean_ms(
        lambda part: sum(e.duration_us for e in part if e.kind == "ours" and e.phase == "wait")
    )
    copies = mean_ms(lambda part: trace.length(trace.union(trace.peer_copies(part))))
    hidden = 1 - waited / copies if ours else float("nan")
    return [gemms, other, ours, collectives, idle, copies, waited, hidden]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    print("command: python -m benchmarks.microbatches", *sys.argv[1:])
    setting = Setting()
    print(
        f"two microbatches of {_BATCH.value} x {_SEQUENCE.value} tokens a rank, hidden "
        f"{_HIDDEN.value}, {_EXPERTS.value} experts a rank of width {_EXPERT_WIDTH.value}, "
        f"top-{_TOP_K.value}, shared expert {_SHARED_WIDTH.value}, {_HEADS.value} heads, "
        f"{setting.half.dtype}"
    )
    blocks, buffers = _contestants(setting)
    on_cpu = jax.default_backend() == "cpu"
    for kind, runs in _steps(setting, blocks).items():
        times = timing.race(runs, _SECONDS.value, 5, 100)
        medians = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        best = min((ms for name, ms in medians.items() if name.startswith("XLA")), default=None)
        columns = ("ms", 9), ("of XLA", 9), *((name, 8) for name in _COLUMNS)
        print(f"\n{kind:34}", *(f"{name:>{width}}" for name, width in columns), sep="", flush=True)
        for name, ms in medians.items():
            cells = f"{name:34}{ms:9.3f}{ms / best if best else float('nan'):9.2f}"
            if not on_cpu:
                profile = pathlib.Path(_OUT.value, f"{kind} {name}".replace(" ", "_"))
                cells += "".join(f"{number:8.2f}" for number in _measure(runs[name], profile))
                if _PICTURE.value and kind == "with gradients" and name.endswith("interleaved"):
                    part = trace.by_gpu(trace.read(profile))[0]
                    drawing.draw_parts({0: part}, pathlib.Path(_PICTURE.value))
            print(cells, flush=True)
    for buffer in buffers:
        buffer.check()
        buffer.close()


if __name__ == "__main__":
    app.run(main)
