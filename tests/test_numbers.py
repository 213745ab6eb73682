"""Bits: what is copied, summed, padded, cut, and what must not leak, against the reference."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from sample_inputs import make_inputs, make_rows
from support import make_config

pytestmark = pytest.mark.long

FULL = make_config(num_experts=2 * support.SOME_RANKS)


# ---------------------------------------------------------------------------------------- copies


def dispatch_only(output, api, x, topk_idx, weights):
    return api.buffer.dispatch(x, topk_idx, weights, output=output)


by_experts = functools.partial(dispatch_only, "experts")
by_tokens = functools.partial(dispatch_only, "tokens")


def random_bits(dtype, shape, seed):
    """Any bytes, NaN payloads and denormals among them."""
    row_bytes = shape[-1] * np.dtype(dtype).itemsize
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8).view(dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dispatch_copies_every_bit_pattern(dtype):
    """Dispatch only copies rows: NaN payloads, -0.0 and denormals arrive as they left.

    Compared with the reference on bytes: XLA itself changes NaN where it moves floats.
    """
    config = make_config(dtype=dtype, hidden=64)
    x = random_bits(dtype, (config.ep_size, config.max_tokens, config.hidden), 1)
    x[..., :4] = np.array([np.nan, -0.0, np.inf, 1e-40], np.float32).astype(dtype)
    one_byte_more = dataclasses.replace(config, hidden=65)  # rows that are pairs have scales
    topk_idx, weights = sample_inputs.make_routing(config, config.max_tokens, 1)
    ours, _ = support.runners(config, by_experts)
    _, theirs = support.runners(one_byte_more, by_experts)
    as_bytes = x.view(np.uint8), np.zeros((*x.shape[:2], 1), np.uint8)
    got = np.asarray(ours(x, topk_idx, weights).x)
    want, _ = theirs(as_bytes, topk_idx, weights).x
    assert np.isnan(got.astype(np.float32)).any()
    np.testing.assert_array_equal(got.view(np.uint8), want)


PAIRS = [
    # values, their columns, scales, their columns
    (jnp.float8_e4m3fn, 256, jnp.float32, 2),  # one scale for 128 columns
    (jnp.int8, 33, jnp.bfloat16, 1),
    (jnp.float8_e5m2, 128, jnp.float8_e8m0fnu, 4),  # microscaling: one scale for 32 columns
    (jnp.bfloat16, 64, jnp.int32, 16),
]


@pytest.mark.parametrize(("dtype", "columns", "scale_dtype", "scale_columns"), PAIRS)
@pytest.mark.parametrize("program", [by_experts, by_tokens])
def test_values_and_scales_arrive_bit_by_bit(dtype, columns, scale_dtype, scale_columns, program):
    """Compared with the reference on bytes: XLA itself changes NaN where it moves floats."""
    config = make_config(hidden=128, expert_alignment=4)
    topk_idx, weights = sample_inputs.make_routing(config, config.max_tokens, 2)
    shape = (config.ep_size, config.max_tokens)
    pair = (
        random_bits(dtype, (*shape, columns), 3),
        random_bits(scale_dtype, (*shape, scale_columns), 4),
    )
    ours, theirs = support.runners(config, program)
    got = ours(pair, topk_idx, weights)
    want = theirs(tuple(part.view(np.uint8) for part in pair), topk_idx, weights)
    assert tuple(part.dtype for part in got.x) == (dtype, scale_dtype)
    as_bytes = tuple(np.asarray(part).view(np.uint8) for part in got.x)
    support.assert_same_bits(dataclasses.replace(got, x=as_bytes), want)


@pytest.mark.one_process
@pytest.mark.skipif(support.MAX_RANKS < 2, reason="the only rank fills all its rows by tokens")
@pytest.mark.parametrize("program", [by_experts, by_tokens])
def test_padding_of_scales_that_have_no_zero(program):
    """float8_e8m0fnu has no zero: its padding is bytes of zero, here as in the reference."""
    config = make_config(hidden=128, expert_alignment=4)
    topk_idx, weights = sample_inputs.make_routing(config, config.max_tokens, 2)
    shape = (config.ep_size, config.max_tokens)
    pair = (np.ones((*shape, 128), jnp.float8_e4m3fn), np.ones((*shape, 4), jnp.float8_e8m0fnu))
    got, want = (run(pair, topk_idx, weights) for run in support.runners(config, program))
    scales = [np.asarray(out.x[1]).view(np.uint8) for out in (got, want)]
    assert set(np.unique(scales[0])) == {0, 127}, (
        f"expected bytes 0 (padding) and 127 (one), got {scales[0]}"
    )
    np.testing.assert_array_equal(*scales)


def test_twenty_repeats_give_the_same_bytes():
    config = make_config(support.MAX_RANKS, hidden=64, dtype=jnp.bfloat16, max_tokens=16)
    inputs = make_inputs(config, seed=4), make_rows(config, config.recv_capacity, 5)
    ours, theirs = support.runners(config, sample_programs.round_trip)
    want = theirs(*inputs[0], inputs[1])
    for _ in range(20):
        support.assert_same_bits(ours(*inputs[0], inputs[1]), want)


# ------------------------------------------------------------------------------------------ sums


def combine_both_ways(api, x, topk_idx, topk_weights, y, weights):
    """The weighted and the plain sum of rows that have other weights than they came with."""
    layout = api.buffer.dispatch(x, topk_idx, topk_weights).layout
    y = sample_programs.poison_unused(y, layout)
    weighted = api.buffer.combine(y, layout, weights=weights)
    return weighted, api.buffer.combine(y, layout)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_combine_sums_in_rank_order_in_float32(dtype):
    """Enough rows of one token, here and elsewhere, that another order or rounding would show."""
    config = make_config(hidden=128, top_k=16, max_tokens=16, num_experts=8, dtype=dtype)
    rng = np.random.default_rng(6)
    y = make_rows(config, config.recv_capacity, 7)
    y = (y.astype(np.float32) * rng.choice([1e-3, 1.0, 1e3], y.shape)).astype(y.dtype)
    weights = rng.normal(size=y.shape[:2]).astype(np.float32)
    got = support.check_same(config, combine_both_ways, *make_inputs(config, seed=8), y, weights)
    assert all(np.isfinite(np.asarray(out).astype(np.float32)).all() for out in got)


def test_combine_of_a_message_that_leaves_in_parts():
    """On GPUs that is the one to the next rank, if it has 4 MiB; here all rows go into it."""
    config = make_config(hidden=8192, dtype=jnp.float32, max_tokens=136, top_k=2)
    num_local = config.num_local_experts
    before = (np.arange(config.ep_size) - 1) % config.ep_size
    first_two = (before * num_local)[:, None, None] + np.arange(2)
    shape = (config.ep_size, config.max_tokens, config.top_k)
    topk_idx = np.broadcast_to(first_two, shape).astype(np.int32)
    y = make_rows(config, config.recv_capacity, 22)
    weights = np.random.default_rng(23).random(y.shape[:2], np.float32)
    x, _, topk_weights = make_inputs(config, seed=24)
    support.check_same(config, combine_both_ways, x, topk_idx, topk_weights, y, weights)


def combine_tokens_weighted(api, x, topk_idx, topk_weights, y, weights):
    recv = api.buffer.dispatch(x, topk_idx, topk_weights, output="tokens")
    y = sample_programs.poison_unused(y, recv.layout)
    return api.buffer.combine(y, recv.layout, weights=weights)


def test_combine_by_tokens_with_weights():
    config = make_config(hidden=128, dtype=jnp.bfloat16)
    y = make_rows(config, config.max_recv_tokens, 9)
    weights = np.random.default_rng(10).normal(size=y.shape[:2]).astype(np.float32)
    support.check_same(config, combine_tokens_weighted, *make_inputs(config, seed=9), y, weights)


def test_tokens_that_went_nowhere_are_zero():
    config = FULL
    x, topk_idx, weights = make_inputs(config, seed=11)
    topk_idx[:, 1] = -1
    y = make_rows(config, config.recv_capacity, 12)
    _, out = support.check_same(config, sample_programs.round_trip, x, topk_idx, weights, y)
    assert not np.asarray(out)[:, 1].any()
    assert np.asarray(out)[:, 0].any()


def test_nan_and_infinity_stay_with_their_token():
    """A NaN that a token really has must arrive, and reach no other token."""
    config = FULL
    x, topk_idx, weights = make_inputs(config, seed=13)
    weights[:] = 1
    topk_idx[:] = np.arange(3) % config.num_experts
    x[0, 2], x[1 % config.ep_size, 3, 0] = np.nan, np.inf

    def program(api, x, topk_idx, weights):
        recv = api.buffer.dispatch(x, topk_idx, weights)
        return api.buffer.combine(recv.x, recv.layout, weights=recv.weights)

    out = np.asarray(support.check_same(config, program, x, topk_idx, weights))
    bad = ~np.isfinite(x)
    np.testing.assert_array_equal(~np.isfinite(out), bad)


# ------------------------------------------------------------------------- what was never written


def test_a_run_full_of_nan_leaves_nothing_behind():
    """Messages and results use memory again that held NaN: the next run must not show it."""
    config = dataclasses.replace(FULL, expert_alignment=4)
    ours, _ = support.runners(config, sample_programs.round_trip)
    x, topk_idx, weights = make_inputs(config, seed=14, how="all_to_one_expert")
    y = make_rows(config, config.recv_capacity, 15)
    for seed in range(5):
        full = ours(x * np.nan, topk_idx, weights * np.nan, y * np.nan)
        assert np.isnan(np.asarray(full[0].x)).any()
        del full
        sparse = make_inputs(config, seed=seed, how="some_tokens_go_nowhere")
        recv, out = support.check_same(config, sample_programs.round_trip, *sparse, y)
        for leaf in (recv.x, recv.weights, out):
            assert np.isfinite(leaf).all()


def row_gradients(api, x, topk_idx, topk_weights, y, cotangent):
    """Gradients for all rows of y and their weights, those of no token among them."""
    recv = api.buffer.dispatch(x, topk_idx, topk_weights)

    def loss(y, weights):
        return (api.buffer.combine(y, recv.layout, weights=weights) * cotangent).sum()

    return recv.layout.rows, jax.grad(loss, (0, 1))(y, recv.weights)


@pytest.mark.one_process
def test_rows_without_a_token_have_no_gradient():
    """Their gradient is zero, although the memory held NaN: a run full of NaN comes before."""
    ours, theirs = support.runners(FULL, row_gradients)
    y = make_rows(FULL, FULL.recv_capacity, 15)
    full = make_inputs(FULL, seed=14, how="all_to_one_expert")
    for seed in range(5):
        jax.block_until_ready(ours(*full, y * np.nan, full[0] * np.nan))
        sparse = make_inputs(FULL, seed=seed, how="some_tokens_go_nowhere")
        rows, got = ours(*sparse, y, sparse[0])
        support.assert_close(got, theirs(*sparse, y, sparse[0])[1])
        for rank, used in enumerate(np.asarray(rows)):
            unused = np.setdiff1d(np.arange(FULL.recv_capacity), used)
            assert not any(np.asarray(grad)[rank, unused].any() for grad in got)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
@pytest.mark.cpu_only
def test_memory_that_malloc_filled_does_not_leak():
    """The same in a process whose malloc fills its blocks, with 0x7f7f7f7f until written."""
    here = pathlib.Path(__file__).parent
    tests = ["test_numbers.py::test_padding_and_tail_rows_are_zero[16]"]
    tests += ["test_routing.py::test_peculiar_routing[tokens-some_tokens_go_nowhere]"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *(str(here / test) for test in tests)],
        env=os.environ | {"MALLOC_PERTURB_": "128"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 passed" in done.stdout


# ------------------------------------------------------------------------ capacity and alignment


@pytest.mark.one_process
@pytest.mark.parametrize("alignment", [1, 16, 128])
def test_padding_and_tail_rows_are_zero(alignment):
    config = make_config(expert_alignment=alignment, num_experts=2 * support.SOME_RANKS)
    # Tokens name an expert several times: more rows than the default has room for.
    rows = config.max_recv_tokens * config.top_k + config.num_local_experts * (alignment - 1)
    config = dataclasses.replace(config, recv_capacity=rows)
    inputs = make_inputs(config, seed=16, how="one_hot_expert")
    y = make_rows(config, config.recv_capacity, 17)
    recv, _ = support.check_same(config, sample_programs.round_trip, *inputs, y)
    x, weights, counts = (np.asarray(a) for a in (recv.x, recv.weights, recv.counts))
    sizes = np.asarray(recv.group_sizes)
    np.testing.assert_array_equal(sizes, -(-counts // alignment) * alignment)
    for rank in range(config.ep_size):
        used = np.zeros(config.recv_capacity, bool)
        starts = np.cumsum(sizes[rank]) - sizes[rank]
        for start, count in zip(starts, counts[rank], strict=True):
            used[start : start + count] = True
        assert x[rank, used].any(axis=1).all()
        assert not x[rank, ~used].any()
        assert not weights[rank, ~used].any()


def _needed_rows(config, topk_idx):
    """Expert rows, padding included, that the fullest rank needs for this routing."""
    counts = np.bincount(topk_idx[topk_idx >= 0], minlength=config.num_experts)
    padded = -(-counts // config.expert_alignment) * config.expert_alignment
    return padded.reshape(config.ep_size, -1).sum(axis=1).max()


@pytest.mark.one_process
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize(
    "spare",
    ["exactly_full", "one_short", "few", pytest.param("zero", marks=support.needs_empty_inputs)],
)
def test_capacity(alignment, spare):
    """What is dropped, what is counted, and what combine returns then."""
    config = make_config(expert_alignment=alignment, num_experts=2 * support.SOME_RANKS)
    inputs = make_inputs(config, seed=18)
    need = _needed_rows(config, inputs[1])
    capacity = {"exactly_full": need, "one_short": need - 1, "few": need // 3, "zero": 0}[spare]
    config = dataclasses.replace(config, recv_capacity=int(capacity))
    y = make_rows(config, config.recv_capacity, 19)
    recv, out = support.check_same(config, sample_programs.round_trip, *inputs, y)
    dropped = np.asarray(recv.dropped)
    assert (dropped.sum() > 0) == (spare != "exactly_full")
    assert np.asarray(recv.counts).sum() == (inputs[1] >= 0).sum()
    if spare == "zero":
        assert recv.x.shape[1] == 0
        assert dropped.sum() == (inputs[1] >= 0).sum()
        assert not np.asarray(out).any()


# -------------------------------------------------------------------------------------- big regions


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


@pytest.mark.skipif(_memory_gib() < 20, reason="needs 20 GiB of memory")
@pytest.mark.cpu_only
def test_received_rows_past_two_gib():
    """Byte offsets past 2**31 and element offsets past 2**31 / 2, into rows and into a message."""
    config = make_config(
        1, hidden=8192, num_experts=2, top_k=1, max_tokens=66000, num_slots=1, dtype=jnp.float32
    )
    assert config.recv_capacity * config.row_bytes > 2**31
    assert config.message_bytes > 2**31
    topk_idx = np.full((1, config.max_tokens, 1), 1, np.int32)
    topk_idx[:, ::3] = 0
    weights = np.full(topk_idx.shape, 0.5, np.float32)
    with support.open_buffer(config) as buffer:
        program = functools.partial(
            sample_programs.big_round_trip, support.Api(buffer, support.smf)
        )
        run = support.on_ranks(program, buffer.mesh)
        ends, counts, out = jax.device_get(run(topk_idx, weights))
    numbers = sample_programs.row_numbers(config)[0]
    order = np.concatenate([numbers[::3], numbers[topk_idx[0, :, 0] == 1]])
    np.testing.assert_array_equal(ends[0], np.stack([order, order], axis=1))
    np.testing.assert_array_equal(counts[0], [22000, 44000])
    np.testing.assert_array_equal(out[0], np.stack([numbers, numbers], axis=1) / 2)
