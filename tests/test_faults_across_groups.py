"""Several groups: a fault in one ends the program on the ranks of all, and is told on stderr.

Ranks of all groups meet in XLA's collectives, which wait for ever for a rank that has ended.
"""

from __future__ import annotations

import functools
import time

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import make_inputs, make_rows
from support import make_config

from jax_sm_free import reference

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs two groups of two ranks"),
]

EP_SIZE, NUM_GROUPS = 2, 2
TIMEOUT_S = 3.0
MARGIN_S = 8.0  # how much later an error may come on a busy machine
CONFIG = make_config(ep_size=EP_SIZE, num_experts=4, timeout_s=TIMEOUT_S)
BAD_GROUP, BAD_RANK = 1, 1
# How long one wait in vain for another group may take, and all such waits together.
PATIENCE_S, ALL_PATIENCE_S = 1.0, 2.0


@pytest.fixture
def mesh():
    devices = np.array(jax.devices()[: NUM_GROUPS * EP_SIZE])
    return jax.sharding.Mesh(devices.reshape(NUM_GROUPS, EP_SIZE), ("dp", "ep"))


@pytest.fixture
def buffer(mesh):
    with support.open_buffer(CONFIG, mesh) as buffer:
        yield buffer


def inputs():
    """x, topk_idx, topk_weights, y of all ranks, group by group."""
    groups = [make_inputs(CONFIG, seed=seed) for seed in range(NUM_GROUPS)]
    x, topk_idx, weights = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    y = np.concatenate([make_rows(CONFIG, CONFIG.recv_capacity, s) for s in range(NUM_GROUPS)])
    return x, topk_idx, weights, y


def wrong_index():
    x, topk_idx, weights, y = inputs()
    topk_idx[BAD_GROUP * EP_SIZE + BAD_RANK, 2, 1] = CONFIG.num_experts
    return x, topk_idx, weights, y


def layer(buffer, x, topk_idx, weights, y):
    recv = buffer.dispatch(x, topk_idx, weights)
    return buffer.combine(recv.x * y, recv.layout, weights=recv.weights)


def loss(buffer, *args):
    """The loss over all groups together, and its gradient."""

    def fn(x):
        return (layer(buffer, x, *args[1:]) ** 2).sum()

    value, grad = jax.value_and_grad(fn)(args[0])
    return jax.lax.psum(value, ("dp", "ep")), jax.lax.psum(grad, ("dp", "ep"))


def compiled(fn, buffer):
    return support.on_ranks(functools.partial(fn, buffer), buffer.mesh)


def expected(fn, mesh, *args):
    theirs = support.open_buffer(CONFIG, mesh, module=reference)
    return support.on_ranks(functools.partial(fn, theirs), mesh)(*args)


def errors_of_ranks(out):
    """For each rank of all groups the error of its results."""
    errors = [None] * (NUM_GROUPS * EP_SIZE)
    for leaf in jax.tree.leaves(out):
        for shard in leaf.addressable_shards:
            try:
                np.asarray(shard.data)
            except faulty_runs.RUN_ERROR as error:
                errors[shard.index[0].start] = str(error)
    return errors


def assert_all_ranks_fail(out, *patterns):
    for rank, error in enumerate(errors_of_ranks(out)):
        assert error is not None, f"expected rank {rank} of all to fail, got a result"
        support.assert_matches(error, *patterns)


WRONG_INDEX = (
    rf"jax_sm_free: dispatch_send on rank {BAD_RANK}: expected topk_idx in \[-1, 4\), "
    r"seen 4 at token 2, k 1"
)


def test_a_fault_of_one_group_ends_the_run_in_all(buffer, capfd):
    run = compiled(loss, buffer)
    want = run(*inputs())
    jax.block_until_ready(want)
    start = time.monotonic()
    assert_all_ranks_fail(run(*wrong_index()), WRONG_INDEX)
    assert time.monotonic() - start < MARGIN_S
    support.assert_matches(faulty_runs.fault_of(buffer), WRONG_INDEX)
    lines = [line for line in capfd.readouterr().err.splitlines() if "jax_sm_free: " in line]
    assert len(lines) == 1, lines
    support.assert_matches(lines[0], f"^{WRONG_INDEX}$")
    support.assert_same_bits(run(*inputs()), want)


# ------------------------------------------------------------------------------ ranks that stall


def sleep(x, seconds):
    def on_host(x, seconds):
        time.sleep(float(seconds))
        return np.asarray(x)

    return jax.pure_callback(on_host, jax.typeof(x), x, seconds)


