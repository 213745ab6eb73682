"""A rank that raises, stalls or is wrong: the others end with an error, and the next run works."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_programs
import support
from sample_inputs import make_inputs, make_rows
from support import make_config

import jax_sm_free as smf

pytestmark = pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two ranks")

TIMEOUT_S = 2.0  # long enough that a busy machine does not pass for a rank that stalls
# How much later than the timeout an error may come: two cores that others use, too.
MARGIN_S = 8.0
CONFIG = make_config(num_experts=2 * support.SOME_RANKS, timeout_s=TIMEOUT_S)
BAD_RANK = support.SOME_RANKS - 1

# Places in `layer` where a rank may be made to fail.
PLACES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
NOTHING, RAISE = 0.0, -1.0


class RankDiedError(Exception):
    """What the bad rank raises."""


def act(x, action):
    """Does nothing, raises or sleeps for `action` seconds, on the host of this rank."""

    def on_host(x, action):
        if action == RAISE:
            raise RankDiedError("this rank died")
        time.sleep(float(action))
        return np.asarray(x)

    return jax.pure_callback(on_host, jax.typeof(x), x, action)


def act_between(x, sent, action):
    """Acts after the send and before the recv."""
    x, _ = sample_programs.after(x, sent)
    return sample_programs.after(act(x, action), sent)[1]


def layer(api, x, topk_idx, weights, y, actions):
    """`actions`: what this rank does before each of the PLACES."""
    buffer = api.buffer
    sent = buffer.dispatch_send(act(x, actions[0]), topk_idx, weights)
    recv = buffer.dispatch_recv(act_between(x, sent, actions[1]))
    rows = act(recv.x * y, actions[2])
    sent = buffer.combine_send(rows, recv.layout, recv.weights)
    return buffer.combine_recv(act_between(x, sent, actions[3]))


@pytest.fixture
def inputs():
    return *make_inputs(CONFIG, seed=1), make_rows(CONFIG, CONFIG.recv_capacity, 2)


@pytest.fixture
def buffer():
    with support.open_buffer(CONFIG) as buffer:
        yield buffer


def compiled(buffer):
    return support.on_ranks(functools.partial(layer, support.Api(buffer, smf)), buffer.mesh)


def actions_of(place=None, action=NOTHING, rank=BAD_RANK):
    actions = np.zeros((CONFIG.ep_size, len(PLACES)), np.float32)
    if place is not None:
        actions[rank, PLACES.index(place)] = action
    return actions


@functools.cache
def expected_output():
    inputs = *make_inputs(CONFIG, seed=1), make_rows(CONFIG, CONFIG.recv_capacity, 2)
    return support.runners(CONFIG, layer)[1](*inputs, actions_of())


def recv_that_waits_for(place):
    return "dispatch_recv" if place.startswith("dispatch") else "combine_recv"


def assert_times_out(error, place):
    support.assert_matches(
        error,
        rf"{recv_that_waits_for(place)} on rank \d, peer rank {BAD_RANK}: ",
        rf"expected messages from {CONFIG.ep_size} ranks within {TIMEOUT_S:g} s",
        rf"seen {CONFIG.ep_size - 1} after {TIMEOUT_S:g} s, none from rank {BAD_RANK}",
        r"exchange \d+, slot \d",
    )


def assert_works(run, inputs):
    support.assert_same_bits(run(*inputs, actions_of()), expected_output())


def assert_works_again(buffer, run, inputs):
    """The run after a fault, or after a rank died, meets no other fault."""
    buffer, run = faulty_runs.go_on(buffer, run, compiled)
    assert_works(run, inputs)
    buffer.check()


def assert_all_failed(errors, action, expected):
    """The bad rank with its own error, if it raised; the others with `expected(error)`."""
    for rank, error in enumerate(errors):
        assert error is not None, f"expected rank {rank} to fail, got a result"
        died = "this rank died" in error
        if action == "raises" and rank == BAD_RANK:
            assert died, error
        elif support.ON_CPU or not died:
            expected(error)


@pytest.mark.parametrize("place", ["dispatch_send", "combine_send"])
@pytest.mark.parametrize("action", ["raises", "stalls"])
def test_a_rank_that_does_not_send(place, action, buffer, inputs):
    """The others end within the timeout, and name the rank, what they waited for and what came."""
    run = compiled(buffer)
    assert_works(run, inputs)
    seconds = RAISE if action == "raises" else TIMEOUT_S + 1.5
    start = time.monotonic()
    errors = faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of(place, seconds))
    took = time.monotonic() - start
    # Less than the timeout if another process began to wait earlier, and so ended this one.
    assert TIMEOUT_S - 0.5 < took < TIMEOUT_S + MARGIN_S
    assert_all_failed(errors, action, functools.partial(assert_times_out, place=place))
    assert_times_out(faulty_runs.fault_of(buffer), place)
    assert_works_again(buffer, run, inputs)


@pytest.mark.parametrize("place", ["dispatch_recv", "combine_recv"])
def test_a_rank_that_raises_between_send_and_recv(place, buffer, inputs):
    """Its rows arrived, so the others go on: to the end, or to where they next wait for it."""
    run = compiled(buffer)
    errors = faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of(place, RAISE))
    if place == "dispatch_recv":
        times_out = functools.partial(assert_times_out, place="combine_send")
        assert_all_failed(errors, "raises", times_out)
        times_out(faulty_runs.fault_of(buffer))
    else:
        support.assert_matches(errors[BAD_RANK], "this rank died")
        assert not support.ON_CPU or errors[:BAD_RANK] == [None] * BAD_RANK
        buffer.check()
    assert_works_again(buffer, run, inputs)


def test_a_rank_that_stalls_for_less_than_the_timeout_is_waited_for(buffer, inputs):
    out = compiled(buffer)(*inputs, actions_of("dispatch_send", TIMEOUT_S / 3))
    support.assert_same_bits(out, expected_output())
    buffer.check()


def test_who_waits_for_long_says_for_whom(inputs, capfd):
    with support.open_buffer(dataclasses.replace(CONFIG, timeout_s=60.0)) as buffer:
        out = compiled(buffer)(*inputs, actions_of("dispatch_send", 11.0))
        support.assert_same_bits(out, expected_output())
        buffer.check()
        if support.ranks_here(buffer) == [BAD_RANK]:
            return  # No rank waits for this one here.
    support.assert_matches(
        capfd.readouterr().err,
        rf"dispatch_recv on rank \d, peer rank {BAD_RANK}: .* within 60 s, "
        rf"seen {CONFIG.ep_size - 1} after 10 s, none from rank {BAD_RANK}\b.*\(still waiting\)",
    )


def test_a_new_buffer_works_beside_one_that_failed(buffer, inputs):
    run = compiled(buffer)
    assert all(faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of("dispatch_send", RAISE)))
    with support.open_buffer(CONFIG) as other:
        assert_works(compiled(other), inputs)
        other.check()
    faulty_runs.fault_of(buffer)


def test_faults_in_a_row_are_each_reported(buffer, inputs):
    run = compiled(buffer)
    x, topk_idx, *rest = inputs
    for bad in (100, 200, 300):
        wrong = topk_idx.copy()
        wrong[0, 0, 0] = bad
        error = faulty_runs.run_into_fault(run, x, wrong, *rest, actions_of())
        support.assert_matches(error, f"seen {bad}")
        support.assert_matches(faulty_runs.fault_of(buffer), f"seen {bad}")
        buffer, run = faulty_runs.go_on(buffer, run, compiled)
    assert_works(run, inputs)


def test_the_rank_that_meets_a_fault_says_so_on_stderr(buffer, inputs, capfd):
    """The line comes before any `check`. Other ranks, which only suffer from it, write no line."""
    run = compiled(buffer)
    x, topk_idx, *rest = inputs
    topk_idx = topk_idx.copy()
    topk_idx[0, 0, 0] = 100
    faulty_runs.errors_by_rank(buffer, run, x, topk_idx, *rest, actions_of())
    expected = [0] if 0 in support.ranks_here(buffer) else []
    lines = []
    deadline = time.monotonic() + (MARGIN_S if expected else 0)
    while not lines and time.monotonic() < deadline:  # On GPUs a thread looks for it.
        lines += told_on(capfd)
    faulty_runs.fault_of(buffer)
    lines += told_on(capfd)
    assert len(lines) == len(expected), lines
    for line in lines:
        support.assert_matches(line, "^jax_sm_free: dispatch_send on rank 0: .*seen 100 at")


def told_on(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if "jax_sm_free: " in line]


@pytest.mark.skipif(not support.BUFFERS_GO_ON, reason="takes a buffer that goes on after faults")
def test_other_runs_in_flight_are_not_ended(buffer, inputs):
    """A fault ends its own run: those before and behind it give their results.

    On GPUs it ends the buffer, too, and only the runs before it give theirs: see test_gpu.py.
    """
    run = compiled(buffer)
    x, topk_idx, *rest = inputs
    wrong = topk_idx.copy()
    wrong[0, 0, 0] = -2
    outs = [run(x, idx, *rest, actions_of()) for idx in (topk_idx, wrong, topk_idx)]
    support.assert_same_bits(outs[0], expected_output())
    support.assert_same_bits(outs[2], expected_output())
    assert all(faulty_runs.errors_by_rank(buffer, lambda: outs[1]))


# -------------------------------------------------------------------------- in the backward pass


def loss_and_gradient(api, x, topk_idx, weights, y, actions):
    """Fails between the mirrored calls: in the backward pass of what overlaps the combine."""

    @jax.custom_vjp
    def fail_backward(x, action):
        return x

    fail_backward.defvjp(lambda x, a: (x, a), lambda a, ct: (ct + 0 * act(ct, a), None))

    def loss(x):
        recv = api.buffer.dispatch(x, topk_idx, weights)
        rows = fail_backward(recv.x * y, actions[2])
        return (api.buffer.combine(rows, recv.layout, weights=recv.weights) ** 2).sum()

    return jax.grad(loss)(x)


def test_a_rank_that_raises_in_the_backward_pass(buffer, inputs):

    def compiled(buffer):
        program = functools.partial(loss_and_gradient, support.Api(buffer, smf))
        return support.on_ranks(program, buffer.mesh)

    def times_out(error):
        support.assert_matches(error, f"dispatch_backward_recv on rank .*none from rank {BAD_RANK}")

    run = compiled(buffer)
    errors = faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of("combine_send", RAISE))
    assert_all_failed(errors, "raises", times_out)
    times_out(faulty_runs.fault_of(buffer))
    buffer, run = faulty_runs.go_on(buffer, run, compiled)
    want = support.runners(CONFIG, loss_and_gradient)[1](*inputs, actions_of())
    support.assert_close(run(*inputs, actions_of()), want, 1e-4)


# -------------------------------------------------------------------------------- closed meanwhile


def test_a_buffer_closed_while_results_are_pending(inputs):
    """Ranks that wait get an error at once, not after the timeout, and nothing hangs."""
    buffer = support.open_buffer(make_config(num_experts=2 * support.SOME_RANKS, timeout_s=60.0))
    run = compiled(buffer)
    jax.block_until_ready(run(*inputs, actions_of()))
    closer = threading.Timer(0.5, buffer.close)
    closer.start()
    start = time.monotonic()
    # So much later than the close that it finds the buffer closed on a busy machine, too.
    errors = faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of("dispatch_send", 3.0))
    closer.join()
    assert time.monotonic() - start < 3.0 + MARGIN_S
    closed = "expected buffer .* to be open.* closed"
    if jax.process_count() > 1:  # Another process may have closed its buffer first.
        closed += "|it closed its end"
    for rank, error in enumerate(errors):
        assert error is not None, f"expected rank {rank} to fail, got a result"
        support.assert_matches(error, closed)


# ------------------------------------------------------------------------------ ranks out of step


def test_ranks_that_take_other_branches_end_with_a_fault(inputs):
    """One rank skips the layer: the others wait for it, and say so."""

    def program(buffer, x, topk_idx, weights, y, actions):
        return jax.lax.cond(
            actions[0] > 0,
            lambda *args: jnp.zeros_like(x),
            lambda *args: buffer.dispatch(*args).x[: x.shape[0]],
            x,
            topk_idx,
            weights,
        )

    def compiled(buffer):
        return support.on_ranks(functools.partial(program, buffer), buffer.mesh)

    with support.open_buffer(CONFIG) as buffer:
        run = compiled(buffer)
        errors = faulty_runs.errors_by_rank(buffer, run, *inputs, actions_of("dispatch_send", 1.0))
        assert errors[BAD_RANK] is None
        for error in errors[:BAD_RANK]:
            assert_times_out(error, "dispatch_send")
        buffer, run = faulty_runs.go_on(buffer, run, compiled)
        jax.block_until_ready(run(*inputs, actions_of()))
