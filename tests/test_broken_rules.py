"""A value that is sent and never received, or with a wrong token, is a fault and no hang."""

from __future__ import annotations

import dataclasses
import functools

import faulty_runs
import jax
import jax.numpy as jnp
import pytest
import sample_inputs
import support
from sample_programs import after, layer
from support import make_config

import jax_sm_free as smf

CONFIG = make_config(num_experts=2 * support.SOME_RANKS)


@pytest.fixture
def inputs():
    return sample_inputs.layer_inputs(CONFIG)


def test_one_slot_is_enough_for_one_at_a_time(inputs):
    config = dataclasses.replace(CONFIG, num_slots=1)
    ours, theirs = support.runners(config, layer)
    want = theirs(*inputs)
    for _ in range(20):  # each recv stands right behind its send
        support.assert_same_bits(ours(*inputs), want)


def send_before_recv(num_sends, api, x, topk_idx, weights, y):
    del y
    sents = []
    for _ in range(num_sends):
        sents.append(api.buffer.dispatch_send(x, topk_idx, weights))
        x, sents[-1] = after(x, sents[-1])
    tokens = jnp.stack([sent.token for sent in sents])
    total = jnp.zeros_like(x[0, 0])
    everyone = 0 * tokens.sum()  # a sum, because XLA sees through a slice of a stack
    for sent in sents:  # each recv needs all tokens
        recv = api.buffer.dispatch_recv(dataclasses.replace(sent, token=sent.token + everyone))
        total += recv.x.sum()
    return total


def open_own(config=CONFIG, **changes):
    """A buffer that a test may break."""
    return support.open_buffer(dataclasses.replace(config, **changes))


def compile_own(program, buffer):
    return support.on_ranks(functools.partial(program, support.Api(buffer, smf)), buffer.mesh)


def test_more_sends_than_slots_without_a_recv_are_a_fault(inputs):
    with open_own() as buffer:
        # Kinds share the slots on GPUs.
        which = "dispatch exchanges" if support.ON_CPU else "exchanges"
        expected = (
            r"dispatch_send on rank \d",
            rf"expected at most 2 {which} in flight \(num_slots\)",
            "seen one send more without a recv",
        )
        bad = compile_own(functools.partial(send_before_recv, 3), buffer)
        support.assert_matches(faulty_runs.run_into_fault(bad, *inputs), *expected)
        support.assert_matches(faulty_runs.fault_of(buffer), *expected)
        compile_good = functools.partial(compile_own, functools.partial(send_before_recv, 2))
        buffer, good = faulty_runs.go_on(buffer, compile_good(buffer), compile_good)
        jax.block_until_ready(good(*inputs))
        buffer.check()


def received_twice(api, x, topk_idx, weights, y):
    del y
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    return api.buffer.dispatch_recv(sent).x, api.buffer.dispatch_recv(sent).x


def received_twice_with_gradient(api, x, *rest):
    return jax.grad(lambda x: sum(part.sum() for part in received_twice(api, x, *rest)))(x)


def tokens_added(api, x, topk_idx, weights, y):
    """Autodiff adds two cotangents of one token like this."""
    del y
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    return api.buffer.dispatch_recv(dataclasses.replace(sent, token=sent.token + sent.token)).x


def no_token(api, x, topk_idx, weights, y):
    del y
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    return api.buffer.dispatch_recv(dataclasses.replace(sent, token=sent.token * 0.3)).x


def token_of_another_rank(api, x, topk_idx, weights, y):
    del y
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    # No rank comes to its fault before all have sent and have what they need of each other.
    tokens = jax.lax.all_gather(sent.token, "ep")
    token = tokens[(jax.lax.axis_index("ep") + 1) % support.SOME_RANKS]
    return api.buffer.dispatch_recv(dataclasses.replace(sent, token=token)).x


def token_of_another_op(api, x, topk_idx, weights, y):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    combine = api.buffer.combine_send(y, recv.layout)
    dispatch = api.buffer.dispatch_send(x, topk_idx, weights)
    return api.buffer.combine_recv(dataclasses.replace(combine, token=dispatch.token))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (received_twice, "expected the token of a send not yet received, seen .* received before"),
        (received_twice_with_gradient, "seen .* received before"),
        (tokens_added, "seen the sum of 2 tokens: a sent value was used more than once"),
        (no_token, "expected the token of one send, seen an array that no send returned"),
        (token_of_another_op, "expected a combine token, seen a dispatch token"),
        pytest.param(
            token_of_another_rank,
            r"expected a token of buffer \d+, rank \d, seen one of buffer \d+, rank \d",
            marks=pytest.mark.skipif(support.MAX_RANKS == 1, reason="one rank"),
        ),
    ],
)
def test_a_token_that_is_not_its_sends_alone_is_a_fault(program, expected, inputs):
    """Used twice, added up, made up, another rank's, another op's; the next run is right."""
    with open_own() as buffer:
        bad = compile_own(program, buffer)
        support.assert_matches(
            faulty_runs.run_into_fault(bad, *inputs), expected, r"_recv on rank \d"
        )
        support.assert_matches(faulty_runs.fault_of(buffer), expected)
        _, theirs = support.runners(CONFIG, layer)
        compile_layer = functools.partial(compile_own, layer)
        buffer, good = faulty_runs.go_on(buffer, compile_layer(buffer), compile_layer)
        support.assert_same_bits(good(*inputs), theirs(*inputs))


def never_received(api, x, topk_idx, weights, y):
    del y
    return x + 0 * api.buffer.dispatch_send(x, topk_idx, weights).token[0]


@pytest.mark.skipif(not support.BUFFERS_GO_ON, reason="takes a buffer that goes on after faults")
def test_sent_and_never_received(inputs):
    """No hang; runs go on; when it goes on and on, a fault says so, and memory does not grow.

    On CPU runs have slots of their own. On GPUs they share them: see test_gpu.py.
    """
    with open_own() as buffer:
        leaky, good = compile_own(never_received, buffer), compile_own(layer, buffer)
        want = good(*inputs)
        rounds, taken = [], []
        for _ in range(3):
            for i in range(1000):
                try:
                    jax.block_until_ready(leaky(*inputs))
                except faulty_runs.RUN_ERROR as error:
                    support.assert_matches(str(error), "expected every sent value to be received")
                    support.assert_matches(
                        faulty_runs.fault_of(buffer), "a sent value that never was"
                    )
                    rounds.append(i)
                    break
            support.assert_same_bits(good(*inputs), want)
            taken.append(buffer.message_bytes(jax.devices()[0]))
        assert len(rounds) == 3
        assert min(rounds) >= 8
        assert taken[2] <= taken[0] + taken[0] // 4, taken
