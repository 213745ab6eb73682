"""Who sends what to whom: every routing, and every size, against the reference, bit for bit."""

from __future__ import annotations

import functools

import faulty_runs
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from sample_inputs import make_inputs, make_rows
from support import make_config

from jax_sm_free.config import Config

pytestmark = pytest.mark.long

PROGRAMS = {"experts": sample_programs.round_trip, "tokens": sample_programs.round_trip_tokens}


def check(config: Config, output: str, num_tokens: int | None = None, seed=0, how="uniform"):
    """Compares dispatch, combine and layout; returns what was received."""
    program = PROGRAMS[output]
    inputs = make_inputs(config, num_tokens, seed, how)
    y = make_rows(config, sample_programs.num_rows(config, program), seed + 1)
    return support.check_same(config, program, *inputs, y)[0]


# Shared by the tests below, so that each is compiled once. The capacity cuts some groups.
CONFIGS = {
    ep_size: make_config(
        ep_size,
        num_experts=2 * ep_size,
        recv_capacity=4 * ep_size + 5,
        expert_alignment=2,
        dtype=jnp.bfloat16 if ep_size == 2 else jnp.float32,
    )
    for ep_size in support.EP_SIZES
}
FIXED = {  # Every group has as many rows.
    ep_size: make_config(ep_size, num_experts=2 * ep_size, expert_capacity=4)
    for ep_size in support.EP_SIZES
}
CASES = [(config, "experts") for config in (*CONFIGS.values(), FIXED[support.SOME_RANKS])]
CASES += [(CONFIGS[ep_size], "tokens") for ep_size in (support.SOME_RANKS, support.MAX_RANKS)]


@support.random_examples(60)
@hypothesis.given(
    case=st.sampled_from(CASES),
    how=st.sampled_from(sorted(sample_inputs.ROUTINGS)),
    seed=st.integers(0, 2**31),
)
def test_random_routing(case, how, seed):
    check(*case, seed=seed, how=how)


@pytest.mark.parametrize("how", sorted(sample_inputs.ROUTINGS))
@pytest.mark.parametrize("output", sorted(PROGRAMS))
def test_peculiar_routing(output, how):
    """-1 for an entry, a token, a rank; an idle rank; a hot expert; one rank for all; repeats."""
    recv = check(CONFIGS[support.MAX_RANKS], output, how=how, seed=3)
    counts = np.asarray(recv.counts)
    if how == "nobody_sends":
        assert counts.sum() == 0
    if how == "one_rank_receives_nothing":
        assert counts[0].sum() == 0
    if how in ("all_to_one_expert", "all_to_one_rank"):
        assert (counts.sum(axis=1) > 0).sum() == 1
    if how == "an_expert_twice":
        assert (counts % 3 == 0).all()


@pytest.mark.parametrize("how", sorted(sample_inputs.ROUTINGS))
def test_groups_of_one_size(how):
    """A batch of all experts: rows that find no place are dropped, places without one are zero."""
    config = FIXED[support.MAX_RANKS]
    recv = check(config, "experts", how=how, seed=9)
    counts, dropped = np.asarray(recv.counts), np.asarray(recv.dropped)
    np.testing.assert_array_equal(recv.group_sizes, np.full_like(counts, 4))
    np.testing.assert_array_equal(dropped, np.maximum(counts - 4, 0).sum(axis=1))
    batch = np.asarray(recv.x).reshape(*counts.shape, 4, config.hidden)
    filled = np.abs(batch).max(axis=-1) > 0
    np.testing.assert_array_equal(filled, np.arange(4) < counts[..., None])


@pytest.mark.parametrize("num_tokens", [support.NO_TOKENS, 1, 5])
def test_fewer_tokens_than_max_tokens(num_tokens):
    """No token, one, a number that is a multiple of nothing; all others have max_tokens."""
    check(CONFIGS[support.MAX_RANKS], "experts", num_tokens)


@support.needs_empty_inputs
def test_no_token_by_tokens():
    assert not np.asarray(check(CONFIGS[support.SOME_RANKS], "tokens", 0).num_tokens).any()


