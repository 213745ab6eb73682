"""Memory: what a rank's messages take, against what was promised beforehand."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from support import make_config

import jax_sm_free as smf

CONFIG = make_config(hidden=64, num_experts=2 * support.SOME_RANKS, top_k=support.SOME_RANKS)


def worst_case(config):
    """Every token to every rank."""
    x = sample_inputs.make_rows(config, config.max_tokens, 0)
    topk_idx = np.arange(config.top_k, dtype=np.int32) * config.num_local_experts
    topk_idx = np.broadcast_to(topk_idx, (*x.shape[:2], config.top_k))
    return x, topk_idx, np.ones(topk_idx.shape, np.float32)


# On CPU blocks are taken as messages are sent; on GPUs all memory is taken when a buffer opens.


def all_slots_in_flight(api, x, topk_idx, weights):
    """As many sends as there are slots, on every rank, before any recv."""
    config = api.buffer.config
    sents = []
    for _ in range(config.num_slots):
        sents.append(api.buffer.dispatch_send(x, topk_idx, weights))
        x, sents[-1] = sample_programs.after(x, sents[-1])
    tokens = jnp.stack([sent.token for sent in sents])
    everyone_sent = jax.lax.psum(tokens.sum(), "ep") * 0
    total = everyone_sent
    for sent, token in zip(sents, tokens, strict=True):
        recv = api.buffer.dispatch_recv(dataclasses.replace(sent, token=token + everyone_sent))
        total += recv.x.sum()
    return total


def message_bytes(buffer):
    return [buffer.message_bytes(device) for device in buffer.mesh.devices.flat]


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_messages_take_what_was_estimated(num_slots):
    """All tokens to all ranks and all slots taken: within 10 % of estimate_memory, on each rank."""
    config = dataclasses.replace(CONFIG, num_slots=num_slots)
    estimate = smf.estimate_memory(config).messages
    with support.open_buffer(config) as buffer:
        assert message_bytes(buffer) == [0] * config.ep_size
        program = functools.partial(all_slots_in_flight, support.Api(buffer, smf))
        run = support.on_ranks(program, buffer.mesh)
        for _ in range(3):
            jax.block_until_ready(run(*worst_case(config)))
        for taken in message_bytes(buffer):
            assert 0.9 * estimate <= taken <= 1.1 * estimate


def train_step(api, x, topk_idx, weights):
    def loss(x, weights):
        recv = api.buffer.dispatch(x, topk_idx, weights)
        out = api.buffer.combine(jnp.tanh(recv.x), recv.layout, weights=recv.weights)
        return (out**2).sum()

    return jax.grad(loss, (0, 1))(x, weights)


@pytest.mark.cpu_only
def test_messages_do_not_grow_over_a_hundred_steps():
    """Forward and backward, routing that changes: blocks are used again."""
    with support.open_buffer(CONFIG) as buffer:
        program = functools.partial(train_step, support.Api(buffer, smf))
        run = support.on_ranks(program, buffer.mesh)
        estimate = smf.estimate_memory(CONFIG).messages
        for step in range(100):
            routing = sample_inputs.make_routing(CONFIG, CONFIG.max_tokens, step)
            inputs = worst_case(CONFIG) if step == 0 else (worst_case(CONFIG)[0], *routing)
            jax.block_until_ready(run(*inputs))
        assert max(message_bytes(buffer)) <= estimate


@pytest.mark.gpu_only
@pytest.mark.parametrize("num_slots", [1, 3])
def test_gpus_take_what_was_estimated(num_slots):
    """All at once; pages, signals and routing scratch beside the messages are within 10 %."""
    config = dataclasses.replace(CONFIG, num_slots=num_slots, max_tokens=1024, hidden=2048)
    estimate = smf.estimate_memory(config)
    with support.open_buffer(config) as buffer:
        for taken in message_bytes(buffer):
            assert estimate.total - estimate.recv <= taken <= 1.1 * (estimate.total - estimate.recv)


def test_message_bytes_are_those_of_the_native_layout():
    """Python and C++ compute these sizes apart, and must agree whatever the sizes are."""
    from jax_sm_free import _cpu

    sizes = itertools.product((1, 8), (1, 7, 7168), (8, 256), (1, 8, 32), (1, 63, 4096))
    for ep_size, hidden, num_experts, top_k, max_tokens in sizes:
        for dtype, num_nodes in ((jnp.bfloat16, 1), (jnp.float32, min(2, ep_size))):
            config = make_config(
                ep_size,
                num_nodes=num_nodes,
                hidden=hidden,
                num_experts=num_experts,
                top_k=top_k,
                max_tokens=max_tokens,
                dtype=dtype,
            )
            assert _cpu.max_message_bytes(config.sizes()) == config.message_bytes, config
            rail = _cpu.max_rail_message_bytes(config.sizes())
            assert rail == config.rail_message_bytes, config


def test_estimates_are_of_a_config():
    for estimate in (smf.estimate_memory, smf.get_rdma_size_hint):
        with pytest.raises(TypeError, match=f"{estimate.__name__}: expected a Config, got dict"):
            estimate({})


def test_estimates_of_a_large_configuration():
    """The sizes of the README, by hand: 4096 tokens x 7168 bfloat16, top-8 of 256 on 8 ranks."""
    config = smf.Config(
        ep_size=8, hidden=7168, num_experts=256, top_k=8, max_tokens=4096, recv_capacity=40000
    )
    rows = 4096 * 7168 * 2
    message = rows + 3 * 4096 * 8 * 4 + 4096 * 4 + 32 * 4 + 64
    assert config.message_bytes == message
    estimate = smf.estimate_memory(config)
    assert estimate.messages == 2 * 8 * message
    assert smf.get_rdma_size_hint(config) == 2 * 7 * message
    received = 40000 * (7168 * 2 + 4) + (2 * 32 + 1) * 4 + (8 * 4096 * 8 + 8) * 4
    assert estimate.stage == 2 * 7 * message
    assert estimate.recv == received
    assert estimate.total == estimate.messages + estimate.stage + estimate.recv


def test_estimates_of_several_nodes():
    """The same by hand for 4 nodes of 8 ranks: what crosses NICs is 0.355 GB for each slot."""
    config = smf.Config(
        ep_size=32,
        num_nodes=4,
        hidden=7168,
        num_experts=256,
        top_k=8,
        max_tokens=4096,
        recv_capacity=40000,
    )
    one_node = dataclasses.replace(config, num_nodes=1)
    rail = 4096 * 7168 * 2 + 3 * 4096 * 8 * 4 + 4096 * 4 + 64 * 4 + 64
    assert config.rail_message_bytes == rail
    assert config.message_bytes == one_node.message_bytes
    assert smf.get_rdma_size_hint(config) == 2 * 2 * 3 * rail
    assert smf.get_rdma_size_hint(config) / 2 < 0.37e9
    more, flat = smf.estimate_memory(config), smf.estimate_memory(one_node)
    assert more.messages - flat.messages == 2 * 3 * rail
    assert more.stage == flat.stage
    assert more.recv - flat.recv == 4 * 4 * 4096 * 8


def test_results_take_what_was_estimated():
    """XLA's own account of a compiled dispatch, against estimate_memory(...).recv."""
    config = dataclasses.replace(CONFIG, recv_capacity=200, max_tokens=32)
    with support.open_buffer(config) as buffer:

        def program(x, topk_idx, weights):
            recv = buffer.dispatch(x, topk_idx, weights)
            layout = dataclasses.replace(recv.layout, topk_idx=jnp.zeros((), jnp.int32))
            return dataclasses.replace(recv, layout=layout)

        run = support.on_ranks(program, buffer.mesh)
        memory = run.lower(*worst_case(config)).compile().memory_analysis()
    estimate = smf.estimate_memory(config).recv
    assert estimate <= memory.output_size_in_bytes <= 1.1 * estimate
