"""What the tests share: ranks, inputs, and running a program on the library and on the reference.

A program under test takes an `Api` first, so that it runs on either. Sizes follow the devices that
there are: eight CPU devices, or the GPUs of the machine under JAX_PLATFORMS=cuda.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sm_free as smf
from jax_sm_free import reference
from jax_sm_free.config import Config

P = jax.sharding.PartitionSpec

EP_SIZES = tuple(n for n in (1, 2, 4, 8) if n <= jax.device_count())
MAX_RANKS = EP_SIZES[-1]
# Enough to have a peer that is neither oneself nor one's neighbour, and cheaper than all.
SOME_RANKS = min(4, MAX_RANKS)
ON_CPU = jax.default_backend() == "cpu"
# Whether a buffer is of use after a fault.
BUFFERS_GO_ON = ON_CPU

# JAX 0.11.2 ends the process while it compiles some programs with such inputs.
needs_empty_inputs = pytest.mark.skipif(
    jax.__version__ == "0.11.2", reason="JAX 0.11.2 crashes on empty inputs of shard_map"
)

NO_TOKENS = pytest.param(0, marks=needs_empty_inputs)

# What a run that met a fault raises when its results are asked for; ValueError where JAX found out
# before it returned them, as it does on a single device.
RUN_ERROR = (jax.errors.JaxRuntimeError, ValueError)


def random_examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings of a hypothesis test of `count` examples; the same ones each time in CI."""
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


# ------------------------------------------------------------------------------------ programs


@dataclasses.dataclass(frozen=True)
class Api:
    """One of the two implementations: the buffer with its ops, and the module's functions."""

    buffer: Any
    module: ModuleType

    def overlap(self, pending: Any, fn: Callable[..., Any], *args: Any) -> Any:
        return self.module.overlap(pending, fn, *args)


def mesh_of(ep_size: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:ep_size]), ("ep",))


def make_config(ep_size: int = SOME_RANKS, **sizes: Any) -> Config:
    """Small sizes that are no multiples of anything, but for those given."""
    defaults = {
        "hidden": 7,
        "num_experts": 8,
        "top_k": 3,
        "max_tokens": 6,
        "dtype": jnp.float32,
        "timeout_s": 60.0 if ON_CPU else 20.0,  # on GPUs nothing but a hang takes long
    }
    return Config(ep_size=ep_size, **(defaults | sizes))


def open_buffer(config: Config, mesh: Any = None, axis: Any = "ep", module: Any = smf) -> Any:
    """A buffer of the library, or of the reference, with these sizes."""
    mesh = mesh_of(config.ep_size) if mesh is None else mesh
    return module.Buffer.from_config(mesh, axis, config)


def on_ranks(fn: Callable[..., Any], mesh: Any, **kwargs: Any) -> Callable[..., Any]:
    """jit(shard_map(fn)), for arrays with a leading axis of ranks, in and out."""
    return jax.jit(unjitted_on_ranks(fn, mesh, **kwargs))


def unjitted_on_ranks(fn: Callable[..., Any], mesh: Any, **kwargs: Any) -> Callable[..., Any]:
    """on_ranks without jit: runs operation by operation."""

    def per_rank(*args: Any) -> Any:
        out = fn(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    spec = P(mesh.axis_names)
    return jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec, **kwargs)


def ranks_here(buffer: Any) -> list[int]:
    """The ranks of this process, where the mesh has one axis."""
    devices = enumerate(buffer.mesh.devices.flat)
    return [rank for rank, device in devices if device.process_index == jax.process_index()]


def whole(results: Any) -> Any:
    """Results of a jitted function: where each process has a part of them, all parts."""
    return results


@functools.cache
def apis(config: Config) -> tuple[Api, Api]:
    """The library and the reference, each with one buffer of this configuration for all tests."""
    return Api(open_buffer(config), smf), Api(open_buffer(config, module=reference), reference)


