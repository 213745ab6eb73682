"""`Buffer.stats`: bytes that follow from the routing, rows dropped, and who is waited for."""

from __future__ import annotations

import concurrent.futures
import json
import time

import aot
import jax
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from support import make_config

import jax_sm_free as smf

CONFIG = make_config(num_experts=2 * support.SOME_RANKS, recv_capacity=18 * support.SOME_RANKS)
KINDS = ("dispatch", "combine", "dispatch_backward", "combine_backward")
HELD_S = 0.5
LATE = support.SOME_RANKS - 1

needs_peers = pytest.mark.skipif(support.SOME_RANKS < 2, reason="needs two ranks")


def dispatch(api, x, topk_idx, weights, y):
    return api.buffer.dispatch(x, topk_idx, weights).dropped


def by_tokens(api, x, topk_idx, weights, y):
    return api.buffer.dispatch(x, topk_idx, weights, output="tokens").num_tokens


def train(api, x, topk_idx, weights, y):
    """A layer and its gradients: an exchange of each kind."""

    def loss(x, weights):
        return (sample_programs.layer(api, x, topk_idx, weights, y) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1))(x, weights)


def counted(buffer, program, *args):
    """What a run counts, and its result."""
    run = support.on_ranks(lambda *args: program(support.Api(buffer, smf), *args), buffer.mesh)
    before = buffer.stats()
    out = jax.block_until_ready(run(*args))
    return buffer.stats() - before, out


