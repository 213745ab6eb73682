"""Exchanges in flight: which may be, in which order they end, and how long they may take."""

from __future__ import annotations

import dataclasses
import functools
import time

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from sample_programs import after, layer
from support import make_config

import jax_sm_free as smf

CONFIG = make_config(num_experts=2 * support.SOME_RANKS)


@pytest.fixture
def inputs():
    return sample_inputs.layer_inputs(CONFIG)


# ------------------------------------------------------------------------------- several in flight


def two_in_flight(first_sent_ends_first, api, x, topk_idx, weights, y):
    del y
    buffer = api.buffer
    one = buffer.dispatch_send(x, topk_idx, weights)
    x2, one = after(x + 1, one)
    two = buffer.dispatch_send(x2, topk_idx[::-1], weights)
    first, second = (one, two) if first_sent_ends_first else (two, one)
    first = buffer.dispatch_recv(first)
    received, second = after(first.x, second)
    return received, first, buffer.dispatch_recv(second)


first_ends_first = functools.partial(two_in_flight, True)
first_ends_last = functools.partial(two_in_flight, False)


@pytest.mark.parametrize("program", [first_ends_first, first_ends_last])
def test_two_in_flight_end_in_either_order(program, inputs):
    support.check_same(CONFIG, program, *inputs)


def unrolled_scan_gradient(unroll, api, x, topk_idx, weights, y):
    """Of a scan under checkpoint: each layer needs the result of the one before it."""

    def one_layer(x, scale):
        return x + scale * layer(api, x, topk_idx, weights, y), None

    def loss(x):
        scales = jnp.linspace(0.1, 0.2, 2 * unroll)
        return (jax.lax.scan(jax.checkpoint(one_layer), x, scales, unroll=unroll)[0] ** 2).sum()

    return jax.grad(loss)(x)


@pytest.mark.cpu_only
def test_an_unrolled_scan_under_checkpoint_takes_as_many_slots(inputs):
    """Its backward pass repeats the layers of one step from carries that are there: at once.

    With fewer slots it may get by, as XLA's threads have it.
    """
    unroll = 3
    program = functools.partial(unrolled_scan_gradient, unroll)
    with support.open_buffer(dataclasses.replace(CONFIG, num_slots=unroll - 1)) as buffer:
        run = support.on_ranks(functools.partial(program, support.Api(buffer, smf)), buffer.mesh)
        try:
            jax.block_until_ready(run(*inputs))
        except faulty_runs.RUN_ERROR as error:
            texts = ("expected at most 2 dispatch exchanges", "scan with unroll=n")
            support.assert_matches(str(error), *texts)
    ours, theirs = support.runners(dataclasses.replace(CONFIG, num_slots=unroll), program)
    support.assert_close(ours(*inputs), theirs(*inputs), 1e-4)


def dispatch_beside_combine(api, x, topk_idx, weights, y):
    buffer = api.buffer
    a = buffer.dispatch(x, topk_idx, weights)
    combine_a = buffer.combine_send(a.x * y, a.layout, a.weights)
    x_b, combine_a = after(x + 1, combine_a)
    dispatch_b = buffer.dispatch_send(x_b, topk_idx[::-1], weights)
    out_a = buffer.combine_recv(combine_a)
    out_a, dispatch_b = after(out_a, dispatch_b)
    b = buffer.dispatch_recv(dispatch_b)
    return out_a, buffer.combine(b.x * y, b.layout, weights=b.weights)


def test_dispatch_of_one_layer_beside_combine_of_another(inputs):
    support.check_same(CONFIG, dispatch_beside_combine, *inputs)


def two_layers_without_an_edge(api, *inputs):
    x, *rest = inputs
    return layer(api, x, *rest), layer(api, x + 1, *rest), layer(api, x, *rest)


def one_inner_jit_for_two_layers(api, x, *rest):
    inner = jax.jit(functools.partial(layer, api))
    return inner(x, *rest), inner(x + 1, *rest)


THREE_SLOTS = dataclasses.replace(CONFIG, num_slots=3)


@pytest.mark.parametrize(
    ("program", "num_layers"), [(two_layers_without_an_edge, 3), (one_inner_jit_for_two_layers, 2)]
)
def test_equal_layers_without_a_data_edge(program, num_layers, inputs):
    """Equal layers are not merged or mixed up, in whatever order the ranks run them."""
    ours, theirs = support.runners(THREE_SLOTS, program)
    want = theirs(*inputs)
    for _ in range(20):
        support.assert_same_bits(ours(*inputs), want)
    compiled = ours.lower(*inputs).compile().as_text()
    for op in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv"):
        assert compiled.count(f'custom_call_target="smf_{op}"') == num_layers