def loss_after_a_stall(buffer, seconds, x, *args):
    return loss(buffer, sleep(x, seconds), *args)


def stalls(seconds):
    """Seconds that each rank stalls: zero but for the bad rank."""
    of_ranks = np.zeros(NUM_GROUPS * EP_SIZE, np.float32)
    of_ranks[BAD_GROUP * EP_SIZE + BAD_RANK] = seconds
    return of_ranks


def test_a_timeout_in_one_group_ends_the_run_in_all(buffer, capfd):
    run = compiled(loss_after_a_stall, buffer)
    jax.block_until_ready(run(stalls(0), *inputs()))
    start = time.monotonic()
    misses = rf"dispatch_recv on rank 0, peer rank {BAD_RANK}: .*seen 1 after {TIMEOUT_S:g} s"
    assert_all_ranks_fail(run(stalls(TIMEOUT_S + 1.5), *inputs()), misses)
    assert TIMEOUT_S - 0.5 < time.monotonic() - start < TIMEOUT_S + MARGIN_S
    support.assert_matches(faulty_runs.fault_of(buffer), misses)
    assert capfd.readouterr().err.count("jax_sm_free: ") == 1


def test_a_rank_that_stalls_for_less_is_waited_for_by_all(buffer):
    run = compiled(loss_after_a_stall, buffer)
    want = run(stalls(0), *inputs())
    support.assert_same_bits(run(stalls(TIMEOUT_S / 2), *inputs()), want)
    buffer.check()


# ------------------------------------------------------- groups that do not run the same exchanges


def run_timed(run, *args):
    start = time.monotonic()
    out = jax.block_until_ready(run(*args))
    return out, time.monotonic() - start


def one_stage_has_the_layer(buffer, *args):
    """An exchange of group 0 that never happens in group 1, and a collective of both."""
    out = jax.lax.cond(
        jax.lax.axis_index("dp") == 0,
        lambda *args: layer(buffer, *args),
        lambda x, *_: -x,
        *args,
    )
    return jax.lax.psum(out, "dp")


def a_stage_after_the_other(buffer, x, *args):
    """Stage s runs the layer in step s alone, on what the stage before it has computed."""

    def step(x, number):
        x = jax.lax.cond(
            jax.lax.axis_index("dp") == number,
            lambda x: layer(buffer, x, *args),
            lambda x: x,
            x,
        )
        passed_on = [(stage, (stage + 1) % NUM_GROUPS) for stage in range(NUM_GROUPS)]
        return jax.lax.ppermute(x, "dp", passed_on), None

    return jax.lax.scan(step, x, jnp.arange(NUM_GROUPS))[0]


def more_steps_in_one_group(buffer, x, *args):
    number = 1 + 2 * jax.lax.axis_index("dp")
    out = jax.lax.fori_loop(0, number, lambda _, x: layer(buffer, x, *args), x)
    return jax.lax.psum(out, "dp")


def many_call_sites(buffer, x, *args):
    def layers(x):
        for _ in range(8):
            x = layer(buffer, x, *args)
        return x

    return jax.lax.psum(jax.lax.cond(jax.lax.axis_index("dp") == 1, layers, jnp.sin, x), "dp")


@pytest.mark.parametrize(
    "program",
    [one_stage_has_the_layer, a_stage_after_the_other, more_steps_in_one_group, many_call_sites],
)
def test_groups_with_other_control_flow(program, buffer, mesh):
    """Such a program runs, and waits for the other group a few times at most."""
    args = inputs()
    run = compiled(program, buffer)
    run.lower(*args).compile()
    want = expected(program, mesh, *args)
    waited = []
    for _ in range(6):
        out, took = run_timed(run, *args)
        support.assert_same_bits(out, want)
        waited.append(took)
    assert sum(waited) < ALL_PATIENCE_S + MARGIN_S, waited
    # A busy machine slows some runs down. A wait would slow all of them down.
    assert min(waited[2:]) < PATIENCE_S, waited
    buffer.check()


def test_a_fault_behind_an_exchange_that_groups_do_not_share(buffer):
    """A fault in an exchange that both groups run still ends the run in both."""

    def program(buffer, good_idx, x, topk_idx, weights, y):
        extra = one_stage_has_the_layer(buffer, x, good_idx, weights, y)
        return loss(buffer, x + 0 * extra, topk_idx, weights, y)

    run = compiled(program, buffer)
    x, good_idx, weights, y = inputs()
    jax.block_until_ready(run(good_idx, x, good_idx, weights, y))
    assert_all_ranks_fail(run(good_idx, *wrong_index()), WRONG_INDEX)
