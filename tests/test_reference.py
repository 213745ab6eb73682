"""The pure-JAX reference, on CPU, against loops over NumPy arrays, written from the contract."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_in_loops import (
    combine,
    dispatch_to_experts,
    dispatch_to_tokens,
    local_expert,
    token_rows,
)

from jax_sm_free import reference
from jax_sm_free.config import Config

pytestmark = pytest.mark.long

P = jax.sharding.PartitionSpec


# The reference, run on all ranks.


def mesh_of(ep_size: int) -> jax.sharding.Mesh:
    devices = jax.devices("cpu")
    assert len(devices) >= ep_size, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
    return jax.sharding.Mesh(np.array(devices[:ep_size]), ("ep",))


def on_ranks(fn, mesh, **kwargs):
    """jit(shard_map(fn)) for arrays with a leading axis of ranks, in and out."""

    def per_rank(*args):
        out = fn(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    spec = P(mesh.axis_names)
    return jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec, **kwargs))


def buffer_of(config: Config, mesh, axis="ep") -> reference.Buffer:
    return reference.Buffer.from_config(mesh, axis, config)


@functools.cache
def runners(config: Config, output: str, weighted: bool, check_vma: bool):
    mesh = mesh_of(config.ep_size)
    buffer = buffer_of(config, mesh)

    def there(x, topk_idx, topk_weights):
        return buffer.dispatch_recv(buffer.dispatch_send(x, topk_idx, topk_weights), output)

    def back(y, layout, weights):
        return buffer.combine_recv(buffer.combine_send(y, layout, weights if weighted else None))

    return on_ranks(there, mesh, check_vma=check_vma), on_ranks(back, mesh, check_vma=check_vma)


def make_inputs(config: Config, num_tokens: int, seed: int, how: str = "uniform"):
    rng = np.random.default_rng(seed)
    shape = (config.ep_size, num_tokens, config.top_k)
    topk_idx = rng.integers(-1, config.num_experts, shape)
    if how == "none":
        topk_idx[:] = -1
    elif how == "hot":
        topk_idx = np.where(rng.uniform(size=shape) < 0.7, config.num_experts // 2, topk_idx)
    elif how == "first_rank":
        topk_idx = np.minimum(topk_idx, config.num_local_experts - 1)
    x = rng.normal(size=(config.ep_size, num_tokens, config.hidden)).astype(config.dtype)
    return x, topk_idx.astype(np.int32), rng.uniform(-1, 1, shape).astype(np.float32)


def same_bits(name: str, got, want) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype or name == "num_rows_from", (name, got.dtype, want.dtype)
    np.testing.assert_array_equal(got.astype(want.dtype), want, err_msg=name, strict=True)


def check(config: Config, output: str, inputs, weighted: bool = True, check_vma: bool = True):
    """Dispatch, then combine of random rows, compared bit by bit."""
    x, topk_idx, topk_weights = inputs
    there, back = runners(config, output, weighted, check_vma)
    got = there(x, topk_idx, topk_weights)
    loops = dispatch_to_experts if output == "experts" else dispatch_to_tokens
    want = [loops(x, topk_idx, topk_weights, rank, config) for rank in range(config.ep_size)]
    for name in vars(want[0]):
        value = getattr(got if hasattr(got, name) else got.layout, name)
        for rank in range(config.ep_size):
            same_bits(name, value[rank], getattr(want[rank], name))
    same_bits("layout.topk_idx", got.layout.topk_idx, topk_idx)

    rng = np.random.default_rng(1)
    y = rng.normal(size=got.x.shape).astype(config.dtype)
    weights = rng.normal(size=y.shape[:2]).astype(np.float32)
    rows = [one.rows for one in want]
    expected = combine(y, rows, weights if weighted else None, topk_idx, config)
    same_bits("combine", back(y, got.layout, weights), expected)
    return want


def make_config(ep_size: int = 4, **kwargs) -> Config:
    defaults = {"hidden": 7, "num_experts": 8, "top_k": 3, "max_tokens": 6, "dtype": jnp.float32}
    return Config(ep_size=ep_size, **(defaults | kwargs))


CONFIGS = (
    make_config(1, recv_capacity=13),
    make_config(2, num_experts=24, top_k=1, hidden=1, expert_alignment=3),
    make_config(2, recv_capacity=24, expert_alignment=4, top_k=5, dtype=jnp.float16),
    make_config(4),
    make_config(4, recv_capacity=9, top_k=2, num_experts=16, expert_alignment=2),
    make_config(8, recv_capacity=13, dtype=jnp.bfloat16),
    make_config(2, expert_capacity=4),
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    config=st.sampled_from(CONFIGS),
    output=st.sampled_from(("experts", "tokens")),
    how=st.sampled_from(("uniform", "hot", "first_rank", "none")),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_the_loops(config, output, how, seed):
    # Every other form is combined without weights, to compile each only once.
    check(config, output, make_inputs(config, 5, seed, how), weighted=output == "experts")


@pytest.mark.parametrize(
    ("ep_size", "dtype", "top_k"),
    [
        (1, jnp.bfloat16, 2),
        (1, jnp.float32, 8),
        (2, jnp.float32, 1),
        (2, jnp.bfloat16, 8),
        (4, jnp.float16, 8),
        (8, jnp.float32, 2),
        (8, jnp.bfloat16, 1),
    ],
)
def test_sums_are_strictly_ordered(ep_size, dtype, top_k):
    """Enough values that a contracted multiply-add or another order would show."""
    config = make_config(ep_size, hidden=128, top_k=top_k, max_tokens=32, dtype=dtype)
    check(config, "experts", make_inputs(config, 32, seed=2))


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
@pytest.mark.parametrize("output", ["experts", "tokens"])
def test_token_counts(num_tokens, output):
    config = make_config()
    inputs = make_inputs(config, num_tokens, seed=3)
    check(config, output, inputs, check_vma=num_tokens != 6)


@pytest.mark.parametrize("spare", [0, -1, -5, None])
def test_capacity_exactly_full_short_and_zero(spare):
    full = make_config(2, expert_alignment=4)
    inputs = make_inputs(full, 6, seed=4)
    need = max(one.group_sizes.sum() for one in check(full, "experts", inputs))
    config = make_config(2, expert_alignment=4, recv_capacity=0 if spare is None else need + spare)
    want = check(config, "experts", inputs)
    assert (sum(one.dropped for one in want) > 0) == (spare != 0)


def test_overflow_cuts_the_largest_group():
    config = make_config(1, num_experts=3, top_k=1, max_tokens=12, recv_capacity=9)
    x, _, weights = make_inputs(config, 12, seed=5)
    topk_idx = np.array([0] * 2 + [1] * 9 + [2], np.int32).reshape(1, 12, 1)
    (want,) = check(config, "experts", (x, topk_idx, weights))
    np.testing.assert_array_equal(want.group_sizes, [2, 6, 1])
    assert want.dropped == 3


def test_an_expert_named_twice_gets_two_rows():
    config = make_config(2, top_k=2)
    x, topk_idx, weights = make_inputs(config, 6, seed=6)
    topk_idx[:, :, 1] = topk_idx[:, :, 0]
    check(config, "experts", (x, topk_idx, weights))
    check(config, "tokens", (x, topk_idx, weights))


def test_rows_without_a_token_do_not_leak():
    config = make_config(2, expert_alignment=8)
    inputs = make_inputs(config, 6, seed=7)
    there, back = runners(config, "experts", True, True)
    recv = there(*inputs)
    used = np.zeros(recv.weights.shape, bool)
    for rank, rows in enumerate(np.asarray(recv.layout.rows)):
        used[rank, rows[rows >= 0]] = True
    y = np.where(used[..., None], np.ones(7, np.float32), np.float32(np.nan))
    assert np.isfinite(back(y, recv.layout, recv.weights)).all()


@pytest.mark.parametrize("values", [jnp.float8_e4m3fn, jnp.int8])
def test_values_and_scales(values):
    config = make_config(4)
    x, topk_idx, weights = make_inputs(config, 6, seed=8)
    pair = (x.astype(values), np.abs(x[..., :2]))
    for output in ("experts", "tokens"):
        there, _ = runners(config, output, True, True)
        got = there(pair, topk_idx, weights)
        for part, sent in zip(got.x, pair, strict=True):
            loops = dispatch_to_experts if output == "experts" else dispatch_to_tokens
            for rank in range(4):
                one = loops(sent, topk_idx, weights, rank, config)
                same_bits("part", np.asarray(part[rank]).view(np.uint8), one.x.view(np.uint8))


def test_two_axes_beside_another():
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "node", "gpu"))
    config = make_config(4)
    buffer = buffer_of(config, mesh, ("node", "gpu"))
    assert buffer.config == config
    groups = [make_inputs(config, 6, seed) for seed in (9, 10)]
    run = on_ranks(buffer.dispatch, mesh)
    got = run(*(np.concatenate(parts) for parts in zip(*groups, strict=True)))
    for group, inputs in enumerate(groups):
        for rank in range(4):
            want = dispatch_to_experts(*inputs, rank, config)
            same_bits("x", got.x[4 * group + rank], want.x)


@pytest.mark.parametrize("output", ["experts", "tokens"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients(output, check_vma):
    """With the identity for experts: d/dw = <x, ct>, d/dx = ct * (sum of kept weights)."""
    config = make_config(4, recv_capacity=14)
    mesh = mesh_of(4)
    buffer = buffer_of(config, mesh)
    x, topk_idx, weights = make_inputs(config, 6, seed=11)
    weights[:, ::2] = 0.0
    ct = np.random.default_rng(12).normal(size=x.shape).astype(np.float32)

    @jax.checkpoint
    def layer(x, topk_idx, weights):
        recv = buffer.dispatch(x, topk_idx, weights, output=output)
        if output == "tokens":
            hook = buffer.combine(
                recv.x, recv.layout, weights=recv.topk_weights.sum(-1), return_recv_hook=True
            )
        else:
            hook = buffer.combine(recv.x, recv.layout, weights=recv.weights, return_recv_hook=True)
        shared, hook = reference.overlap(hook, jnp.zeros_like, x)
        return hook() + shared

    run = on_ranks(layer, mesh, check_vma=check_vma)
    grads = jax.grad(lambda x, w: (run(x, topk_idx, w) * ct).sum(), (0, 1))(x, weights)

    kept = np.zeros(weights.shape, np.float32)
    for rank in range(4):
        rows = dispatch_to_experts(x, topk_idx, weights, rank, config).rows
        for row, (src, token) in enumerate(token_rows(topk_idx, rank, config)):
            here = [local_expert(e, rank, config) >= 0 for e in topk_idx[src, token]]
            kept[src, token] += rows[row] >= 0 if output == "experts" else here
    assert kept.sum() < (topk_idx >= 0).sum() or output == "tokens"
    want_x = ct * (kept * weights).sum(-1, keepdims=True)
    want_w = kept * (x * ct).sum(-1, keepdims=True)
    np.testing.assert_allclose(grads[0], want_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads[1], want_w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_tokens": 7}, ValueError, r"at most 6 tokens \(max_tokens\), got 7"),
        ({"hidden": 8}, ValueError, r"bfloat16\[T, 7\], got bfloat16\[6, 8\]"),
        ({"top_k": 4}, ValueError, r"int32\[6, 3\], got int32\[6, 4\]"),
        ({"idx": jnp.uint8}, TypeError, r"topk_idx int32\[6, 3\], got uint8"),
        ({"weights": jnp.bfloat16}, TypeError, r"topk_weights float32\[6, 3\], got bfloat16"),
    ],
)
def test_errors_carry_both_values(change, error, words):
    sizes = {
        "num_tokens": 6,
        "hidden": 7,
        "top_k": 3,
        "idx": jnp.int32,
        "weights": jnp.float32,
    } | change
    buffer = buffer_of(make_config(1, dtype=jnp.bfloat16), mesh_of(1))
    num_tokens, top_k = sizes["num_tokens"], sizes["top_k"]
    with pytest.raises(error, match=words):
        buffer.dispatch_send(
            jnp.zeros((num_tokens, sizes["hidden"]), jnp.bfloat16),
            jnp.zeros((num_tokens, top_k), sizes["idx"]),
            jnp.zeros((num_tokens, top_k), sizes["weights"]),
        )


def test_unknown_axis_and_output():
    with pytest.raises(ValueError, match="got 'model'"):
        buffer_of(make_config(1), mesh_of(1), "model")
    with buffer_of(make_config(1), mesh_of(1)) as buffer:
        with pytest.raises(ValueError, match="'experts' or 'tokens', got 'rows'"):
            buffer.dispatch_recv(None, "rows")
        buffer.check()