def loop_invariant(api, x, *rest):
    """A layer in a loop that computes the same in every round."""
    return jax.lax.scan(lambda c, _: (c, layer(api, x, *rest)), 0, None, length=3)[1]


def test_a_layer_that_does_not_depend_on_its_loop_stays_in_it(inputs):
    ours, theirs = support.runners(CONFIG, loop_invariant)
    support.assert_same_bits(ours(*inputs), theirs(*inputs))
    body = ours.lower(*inputs).compile().as_text().split("ENTRY ")[0]
    for op in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv"):
        assert body.count(f'custom_call_target="smf_{op}"') == 1


def two_layers_in_any_order(api, x, topk_idx, weights, y, first_late, second_late):
    """The ranks come to two layers without a data edge in different orders."""
    one = wait(x, first_late)
    two = wait(x + 1, second_late)
    return layer(api, one, topk_idx, weights, y), layer(api, two, topk_idx, weights, y)


def test_ranks_reach_two_layers_in_different_orders(inputs):
    late = np.zeros((2, support.SOME_RANKS), np.float32)
    late[np.arange(support.SOME_RANKS) % 2, np.arange(support.SOME_RANKS)] = 0.05
    for first, second in (late, late[::-1]):
        support.check_same(CONFIG, two_layers_in_any_order, *inputs, first, second)


def forward_beside_backward(api, x, *rest):
    """The gradient of one layer and the value of another: no edge between any of their calls.

    Nor is there one between the first layer's forward dispatch and its backward combine, whose
    cotangent is a constant: three may be in flight.
    """
    grad = jax.grad(lambda x: layer(api, x, *rest).sum())(x)
    return grad, layer(api, x + 1, *rest)


def test_forward_and_backward_interleaved(inputs):
    ours, theirs = support.runners(THREE_SLOTS, forward_beside_backward)
    want = theirs(*inputs)
    for _ in range(10):
        support.assert_close(ours(*inputs), want)


def pipelined(api, x, topk_idx, weights, y):
    """A scan whose carry is on its way: iteration i receives what iteration i - 1 sent."""
    buffer = api.buffer

    def step(sent, factor):
        following = buffer.dispatch_send(x * factor, topk_idx, weights)
        recv = buffer.dispatch_recv(sent)
        return following, (recv.x * y).sum(axis=1)

    first = buffer.dispatch_send(x, topk_idx, weights)
    last, sums = jax.lax.scan(step, first, jnp.arange(2.0, 6.0))
    return sums, buffer.dispatch_recv(last)


def test_a_sent_value_travels_through_a_scan(inputs):
    (sums, _), want = (run(*inputs) for run in support.runners(CONFIG, pipelined))
    support.assert_close(sums, want[0])
    got = support.runners(CONFIG, pipelined)[0](*inputs)[1]
    support.assert_same_bits(got, want[1])


def slow_dispatch(api, x, topk_idx, weights, seconds):
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    return api.buffer.dispatch_recv(wait_between(x, sent, seconds))


def test_runs_in_flight_at_once(inputs):
    """Where the platform lets them, quick ranks are a run ahead of a slow one."""
    x, topk_idx, weights, _ = inputs
    waits = np.zeros(support.SOME_RANKS, np.float32)
    waits[-1] = 0.05
    ours, theirs = support.runners(CONFIG, slow_dispatch)
    xs = [x + i for i in range(8)]
    got = [ours(x, topk_idx, weights, waits) for x in xs]
    for i, x in enumerate(xs):
        support.assert_same_bits(got[i], theirs(x, topk_idx, weights, 0 * waits))


# -------------------------------------------------------------------------------------------- time


def wait(x, seconds):
    def on_host(x, seconds):
        time.sleep(float(seconds))
        return np.asarray(x)

    return jax.pure_callback(on_host, jax.typeof(x), x, seconds)


def wait_between(x, sent, seconds):
    """Sleeps after the send and before the recv."""
    x, _ = after(x, sent)
    return after(wait(x, seconds), sent)[1]


def layer_with_waits(api, x, topk_idx, weights, y, before_send, before_recv, before_combine):
    """Seconds that this rank sleeps in three places."""
    buffer = api.buffer
    sent = buffer.dispatch_send(wait(x, before_send), topk_idx, weights)
    recv = buffer.dispatch_recv(wait_between(x, sent, before_recv))
    sent = buffer.combine_send(recv.x * y, recv.layout, recv.weights)
    return buffer.combine_recv(wait_between(x, sent, before_combine))


