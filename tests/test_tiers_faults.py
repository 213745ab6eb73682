"""Two tiers in which a rank fails or a value is used wrongly: faults name ranks and their nodes."""

from __future__ import annotations

import dataclasses
import functools
import time

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import layer_inputs
from support import make_config
from test_broken_rules import compile_own, open_own, send_before_recv
from test_faults import MARGIN_S, NOTHING, RAISE, TIMEOUT_S, act, act_between

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four ranks"),
]

# Two nodes of two ranks. Rank 3 is on node 1, and its rail peer is rank 1.
CONFIG = make_config(4, num_nodes=2, num_experts=8, timeout_s=TIMEOUT_S)
BAD_RANK = 3
LONG = dataclasses.replace(CONFIG, timeout_s=60.0)

PLACES = (
    "dispatch_send",
    "dispatch_forward",
    "dispatch_recv",
    "combine_send",
    "combine_forward",
    "combine_recv",
)


def layer(api, x, topk_idx, weights, y, actions):
    """`actions`: what this rank does before each of the PLACES."""
    buffer = api.buffer
    sent = buffer.dispatch_send(act(x, actions[0]), topk_idx, weights)
    sent = buffer.dispatch_forward(act_between(x, sent, actions[1]))
    recv = buffer.dispatch_recv(act_between(x, sent, actions[2]))
    rows = act(recv.x * y, actions[3])
    sent = buffer.combine_send(rows, recv.layout, recv.weights)
    sent = buffer.combine_forward(act_between(x, sent, actions[4]))
    return buffer.combine_recv(act_between(x, sent, actions[5]))


def actions_of(place=None, action=NOTHING):
    actions = np.zeros((CONFIG.ep_size, len(PLACES)), np.float32)
    if place is not None:
        actions[BAD_RANK, PLACES.index(place)] = action
    return actions


def assert_works_again(buffer, run, program, *inputs):
    """The run after a fault gives what it gave before."""
    want = support.runners(buffer.config, program)[1](*inputs)
    buffer, run = faulty_runs.go_on(buffer, run, functools.partial(compile_own, program))
    support.assert_same_bits(run(*inputs), want)
    buffer.check()


# ------------------------------------------------------------------------------ a rank that fails


# Where a rank fails, and who misses it first.
MISSED = {
    "dispatch_send": "dispatch_forward on rank 1 of node 0, peer rank 3 of node 1: .* from 1 ranks",
    # Rank 2 waits for rank 3. Later, rank 0 waits for what rank 2 makes of it.
    "dispatch_forward": "_recv on rank . of node ., peer rank [23] of node 1: .* from . ranks",
    "dispatch_recv": "combine_forward on rank 2 of node 1, peer rank 3 of node 1: .* from 2 ranks",
    "combine_send": "combine_forward on rank 2 of node 1, peer rank 3 of node 1: .* from 2 ranks",
    "combine_forward": "combine_recv on rank 1 of node 0, peer rank 3 of node 1: .* from 3 ranks",
}


@pytest.mark.parametrize("action", ["raises", "stalls"])
@pytest.mark.parametrize("place", MISSED)
def test_a_rank_that_does_not_go_on(place, action):
    seconds = RAISE if action == "raises" else TIMEOUT_S + 1.5
    inputs = layer_inputs(CONFIG)
    with open_own(CONFIG) as buffer:
        run = compile_own(layer, buffer)
        jax.block_until_ready(run(*inputs, actions_of()))
        start = time.monotonic()
        errors = faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of(place, seconds))
        # Less than the timeout if another process began to wait earlier, and so ended this one.
        assert TIMEOUT_S - 0.5 < time.monotonic() - start < TIMEOUT_S + MARGIN_S
        support.assert_matches(errors[1], MISSED[place], rf"within {TIMEOUT_S:g} s")
        support.assert_matches(faulty_runs.fault_of(buffer), MISSED[place])
        if action == "raises":
            support.assert_matches(errors[BAD_RANK], "this rank died")
        assert_works_again(buffer, run, layer, *inputs, actions_of())


def test_a_rank_that_raises_when_it_has_forwarded_is_not_missed():
    inputs = layer_inputs(CONFIG)
    with open_own(CONFIG) as buffer:
        run = compile_own(layer, buffer)
        want = support.whole(run(*inputs, actions_of()))
        errors = faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of("combine_recv", RAISE))
        assert errors[:BAD_RANK] == [None] * BAD_RANK
        support.assert_matches(errors[BAD_RANK], "this rank died")
        buffer.check()
        support.assert_same_bits(run(*inputs, actions_of()), want)


def test_a_rank_that_forwards_late_is_waited_for():
    inputs = layer_inputs(LONG)
    ours, theirs = support.runners(LONG, layer)
    late = actions_of("dispatch_forward", 1.0)
    support.assert_same_bits(ours(*inputs, late), theirs(*inputs, actions_of()))