def rows_between(config, topk_idx):
    """Tokens of each rank that name an expert of each other: [ep_size, ep_size]."""
    owners = np.where(topk_idx < 0, -1, topk_idx // config.num_local_experts)
    return np.stack([(owners == r).any(2).sum(1) for r in range(config.ep_size)], 1)


def assert_counts(stats, buffer, exchanges, sent, received):
    """`sent`, `received`: bytes, [ep_size, ep_size], from and to the rank of the row."""
    assert [rank.rank for rank in stats.ranks] == support.ranks_here(buffer)
    for rank in stats.ranks:
        assert rank.exchanges == dict(zip(KINDS, exchanges, strict=True))
        assert rank.bytes_sent == tuple(sent[rank.rank])
        assert rank.bytes_received == tuple(received[rank.rank])


# --------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("program", [dispatch, by_tokens])
@pytest.mark.parametrize("how", sample_inputs.ROUTINGS)
def test_bytes_of_a_dispatch(how, program):
    x, topk_idx, weights = sample_inputs.make_inputs(CONFIG, how=how)
    y = sample_inputs.make_rows(CONFIG, 1, 0)
    buffer = support.apis(CONFIG)[0].buffer
    stats, _ = counted(buffer, program, x, topk_idx, weights, y)
    sent = rows_between(CONFIG, topk_idx) * CONFIG.hidden * 4
    assert_counts(stats, buffer, (1, 0, 0, 0), sent, sent.T)
    assert all(rank.rows_dropped == 0 for rank in stats.ranks)


@pytest.mark.parametrize("wire_dtype", [None, jax.numpy.float8_e4m3fn])
def test_bytes_of_a_layer_and_its_gradients(wire_dtype):
    config = make_config(num_experts=2 * support.SOME_RANKS, hidden=256, wire_dtype=wire_dtype)
    inputs = sample_inputs.layer_inputs(config)
    with support.open_buffer(config) as buffer:
        first, _ = counted(buffer, train, *inputs)
        again, _ = counted(buffer, train, *inputs)
        # A dispatch and the gradient of a combine go there, the other two come back.
        there = rows_between(config, inputs[1])
        row_bytes = config.hidden * 4
        sent = there * (config.dispatched_row_bytes + row_bytes) + there.T * 2 * row_bytes
        received = there.T * (config.dispatched_row_bytes + row_bytes) + there * 2 * row_bytes
        for stats in (first, again):
            assert_counts(stats, buffer, (1, 1, 1, 1), sent, received)
        assert_counts(buffer.stats(), buffer, (2, 2, 2, 2), 2 * sent, 2 * received)


def test_rows_dropped():
    config = make_config(num_experts=2 * support.SOME_RANKS, recv_capacity=5, expert_alignment=2)
    x, topk_idx, weights = sample_inputs.make_inputs(config)
    y = sample_inputs.make_rows(config, 1, 0)
    with support.open_buffer(config) as buffer:
        stats, dropped = counted(buffer, dispatch, x, topk_idx, weights, y)
        assert np.asarray(dropped).sum() > 0
        assert [rank.rows_dropped for rank in stats.ranks] == [
            int(dropped[rank.rank]) for rank in stats.ranks
        ]


def test_nothing_is_counted_at_first():
    with support.open_buffer(CONFIG) as buffer:
        stats = buffer.stats()
        nothing = np.zeros((CONFIG.ep_size, CONFIG.ep_size), int)
        assert_counts(stats, buffer, (0, 0, 0, 0), nothing, nothing)
        for rank in stats.ranks:
            assert rank.rows_dropped == 0
            assert rank.waited_s == (0.0,) * CONFIG.ep_size
            assert rank.group == 0
            assert rank.device == str(buffer.mesh.devices.flat[rank.rank])


# ---------------------------------------------------------------------------------------- waits


def held_up(api, x, topk_idx, weights, seconds):
    """A dispatch that a rank begins later."""

    def on_host(x, seconds):
        time.sleep(float(seconds))
        return np.asarray(x)

    x = jax.pure_callback(on_host, jax.typeof(x), x, seconds)
    return api.buffer.dispatch(x, topk_idx, weights).x


@needs_peers
def test_a_rank_that_is_late_is_found():
    buffer = support.apis(CONFIG)[0].buffer
    run = support.runners(CONFIG, held_up)[0]
    inputs = sample_inputs.make_inputs(CONFIG)
    seconds = np.zeros(CONFIG.ep_size, np.float32)
    jax.block_until_ready(run(*inputs, seconds))
    before = buffer.stats()
    seconds[LATE] = HELD_S
    start = time.monotonic()
    jax.block_until_ready(run(*inputs, seconds))
    took = time.monotonic() - start
    for rank in (buffer.stats() - before).ranks:
        assert rank.waited_s[rank.rank] == 0
        if rank.rank == LATE:
            assert max(rank.waited_s) < HELD_S / 2
        else:
            assert max(rank.waited_s) == rank.waited_s[LATE]
            assert HELD_S / 2 < rank.waited_s[LATE] < took


@needs_peers
def test_stats_wait_for_no_program():
    buffer = support.apis(CONFIG)[0].buffer
    run = support.runners(CONFIG, held_up)[0]
    inputs = sample_inputs.make_inputs(CONFIG)
    seconds = np.zeros(CONFIG.ep_size, np.float32)
    jax.block_until_ready(run(*inputs, seconds))
    before = buffer.stats()
    seconds[LATE] = 2.0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # In a process with one device the call returns only when the results are there.
        results = pool.submit(lambda: jax.block_until_ready(run(*inputs, seconds)))
        time.sleep(0.3)
        started = time.monotonic()
        during = buffer.stats() - before
        assert time.monotonic() - started < 0.5
        assert not results.done()
        results.result()
    for rank in during.ranks:
        assert rank.exchanges["dispatch"] == 0
        assert rank.waited_s[LATE] == 0  # counts only waits that have ended
    for rank in (buffer.stats() - before).ranks:
        assert rank.exchanges["dispatch"] == 1


# --------------------------------------------------------------------------------------- snapshots


@pytest.mark.one_process  # each process would see the ranks of one group alone
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
def test_groups_count_apart():
    """In a mesh of two axes, the buffer's first; only the second group sends to other ranks."""
    config = make_config(2, num_experts=4)
    devices = support.mesh_of(4).devices.reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("ep", "data"))
    x, topk_idx, weights = sample_inputs.make_inputs(make_config(4, num_experts=8))
    for place, (rank, group) in enumerate(np.ndindex(2, 2)):
        topk_idx[place] = 2 * (rank if group == 0 else 1 - rank)
    with support.open_buffer(config, mesh) as buffer:
        y = sample_inputs.make_rows(make_config(4), 1, 0)
        stats, _ = counted(buffer, dispatch, x, topk_idx, weights, y)
        bytes_of_all = config.max_tokens * config.hidden * 4
        for rank in stats.ranks:
            assert rank.device == str(devices[rank.rank, rank.group])
            peer = rank.rank if rank.group == 0 else 1 - rank.rank
            assert rank.bytes_sent == rank.bytes_received
            assert rank.bytes_sent[peer] == sum(rank.bytes_sent) == bytes_of_all
        order = [(rank.group, rank.rank) for rank in stats.ranks]
        assert order == sorted(order)
        assert "group 1 rank 0" in str(stats)


