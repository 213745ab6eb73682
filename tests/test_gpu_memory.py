"""Memory of GPUs: what was left in it, and regions of many GiB."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_programs
import support
from sample_inputs import make_inputs, make_rows
from support import make_config

import jax_sm_free as smf

pytestmark = pytest.mark.gpu_only

CONFIG = make_config(support.MAX_RANKS, num_experts=2 * support.MAX_RANKS, hidden=64, max_tokens=32)


def compiled(buffer, program):
    return support.on_ranks(functools.partial(program, support.Api(buffer, smf)), buffer.mesh)


def test_memory_that_held_nan_does_not_leak():
    """Of arrays that were freed, and of a buffer that was closed."""
    config = dataclasses.replace(CONFIG, expert_alignment=16)
    y = make_rows(config, config.recv_capacity, 5)
    with support.open_buffer(config) as buffer:
        full = make_inputs(config, seed=6, how="all_to_one_expert")
        run = compiled(buffer, sample_programs.round_trip)
        jax.block_until_ready(run(full[0] * np.nan, *full[1:], y * np.nan))
    for device in jax.devices()[: config.ep_size]:
        filled = [
            jax.device_put(jnp.full(2**size, jnp.nan), device) for size in (10, 14, 18, 22, 26)
        ]
        jax.block_until_ready(filled)
        del filled
    with support.open_buffer(config) as buffer:
        run = compiled(buffer, sample_programs.round_trip)
        for seed in range(5):
            sparse = make_inputs(config, seed=seed, how="some_tokens_go_nowhere")
            recv, out = run(*sparse, y)
            want = support.runners(config, sample_programs.round_trip)[1](*sparse, y)
            support.assert_same_bits((recv, out), want)
            assert np.isfinite(recv.x).all()
            assert np.isfinite(out).all()


@pytest.mark.parametrize("gib", [2, 4])
def test_messages_past_two_and_four_gib(gib):
    """Byte offsets past 2**31 and 2**32 in one message, and so in every region; ranks in a ring."""
    ep_size = min(2, support.MAX_RANKS)
    config = make_config(
        ep_size,
        hidden=8192,
        num_experts=2 * ep_size,
        top_k=1,
        max_tokens=33000 * gib,
        recv_capacity=33000 * gib,
        num_slots=1,
    )
    assert config.message_bytes > gib * 2**30
    rank, token = np.indices((ep_size, config.max_tokens))
    topk_idx = (2 * ((rank + 1) % ep_size) + (token % 3 > 0)).astype(np.int32)[..., None]
    weights = np.full(topk_idx.shape, 0.5, np.float32)
    with support.open_buffer(config) as buffer:
        run = compiled(buffer, sample_programs.big_round_trip)
        ends, counts, out = jax.device_get(run(topk_idx, weights))
        buffer.check()
    numbers = sample_programs.row_numbers(config)
    first, second = numbers[:, ::3], numbers[token % 3 > 0].reshape(ep_size, -1)
    received = np.roll(np.concatenate([first, second], axis=1), 1, axis=0)
    np.testing.assert_array_equal(ends, np.stack([received, received], axis=2))
    np.testing.assert_array_equal(counts, [[first.shape[1], second.shape[1]]] * ep_size)
    np.testing.assert_array_equal(out, np.stack([numbers, numbers], axis=2) / 2)