@pytest.mark.parametrize("rank", [0, 3])
def test_an_index_out_of_range(rank):
    x, topk_idx, *rest = layer_inputs(LONG)
    wrong = topk_idx.copy()
    wrong[rank, 2, 1] = 100
    expected = (
        rf"dispatch_send on rank {rank} of node {rank // 2}: "
        r"expected topk_idx in \[-1, 8\), seen 100 at token 2, k 1"
    )
    with open_own(LONG) as buffer:
        run = compile_own(layer, buffer)
        for error in faulty_runs.errors_by_rank(buffer, run, x, wrong, *rest, actions_of()):
            support.assert_matches(error, expected)
        support.assert_matches(faulty_runs.fault_of(buffer), expected)
        assert_works_again(buffer, run, layer, x, topk_idx, *rest, actions_of())


# ------------------------------------------------------------------------- values used wrongly


def forwarded_twice(api, x, topk_idx, weights, y):
    """The first sent value is used again, which tracing does not see."""
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    first, second = (api.buffer.dispatch_forward(sent) for _ in range(2))
    return api.buffer.dispatch_recv(first).x, api.buffer.dispatch_recv(second).x


def not_forwarded(api, x, topk_idx, weights, y):
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    return api.buffer.dispatch_recv(dataclasses.replace(sent, forwarded=True)).x


def combine_not_forwarded(api, x, topk_idx, weights, y):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    sent = api.buffer.combine_send(y, recv.layout)
    return api.buffer.combine_recv(dataclasses.replace(sent, forwarded=True))


def forward_of_another_op(api, x, topk_idx, weights, y):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    dispatch = api.buffer.dispatch_send(x, topk_idx, weights)
    combine = api.buffer.combine_send(y, recv.layout)
    sent = dataclasses.replace(combine, token=dispatch.token)
    return api.buffer.combine_recv(api.buffer.combine_forward(sent))


def tokens_added(api, x, topk_idx, weights, y):
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    sent = dataclasses.replace(sent, token=sent.token + sent.token)
    return api.buffer.dispatch_recv(api.buffer.dispatch_forward(sent)).x


def routing_of_nobody(api, x, topk_idx, weights, y):
    """The rails of a dispatch have rows, and the combine says that they have none."""
    recv = api.buffer.dispatch(x, topk_idx, weights)
    layout = dataclasses.replace(recv.layout, node_topk=0 * recv.layout.node_topk - 1)
    return api.buffer.combine(y, layout)


def routing_out_of_range(api, x, topk_idx, weights, y):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    node_topk = jnp.where(recv.layout.node_topk < 0, -1, 1000)
    return api.buffer.combine(y, dataclasses.replace(recv.layout, node_topk=node_topk))


def index_out_of_range_in_a_recv(api, x, topk_idx, weights, y):
    """Not in that of the send."""
    recv = api.buffer.dispatch(x, topk_idx, weights)
    wrong = recv.layout.topk_idx.at[0, 0].set(CONFIG.num_experts)
    return api.buffer.combine(y, dataclasses.replace(recv.layout, topk_idx=wrong))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            forwarded_twice,
            "dispatch_forward .*: expected one forward of each exchange, seen a second",
        ),
        (
            not_forwarded,
            "dispatch_recv on rank . of node .: expected the token of a forward, because the "
            "buffer has several nodes, seen exchange .* sent and not forwarded",
        ),
        (combine_not_forwarded, "combine_recv .*: expected the token of a forward"),
        (
            forward_of_another_op,
            "combine_forward .*: expected a combine token, seen a dispatch token",
        ),
        (tokens_added, "dispatch_forward .*: .* seen the sum of 2 tokens"),
        (
            routing_of_nobody,
            "combine_forward on rank . of node ., peer rank . of node .: expected 0 rows of 28 ",
        ),
        (routing_out_of_range, r"combine_forward on rank . of node .: .*\[-1, 4\), seen 1000"),
        (index_out_of_range_in_a_recv, r"combine_recv on rank . of node .: .*\[-1, 8\), seen 8"),
        (
            functools.partial(send_before_recv, CONFIG.num_slots + 1),
            r"dispatch_send on rank . of node .: expected at most 2 dispatch exchanges in flight",
        ),
    ],
)
def test_a_value_that_is_used_wrongly(program, expected):
    inputs = layer_inputs(LONG)
    with open_own(LONG) as buffer:
        bad = compile_own(program, buffer)
        support.assert_matches(faulty_runs.run_into_fault(bad, *inputs), expected)
        support.assert_matches(faulty_runs.fault_of(buffer), expected)
        good = compile_own(layer, buffer)
        assert_works_again(buffer, good, layer, *inputs, actions_of())
