"""What only GPUs can show: a rank held up by compute, work queued ahead, collectives beside."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from sample_inputs import make_rows
from sample_programs import layer
from support import make_config

import jax_sm_free as smf

pytestmark = pytest.mark.gpu_only
needs_two = pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two ranks")

CONFIG = make_config(support.MAX_RANKS, num_experts=2 * support.MAX_RANKS, hidden=64, max_tokens=32)
LATE_RANK = support.MAX_RANKS - 1


@pytest.fixture
def inputs():
    return sample_inputs.layer_inputs(CONFIG)


def compiled(buffer, program=layer):
    return support.on_ranks(functools.partial(program, support.Api(buffer, smf)), buffer.mesh)


@functools.cache
def expected_output():
    inputs = sample_inputs.layer_inputs(CONFIG)
    return support.runners(CONFIG, layer)[1](*inputs)


# ------------------------------------------------------------------------------- time on one GPU


def multiply(value, times, size):
    """`value`, finite, after so many products of square matrices."""
    matrix = jnp.full((size, size), 1 / size, jnp.bfloat16) + (0 * value).astype(jnp.bfloat16)
    matrix = jax.lax.fori_loop(0, times, lambda _, m: m @ m, matrix)
    return value + (0 * matrix[0, 0]).astype(value.dtype)


@functools.cache
def products_per_second(size):
    """The most that were seen: other tests may use the GPU at the same time."""
    run = jax.jit(functools.partial(multiply, size=size))
    value = jnp.float32(0)
    jax.block_until_ready(run(value, 30))
    taken = []
    for _ in range(5):
        start = time.monotonic()
        jax.block_until_ready(run(value, 30))
        taken.append(time.monotonic() - start)
    return 30 / min(taken)


SMALL, LARGE = 1024, 12288


@functools.cache
def _holder(times):
    return jax.jit(functools.partial(multiply, times=times, size=LARGE))


def hold(device, seconds):
    """Gives the GPU work of its own for so long, and returns at once.

    Few large products, because the host waits where more than a thousand kernels are queued.
    """
    times = math.ceil(seconds * products_per_second(LARGE))
    return _holder(times)(jax.device_put(jnp.float32(0), device))


def late_layer(api, x, topk_idx, weights, y, times):
    """Products ahead of each of the four calls, as many as `times` says for this rank."""

    def late(value, place):
        return value + multiply(0 * value[0, 0].astype(jnp.float32), times[place], SMALL)

    buffer = api.buffer
    sent = buffer.dispatch_send(late(x, 0), topk_idx, weights)
    ahead, _ = sample_programs.after(x, sent)
    _, sent = sample_programs.after(late(ahead, 1), sent)
    recv = buffer.dispatch_recv(sent)
    sent = buffer.combine_send(late(recv.x * y, 2), recv.layout, recv.weights)
    ahead, _ = sample_programs.after(x, sent)
    _, sent = sample_programs.after(late(ahead, 3), sent)
    return buffer.combine_recv(sent)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("milliseconds", [1, 10, 100])
def test_a_rank_late_by_compute(place, milliseconds, inputs):
    """Before either send, and between either send and its recv."""
    times = np.zeros((CONFIG.ep_size, 4), np.int32)
    times[LATE_RANK, place] = math.ceil(milliseconds / 1e3 * products_per_second(SMALL))
    ours, _ = support.runners(CONFIG, late_layer)
    for _ in range(3):
        support.assert_same_bits(ours(*inputs, times), expected_output())


@pytest.mark.parametrize("milliseconds", [1, 10, 100])
def test_a_gpu_with_other_work_queued(milliseconds, inputs):
    """The host is far ahead on every GPU, and one of them far behind the others."""
    ours, _ = support.runners(CONFIG, layer)
    jax.block_until_ready(ours(*inputs))
    hold(jax.devices()[LATE_RANK], milliseconds / 1e3)
    for out in [ours(*inputs) for _ in range(10)]:
        support.assert_same_bits(out, expected_output())


@needs_two
@pytest.mark.parametrize("rank", [0, LATE_RANK])
def test_a_program_is_loaded_while_runs_wait(rank, inputs):
    """The driver loads a program once the GPU has run dry, and enqueues no copy until then."""
    ours, _ = support.runners(CONFIG, layer)
    jax.block_until_ready(ours(*inputs))
    device = jax.devices()[rank]
    value = jax.device_put(jnp.arange(8), device)
    jax.block_until_ready(hold(jax.devices()[LATE_RANK], 0.01))
    start = time.monotonic()
    hold(jax.devices()[LATE_RANK], 0.3)
    outs = [ours(*inputs) for _ in range(5)]
    never_seen = jax.jit(lambda x: x * 3 + rank)
    np.testing.assert_array_equal(never_seen(value), np.arange(8) * 3 + rank)
    for out in outs:
        support.assert_same_bits(out, expected_output())
    assert time.monotonic() - start < CONFIG.timeout_s / 2


# ------------------------------------------------------------------------------------------ faults


@needs_two
@pytest.mark.parametrize("rank", [0, LATE_RANK])
def test_a_rank_that_stalls_for_longer_than_the_timeout(rank, inputs):
    """The others say whom they waited for; NaN everywhere; a new buffer works at once."""
    config = dataclasses.replace(CONFIG, timeout_s=1.0)
    with support.open_buffer(config) as buffer:
        run = compiled(buffer)
        support.assert_same_bits(run(*inputs), expected_output())
        hold(jax.devices()[rank], 5.0)
        errors = faulty_runs.errors_by_rank(buffer, run, *inputs)
        expected = (
            rf"dispatch_recv on rank \d, peer rank {rank}: ",
            rf"expected messages from {config.ep_size} ranks within 1 s, ",
            rf"seen {config.ep_size - 1} after 1 s, none from rank {rank}, ",
            r"whose last in this slot was of exchange \d+ \[dispatch exchange 3, slot 1\]",
        )
        for error in (*errors, faulty_runs.fault_of(buffer), faulty_runs.error_of(run, *inputs)):
            support.assert_matches(error or "", *expected)
        with support.open_buffer(config) as other:
            support.assert_same_bits(compiled(other)(*inputs), expected_output())
            other.check()


def test_runs_ahead_of_a_fault_give_their_results(inputs):
    x, topk_idx, weights, y = inputs
    wrong = topk_idx.copy()
    wrong[0, 0, 0] = CONFIG.num_experts
    with support.open_buffer(CONFIG) as buffer:
        run = compiled(buffer)
        jax.block_until_ready(run(*inputs))
        hold(jax.devices()[LATE_RANK], 0.1)
        before = [run(*inputs) for _ in range(5)]
        errors = faulty_runs.errors_by_rank(buffer, run, x, wrong, weights, y)
        for error in (*errors, faulty_runs.error_of(run, *inputs)):
            support.assert_matches(error or "", f"seen {CONFIG.num_experts} at token 0, k 0")
        for out in before:
            support.assert_same_bits(out, expected_output())


def test_no_result_behind_a_fault_passes_for_one(inputs):
    """Runs that were queued before anyone saw the fault: NaN, or an error."""
    x, topk_idx, weights, y = inputs
    wrong = topk_idx.copy()
    wrong[LATE_RANK, 3, 1] = -2
    with support.open_buffer(CONFIG) as buffer:
        run = compiled(buffer)
        jax.block_until_ready(run(*inputs))
        for device in buffer.mesh.devices.flat:
            hold(device, 0.1)
        behind = [run(x, wrong, weights, y)]
        with contextlib.suppress(faulty_runs.RUN_ERROR):
            behind += [run(*inputs) for _ in range(5)]
        for out in behind:
            assert all(faulty_runs.errors_by_rank(buffer, lambda out=out: out))


def never_received(api, x, topk_idx, weights, y):
    del y
    return x + 0 * api.buffer.dispatch_send(x, topk_idx, weights).token[0]


def test_sent_and_never_received(inputs):
    """Each such run keeps a slot, until a fault says that there is none."""
    with support.open_buffer(CONFIG) as buffer:
        leaky = compiled(buffer, never_received)
        for _ in range(CONFIG.num_slots):
            jax.block_until_ready(leaky(*inputs))
            buffer.check()
        text = faulty_runs.run_into_fault(leaky, *inputs)
        support.assert_matches(text, r"dispatch_send on rank \d: expected at most 2 exchanges in")


def test_closed_with_runs_queued(inputs):
    """Each result is right or poisoned or refused, and nothing waits for the timeout."""
    buffer = support.open_buffer(CONFIG)
    run = compiled(buffer)
    jax.block_until_ready(run(*inputs))
    jax.block_until_ready(hold(jax.devices()[LATE_RANK], 0.01))
    start = time.monotonic()
    hold(jax.devices()[LATE_RANK], 0.2)
    outs = [run(*inputs) for _ in range(20)]
    buffer.close()
    for out in outs:
        try:
            ranks = np.asarray(out)
        except faulty_runs.RUN_ERROR as error:
            support.assert_matches(str(error), "seen it is closed")
            continue
        for got, want in zip(ranks, np.asarray(expected_output()), strict=True):
            assert np.isnan(got).all() or got.tobytes() == want.tobytes()
    assert time.monotonic() - start < CONFIG.timeout_s / 2
    with support.open_buffer(CONFIG) as other:
        support.assert_same_bits(compiled(other)(*inputs), expected_output())


# --------------------------------------------------------------------------------------- in a row

STEPS = 500


def thousand_exchanges(api, x, topk_idx, weights):
    """The rows go round and round, so that one wrong bit reaches the end."""

    def step(x, routing):
        recv = api.buffer.dispatch(x, *routing)
        out = api.buffer.combine(recv.x, recv.layout, weights=recv.weights)
        return jnp.roll(out, 1, axis=0), recv.counts

    return jax.lax.scan(step, x, (topk_idx, weights))


def test_a_thousand_exchanges_of_random_routing():
    sizes = {"hidden": 512, "max_tokens": 128, "top_k": 2, "recv_capacity": None}
    config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16, **sizes)
    rng = np.random.default_rng(3)
    shape = (config.ep_size, STEPS, config.max_tokens, config.top_k)
    topk_idx = rng.integers(0, config.num_experts, shape, np.int32)
    weights = np.ones(shape, np.float32)  # and a little: rows stay large enough to see all bits
    weights[..., 1] = rng.choice([-1, 1], shape[:-1]) / 128
    x = make_rows(config, config.max_tokens, 4)
    out, _ = support.check_same(config, thousand_exchanges, x, topk_idx, weights)
    magnitude = np.abs(np.asarray(out).astype(np.float32)).mean()
    assert 0.1 < magnitude < 10


def test_programs_in_flight_of_two_buffers(inputs):
    """Two programs in turn, each on a buffer of its own; nobody waits for results in between."""
    with support.open_buffer(CONFIG) as one, support.open_buffer(CONFIG) as two:
        runs = [compiled(one), compiled(two), compiled(two, late_layer)]
        times = np.zeros((CONFIG.ep_size, 4), np.int32)
        args = [inputs, inputs, (*inputs, times)]
        placed = [
            jax.device_put(a, jax.sharding.NamedSharding(one.mesh, support.P("ep"))) for a in args
        ]
        for out in [run(*a) for _ in range(10) for run, a in zip(runs, placed, strict=True)]:
            support.assert_same_bits(out, expected_output())
        one.check()
        two.check()


def beside_collectives(api, x, topk_idx, weights, y):
    """Collectives of all kinds between send and recv, and behind."""

    def gather(x):
        return jax.lax.all_gather(x, "ep").max(axis=0), jax.lax.psum(x, "ep")

    buffer = api.buffer
    ring = [(i, (i + 1) % CONFIG.ep_size) for i in range(CONFIG.ep_size)]
    sent = buffer.dispatch_send(x, topk_idx, weights)
    (highest, total), sent = api.overlap(sent, gather, x)
    recv = buffer.dispatch_recv(sent)
    rows = jax.lax.ppermute(recv.x, "ep", ring)
    sent = buffer.combine_send(recv.x * y, recv.layout, recv.weights)
    shifted, sent = api.overlap(sent, lambda x: jax.lax.ppermute(x, "ep", ring), x)
    out = buffer.combine_recv(sent)
    return (out, highest, rows, shifted), total, jax.lax.psum(out, "ep")


def test_collectives_in_the_same_program(inputs):
    ours, theirs = support.runners(CONFIG, beside_collectives)
    want = theirs(*inputs)
    for got in [ours(*inputs) for _ in range(30)]:
        support.assert_same_bits(got[0], want[0])
        support.assert_close(got[1:], want[1:])