def test_more_tokens_than_max_tokens_raise_at_trace_time():
    config = CONFIGS[support.SOME_RANKS]
    ours, _ = support.runners(config, sample_programs.round_trip)
    inputs = make_inputs(config, 7)
    with pytest.raises(ValueError, match=r"at most 6 tokens \(max_tokens\), got 7"):
        ours.lower(*inputs, make_rows(config, config.recv_capacity, 0))


def may_end(config):
    """The program and its buffer, for a fault: on GPUs not those that other tests share."""
    if support.BUFFERS_GO_ON:
        return support.runners(config, sample_programs.round_trip)[0], support.apis(config)[
            0
        ].buffer
    buffer = support.open_buffer(config)
    program = functools.partial(sample_programs.round_trip, support.Api(buffer, support.smf))
    return support.on_ranks(program, buffer.mesh), buffer


@pytest.mark.parametrize("bad", ["num_experts", -2, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_is_a_fault_and_the_buffer_lives_on(bad):
    """The fault names rank, token, k and value; no rank returns; the next run is right."""
    config = CONFIGS[support.SOME_RANKS]
    bad = config.num_experts if bad == "num_experts" else bad
    rank = config.ep_size - 1
    ours, buffer = may_end(config)
    x, topk_idx, weights = make_inputs(config, seed=4)
    y = make_rows(config, config.recv_capacity, 5)
    wrong = topk_idx.copy()
    wrong[rank, 4, 1] = bad

    expected = (
        f"dispatch_send on rank {rank}",
        rf"expected topk_idx in \[-1, {config.num_experts}\)",
        f"seen {bad} at token 4, k 1",
    )
    support.assert_matches(faulty_runs.run_into_fault(ours, x, wrong, weights, y), *expected)
    support.assert_matches(faulty_runs.fault_of(buffer), *expected)
    check(config, "experts", seed=6)


def test_an_index_out_of_range_ends_the_run_on_every_rank():
    config = CONFIGS[support.SOME_RANKS]
    ours, buffer = may_end(config)
    x, topk_idx, weights = make_inputs(config, seed=4)
    topk_idx[0, 0, 0] = config.num_experts
    y = make_rows(config, config.recv_capacity, 5)
    for error in faulty_runs.errors_by_rank(buffer, ours, x, topk_idx, weights, y):
        support.assert_matches(error or "", f"seen {config.num_experts} at token 0")
    faulty_runs.fault_of(buffer)


SIZES = [
    # ep_size, hidden, top_k, experts per rank, dtype, output
    (1, 1, 1, 1, jnp.bfloat16, "experts"),
    (8, 7, 32, 1, jnp.float32, "experts"),
    (2, 128, 2, 24, jnp.float16, "tokens"),
    (4, 2048, 4, 3, jnp.bfloat16, "experts"),
    (8, 7168, 8, 4, jnp.bfloat16, "experts"),
    (4, 8192, 16, 2, jnp.float16, "tokens"),
    (2, 1, 32, 5, jnp.float32, "experts"),
    (1, 8192, 8, 16, jnp.float32, "experts"),
    # Rows of 129, 65 and 257 words of 16 bytes: their pieces are not of one size.
    (2, 1032, 4, 3, jnp.bfloat16, "experts"),
    (2, 520, 4, 3, jnp.bfloat16, "experts"),
    (2, 1028, 4, 3, jnp.float32, "experts"),
]


@pytest.mark.parametrize(("ep_size", "hidden", "top_k", "num_local", "dtype", "output"), SIZES)
def test_sizes(ep_size, hidden, top_k, num_local, dtype, output):
    """Pairs of top_k 1 to 32, hidden 1 to 8192, 1 to 8 ranks, one local expert or many."""
    ep_size = min(ep_size, support.MAX_RANKS)
    config = make_config(
        ep_size,
        hidden=hidden,
        top_k=top_k,
        num_experts=num_local * ep_size,
        max_tokens=5,
        dtype=dtype,
    )
    check(config, output, seed=7)
