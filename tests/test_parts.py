"""Messages large enough to leave in parts: those of other tests leave whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_programs
import support
from sample_inputs import make_inputs, make_rows
from support import make_config

pytestmark = pytest.mark.gpu_only

# 4.5 MB of rows on each rank, one tile of tokens more in one half than in the other.
CONFIG = make_config(
    num_experts=2 * support.SOME_RANKS,
    top_k=support.SOME_RANKS + 1,
    hidden=1024,
    max_tokens=1100,
)
QUANTISED = dataclasses.replace(CONFIG, hidden=4096, wire_dtype=jnp.float8_e4m3fn)
FIRST, SECOND = slice(0, 550), slice(550, None)


def stays(inputs, tokens):
    """The same inputs, but these tokens go to experts of their own rank alone."""
    x, topk_idx, weights = inputs
    num_local = CONFIG.num_local_experts
    first = num_local * np.arange(CONFIG.ep_size, dtype=np.int32)[:, None, None]
    topk_idx = topk_idx.copy()
    topk_idx[:, tokens] = topk_idx[:, tokens] % num_local + first
    return x, topk_idx, weights


def everywhere(inputs, tokens):
    """The same inputs, but these tokens go to every rank: messages have their rows in common."""
    x, topk_idx, weights = inputs
    ranks = np.arange(CONFIG.top_k, dtype=np.int32) % CONFIG.ep_size
    topk_idx = topk_idx.copy()
    topk_idx[:, tokens] = ranks * CONFIG.num_local_experts + topk_idx[:, tokens] % 2
    return x, topk_idx, weights


ROUTINGS = {
    "uniform": lambda: make_inputs(CONFIG, seed=1),
    "all_to_one_rank": lambda: make_inputs(CONFIG, seed=2, how="all_to_one_rank"),
    "nobody_sends": lambda: make_inputs(CONFIG, seed=3, how="nobody_sends"),
    "first_part_is_empty": lambda: stays(make_inputs(CONFIG, seed=4), FIRST),
    "second_part_is_empty": lambda: stays(make_inputs(CONFIG, seed=5), SECOND),
    "all_to_all_ranks": lambda: everywhere(make_inputs(CONFIG, seed=6), slice(None)),
    "nearly_all": lambda: everywhere(make_inputs(CONFIG, seed=7), slice(100, None)),
    "nearly_all_and_some_stay": lambda: stays(
        everywhere(make_inputs(CONFIG, seed=8), slice(None)), slice(0, None, 9)
    ),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("program", [sample_programs.round_trip, sample_programs.round_trip_tokens])
def test_round_trips(program, routing):
    y = make_rows(CONFIG, sample_programs.num_rows(CONFIG, program), 6)
    for _ in range(3):
        support.check_same(CONFIG, program, *ROUTINGS[routing](), y)


@pytest.mark.parametrize("program", [sample_programs.round_trip, sample_programs.round_trip_tokens])
def test_round_trips_over_a_float8_wire(program):
    y = make_rows(QUANTISED, sample_programs.num_rows(QUANTISED, program), 7)
    support.check_same(QUANTISED, program, *make_inputs(QUANTISED, seed=8), y)


def gradients(api, x, topk_idx, weights, y):
    def loss(x, weights, y):
        return (sample_programs.layer(api, x, topk_idx, weights, y) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))(x, weights, y)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients(routing):
    y = make_rows(CONFIG, CONFIG.recv_capacity, 9)
    ours, theirs = support.runners(CONFIG, gradients)
    inputs = ROUTINGS[routing]()
    support.assert_close(ours(*inputs, y), theirs(*inputs, y))


@pytest.mark.parametrize("rank", range(CONFIG.ep_size))
def test_one_rank_sends_few_rows(rank):
    """Its sums come back whole, those of the others in parts."""
    x, topk_idx, weights = make_inputs(CONFIG, seed=10)
    topk_idx = topk_idx.copy()
    topk_idx[rank, 100:] = -1
    y = make_rows(CONFIG, CONFIG.recv_capacity, 11)
    support.check_same(CONFIG, sample_programs.round_trip, x, topk_idx, weights, y)