def rank_stats(rank, exchanges, waited_s):
    return smf.RankStats(
        device=f"cpu:{rank}",
        group=0,
        rank=rank,
        exchanges=dict.fromkeys(KINDS, exchanges),
        bytes_sent=(1_000_000, 20_000_000 * exchanges),
        bytes_received=(3_000_000, 4_000_000),
        rows_dropped=12 * exchanges,
        waited_s=waited_s,
    )


def test_a_difference():
    after = smf.BufferStats((rank_stats(0, 5, (0.0, 1.5)), rank_stats(1, 5, (0.25, 0.0))))
    before = smf.BufferStats((rank_stats(0, 3, (0.0, 0.5)), rank_stats(1, 4, (0.25, 0.0))))
    first, second = (after - before).ranks
    assert first.exchanges == dict.fromkeys(KINDS, 2)
    assert first.bytes_sent == (0, 40_000_000)
    assert first.bytes_received == (0, 0)
    assert first.rows_dropped == 24
    assert first.waited_s == (0.0, 1.0)
    assert second.rows_dropped == 12
    with pytest.raises(ValueError, match="expected stats of one rank"):
        after.ranks[0] - before.ranks[1]
    with pytest.raises(ValueError, match="expected two snapshots of the same ranks, got 2 and 1"):
        after - smf.BufferStats(before.ranks[:1])


def test_a_table():
    stats = smf.BufferStats((rank_stats(0, 5, (0.0, 1.5)), rank_stats(1, 5, (0.25, 0.0))))
    assert (
        str(stats)
        == """\
exchanges  dispatch  combine  dispatch'  combine'  dropped
rank 0            5        5          5         5       60
rank 1            5        5          5         5       60

MB sent to     0       1
rank 0      1.00  100.00
rank 1      1.00  100.00

MB received from     0     1
rank 0            3.00  4.00
rank 1            3.00  4.00

seconds waited for      0      1
rank 0              0.000  1.500
rank 1              0.250  0.000"""
    )


def test_as_dict_is_for_json():
    stats = smf.BufferStats((rank_stats(0, 5, (0.0, 1.5)),))
    (rank,) = json.loads(json.dumps(stats.as_dict()))["ranks"]
    assert rank["exchanges"]["combine_backward"] == 5
    assert rank["bytes_sent"] == [1_000_000, 100_000_000]
    assert rank["waited_s"] == [0.0, 1.5]


def test_a_closed_buffer_is_refused():
    buffer = support.open_buffer(CONFIG)
    buffer.close()
    with pytest.raises(RuntimeError, match="stats: expected an open buffer"):
        buffer.stats()


@pytest.mark.cpu_only
def test_devices_that_are_not_there_have_counted_nothing():
    mesh = aot.mesh()
    buffer = smf.Buffer(mesh, "ep", hidden=8, num_experts=4, top_k=2, max_tokens=8)
    assert buffer.stats() == smf.BufferStats(())
    assert str(buffer.stats()) == "no ranks"