@pytest.mark.parametrize("milliseconds", [0, 1, 10, 100])
@pytest.mark.parametrize("all_ranks", [False, True])
def test_delay_between_send_and_recv(milliseconds, all_ranks, inputs):
    waits = np.zeros((3, support.SOME_RANKS), np.float32)
    waits[1:, slice(None) if all_ranks else -1] = milliseconds / 1000
    support.check_same(CONFIG, layer_with_waits, *inputs, *waits)


def test_one_rank_late_by_seconds(inputs):
    waits = np.zeros((3, support.SOME_RANKS), np.float32)
    ours, theirs = support.runners(CONFIG, layer_with_waits)
    jax.block_until_ready(ours(*inputs, *waits))
    waits[0, 0] = 2.0
    start = time.monotonic()
    got = jax.block_until_ready(ours(*inputs, *waits))
    # Less than 2 s if the process of the late rank began its run before this process did.
    assert time.monotonic() - start > 1.0
    support.assert_same_bits(got, theirs(*inputs, *0 * waits))


# ---------------------------------------------------------------------------------- other programs


def overwritten_source(api, x, topk_idx, weights, y):
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    x, _ = after(x, sent)
    other, sent = after(x * 0 - 1, sent)
    return other, (api.buffer.dispatch_recv(sent).x * y).sum(axis=1)


def test_source_overwritten_after_send(inputs):
    """The donated argument's memory is the first result's, written before the recv."""
    x, *rest = inputs
    api, _ = support.apis(CONFIG)
    program = functools.partial(overwritten_source, api)
    run = jax.jit(support.unjitted_on_ranks(program, api.buffer.mesh), donate_argnums=0)
    want = support.runners(CONFIG, overwritten_source)[1](*inputs)
    sharding = jax.sharding.NamedSharding(api.buffer.mesh, support.P("ep"))
    for _ in range(5):
        donated = jax.device_put(x, sharding)
        got = support.whole(run(donated, *rest))
        assert donated.is_deleted()
        support.assert_same_bits(got[0], want[0])
        support.assert_close(got[1], want[1])


@support.needs_empty_inputs  # These rows have no scales.
def test_without_jit(inputs):
    """shard_map that runs operation by operation: each call is a program of its own."""
    api, _ = support.apis(CONFIG)
    run = support.unjitted_on_ranks(functools.partial(layer, api), api.buffer.mesh)
    got = support.whole(run(*inputs))
    support.assert_same_bits(got, support.runners(CONFIG, layer)[1](*inputs))


def test_sent_by_one_program_and_received_by_another(inputs):
    x, topk_idx, weights, _ = inputs
    api, _ = support.apis(THREE_SLOTS)
    send = support.on_ranks(api.buffer.dispatch_send, api.buffer.mesh)
    recv = support.on_ranks(api.buffer.dispatch_recv, api.buffer.mesh)
    want = support.runners(THREE_SLOTS, sample_programs.round_trip)[1](*inputs)[0]
    sents = [send(x, topk_idx, weights) for _ in range(3)]
    for sent in reversed(sents):
        support.assert_same_bits(recv(sent), want)


def hook_mode(api, x, topk_idx, weights, y):
    buffer = api.buffer
    hook = buffer.dispatch(x, topk_idx, weights, return_recv_hook=True)
    shared, hook = api.overlap(hook, lambda x: jnp.tanh(x), x)
    recv = hook()
    hook = buffer.combine(recv.x * y, recv.layout, weights=recv.weights, return_recv_hook=True)
    more, hook = api.overlap(hook, lambda x, s: {"sum": x + s}, shared, x)
    return recv, hook(), more


def test_hook_mode(inputs):
    support.check_same(CONFIG, hook_mode, *inputs)


def hook_used_twice(api, x, topk_idx, weights, y):
    del y
    hook = api.buffer.dispatch(x, topk_idx, weights, return_recv_hook=True)
    return hook().x, hook().x


def hook_used_after_overlap(api, x, topk_idx, weights, y):
    del y
    hook = api.buffer.dispatch(x, topk_idx, weights, return_recv_hook=True)
    shared, _ = api.overlap(hook, lambda x: x, x)
    return shared, hook().x


@pytest.mark.parametrize("program", [hook_used_twice, hook_used_after_overlap])
def test_a_hook_used_twice_raises_at_trace_time(program, inputs):
    api, _ = support.apis(CONFIG)
    run = support.on_ranks(functools.partial(program, api), api.buffer.mesh)
    with pytest.raises(RuntimeError, match="expected a receive hook to be used once"):
        run.lower(*inputs)