@functools.cache
def runners(config: Config, program: Callable[..., Any], **kwargs: Any) -> tuple[Any, Any]:
    """`program(api, *args)` compiled for the library and for the reference; compiled once."""
    mesh = mesh_of(config.ep_size)
    ours, theirs = (functools.partial(program, api) for api in apis(config))
    return on_ranks(ours, mesh, **kwargs), on_ranks(theirs, mesh, **kwargs)


def check_same(config: Config, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `program` on both, asserts the same bits, and returns the result."""
    ours, theirs = runners(config, program, **kwargs)
    got = ours(*args)
    assert_same_bits(got, theirs(*args))
    return got


def assert_same_bits(got: Any, want: Any) -> None:
    """Two pytrees: the same structure, dtypes, shapes and bytes. 0.0 is not -0.0."""
    got, want = jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        a, b, name = np.asarray(a), np.asarray(b), jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, (name, a.dtype, b.dtype)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        if a.tobytes() != b.tobytes():
            np.testing.assert_array_equal(a, b, err_msg=f"{name}, got before want")
            raise AssertionError(f"{name} differs in the sign of a zero or in a NaN")


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Two pytrees that are equal but for rounding, relative to the largest value of each array."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32)
        atol = tolerance * np.abs(b).max(initial=1e-3)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol)


# -------------------------------------------------------------------------- programs for many tests


def round_trip(api: Api, x: Any, topk_idx: Any, topk_weights: Any, y: Any) -> Any:
    """Dispatch to experts, and a weighted combine of `y`, NaN in all rows of no token."""
    recv = api.buffer.dispatch(x, topk_idx, topk_weights)
    y = poison_unused(y, recv.layout)
    return recv, api.buffer.combine(y, recv.layout, weights=recv.weights)


def round_trip_tokens(api: Api, x: Any, topk_idx: Any, topk_weights: Any, y: Any) -> Any:
    """The same by tokens, and with a plain sum."""
    recv = api.buffer.dispatch(x, topk_idx, topk_weights, output="tokens")
    y = poison_unused(y, recv.layout)
    return recv, api.buffer.combine(y, recv.layout)


def layer(api: Api, x: Any, topk_idx: Any, topk_weights: Any, y: Any) -> Any:
    """Dispatch to experts that multiply their rows by y, and a weighted combine."""
    recv = api.buffer.dispatch(x, topk_idx, topk_weights)
    return api.buffer.combine(recv.x * y, recv.layout, weights=recv.weights)


def row_numbers(config: Config) -> np.ndarray:
    """The rows of x in `big_round_trip`, a number each: f32 [ep_size, max_tokens]."""
    size = config.ep_size * config.max_tokens
    return np.arange(size, dtype=np.float32).reshape(config.ep_size, config.max_tokens)


def big_round_trip(api: Api, topk_idx: Any, topk_weights: Any) -> Any:
    """Two columns of all rows received, their counts, and two columns of all sums.

    Rows are made where they are needed, so that not even the host's memory holds them all.
    """
    config = api.buffer.config
    rank = jax.lax.axis_index("ep").astype(jnp.float32)
    number = jnp.arange(config.max_tokens, dtype=jnp.float32) + rank * config.max_tokens
    x = jnp.broadcast_to(number[:, None], (config.max_tokens, config.hidden)).astype(config.dtype)
    recv = api.buffer.dispatch(x, topk_idx, topk_weights)
    columns = jnp.array([0, config.hidden - 1])
    out = api.buffer.combine(recv.x, recv.layout, weights=recv.weights)
    return recv.x[:, columns], recv.counts, out[:, columns]


def poison_unused(y: Any, layout: smf.Layout) -> Any:
    """NaN in every row of y that belongs to no token."""
    rows = jnp.where(layout.rows < 0, y.shape[0], layout.rows).reshape(-1)
    used = jnp.zeros(y.shape[:1], bool).at[rows].set(True, mode="drop")
    return jnp.where(used[:, None], y, jnp.asarray(jnp.nan, y.dtype))


def after(value: Any, sent: Any) -> tuple[Any, Any]:
    """`value`, finite, computed after the send; and `sent`, received after `value`.

    By data edges, which every scheduler keeps: XLA:CPU does not heed the barriers of `overlap`.
    Adding zero changes no bit but the sign of -0.0. The reference has nothing to order.
    """
    if not isinstance(sent, smf.Sent):
        return value, sent
    value = value + 0 * sent.token[0].astype(value.dtype)
    zero = 0 * value.astype(jnp.float32).sum()
    return value, dataclasses.replace(sent, token=sent.token + zero)


def num_rows(config: Config, program: Callable[..., Any]) -> int:
    """Rows of y in `round_trip` and `round_trip_tokens`."""
    return config.recv_capacity if program is round_trip else config.max_recv_tokens


# -------------------------------------------------------------------------------------- inputs

# What can be peculiar about who sends what to whom. Each is a function of (indices, config) that
# works on uniform indices with some -1, of all ranks: [ep_size, T, top_k].
ROUTINGS: dict[str, Callable[[np.ndarray, Config], Any]] = {
    "uniform": lambda idx, c: None,
    "nobody_sends": lambda idx, c: idx.fill(-1),
    "one_rank_sends_nothing": lambda idx, c: idx[-1].fill(-1),
    "some_tokens_go_nowhere": lambda idx, c: idx[:, ::2].fill(-1),
    "one_rank_receives_nothing": lambda idx, c: _replace(idx, idx < c.num_local_experts, -1),
    "all_to_one_expert": lambda idx, c: idx.fill(c.num_experts // 2),
    "one_hot_expert": lambda idx, c: _replace(idx, idx % 4 != 1, c.num_experts - 1),
    "all_to_one_rank": lambda idx, c: _replace(idx, idx >= 0, idx % c.num_local_experts),
    "an_expert_twice": lambda idx, c: _replace(idx, np.ones(idx.shape, bool), idx[..., :1]),
    "only_to_oneself": lambda idx, c: _replace(
        idx,
        idx >= 0,
        idx % c.num_local_experts + np.arange(c.ep_size)[:, None, None] * c.num_local_experts,
    ),
}


def _replace(idx: np.ndarray, where: np.ndarray, value: Any) -> None:
    idx[:] = np.where(where, value, idx)


def make_routing(
    config: Config, num_tokens: int, seed: int, how: str = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
    """topk_idx and topk_weights of all ranks; some indices are -1, some weights exactly 0."""
    rng = np.random.default_rng(seed)
    shape = (config.ep_size, num_tokens, config.top_k)
    topk_idx = rng.integers(-1, config.num_experts, shape).astype(np.int32)
    ROUTINGS[how](topk_idx, config)
    weights = rng.uniform(-1, 1, shape).astype(np.float32)
    weights[rng.uniform(size=shape) < 0.1] = 0
    return topk_idx, weights


def make_rows(config: Config, num: int, seed: int) -> np.ndarray:
    """Random rows of all ranks, [ep_size, num, hidden] of the buffer's dtype."""
    rng = np.random.default_rng(seed)
    shape = (config.ep_size, num, config.hidden)
    return rng.normal(size=shape).astype(np.float32).astype(config.dtype)


def make_inputs(
    config: Config, num_tokens: int | None = None, seed: int = 0, how: str = "uniform"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, topk_idx, topk_weights of all ranks; `max_tokens` tokens each unless told."""
    num_tokens = config.max_tokens if num_tokens is None else num_tokens
    return make_rows(config, num_tokens, seed), *make_routing(config, num_tokens, seed, how)


def layer_inputs(config: Config, seed: int = 1) -> tuple[np.ndarray, ...]:
    """x, topk_idx, topk_weights, y of all ranks, for `layer`."""
    return *make_inputs(config, seed=seed), make_rows(config, config.recv_capacity, seed + 1)


# -------------------------------------------------------------------------------------- faults
#
# On CPU the results of a run that met a fault raise it, and its buffer goes on, but for one over
# several processes, which has come to its end. On GPUs the results are there, NaN where the fault
# reached them; `check` and every later call raise it, and the buffer has come to its end. A call
# that fails on one GPU while others go on may raise for all of them.


def error_of(run: Callable[..., Any], *args: Any) -> str:
    """The message that a run which must fail raises, when its results are asked for."""
    try:
        out = run(*args)
        jax.block_until_ready(out)
    except RUN_ERROR as error:
        return str(error)
    raise AssertionError(f"expected the run to fail, but it gave {jax.tree.map(np.shape, out)}")


def run_into_fault(run: Callable[..., Any], *args: Any) -> str:
    """The fault that a run must meet, as its results raise it; on GPUs, as the next call does."""
    if not ON_CPU:
        with contextlib.suppress(RUN_ERROR):
            jax.block_until_ready(run(*args))
    return error_of(run, *args)


def fault_of(buffer: smf.Buffer) -> str:
    """The fault that `check` raises: on CPU once, and then no more; on GPUs each time."""
    try:
        buffer.check()
    except smf.FaultError as error:
        if BUFFERS_GO_ON:
            buffer.check()
        else:
            with pytest.raises(smf.FaultError, match=re.escape(str(error))):
                buffer.check()
        return str(error)
    raise AssertionError("expected buffer.check() to raise the fault, but it did not")


def go_on(
    buffer: smf.Buffer, run: Callable[..., Any], compiled: Callable[..., Any]
) -> tuple[smf.Buffer, Callable[..., Any]]:
    """Buffer and run to use after a fault: the same where they go on, else others."""
    if BUFFERS_GO_ON:
        return buffer, run
    buffer.close()
    buffer = open_buffer(buffer.config, buffer.mesh)
    return buffer, compiled(buffer)


def errors_by_rank(buffer: smf.Buffer, run: Callable[..., Any], *args: Any) -> list[str | None]:
    """For each rank the error that all of its results carry, or None.

    A rank whose results are poisoned carries the buffer's fault.
    """
    ranks = range(buffer.config.ep_size)
    try:
        out = run(*args)
    except RUN_ERROR as error:
        return [str(error) for _ in ranks]
    return [error_of_rank(buffer, out, rank) for rank in ranks]


def error_of_rank(buffer: smf.Buffer, out: Any, rank: int) -> str | None:
    """Of a rank of this process: see `errors_by_rank`."""
    error = _error_of_shards(_shards_of_rank(out, rank))
    if error or ON_CPU:
        return error
    return fault_of(buffer) if _is_poisoned(_shards_of_rank(out, rank)) else None


def _shards_of_rank(out: Any, rank: int) -> list[Any]:
    shards = [shard for leaf in jax.tree.leaves(out) for shard in leaf.addressable_shards]
    return [shard.data for shard in shards if (shard.index[0].start or 0) == rank]


def _error_of_shards(shards: list[Any]) -> str | None:
    errors = []
    for shard in shards:
        try:
            shard.block_until_ready()
            # On GPUs it raises what block_until_ready lets pass: a callback's error.
            np.asarray(shard)
        except RUN_ERROR as error:
            errors.append(str(error))
    assert len(errors) in (0, len(shards)), errors
    return errors[0] if errors else None


def _is_poisoned(shards: list[Any]) -> bool:
    """Whether all floats of a rank are NaN. Some of them being NaN is an error of its own."""
    floats = [np.asarray(shard) for shard in shards]
    nan = [np.isnan(a) for a in floats if jnp.issubdtype(a.dtype, jnp.floating) and a.size]
    assert len({bool(value) for a in nan for value in a.flat}) == 1, "the rank is half poisoned"
    return bool(nan[0].all())


def assert_matches(text: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, text), f"expected {pattern!r} in {text!r}"
