"""`Buffer.stats` of several processes: each has its own ranks, and sees who is late."""

from __future__ import annotations

import layers
import pytest
import support
import waiting

from processes import launcher

HELD_S = 0.5


def check_found(results, late):
    """That all ranks but those of the process that was late have waited for it, and for no other.

    Args:
      results: the counts and the seconds of the run, by process.
      late: the ranks of the last process, of which one was held up first.
    """
    ranks = [rank for stats, _ in results for rank in stats.ranks]
    took = [seconds for stats, seconds in results for _ in stats.ranks]
    assert [rank.rank for rank in ranks] == list(range(len(ranks)))
    for rank, seconds in zip(ranks, took, strict=True):
        assert rank.exchanges["dispatch"] == rank.exchanges["combine"] == 1
        assert rank.waited_s[rank.rank] == 0
        # Each token's row comes back.
        assert rank.bytes_sent == rank.bytes_received
        assert sum(rank.bytes_sent) % (4 * layers.HIDDEN) == 0
        if rank.rank in late:
            continue
        assert max(rank.waited_s) == max(rank.waited_s[peer] for peer in late)
        assert HELD_S / 2 < max(rank.waited_s) < seconds
    for rank in ranks:
        for peer in ranks:
            assert rank.bytes_sent[peer.rank] == peer.bytes_received[rank.rank]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("num_processes", "num_devices"), [(3, 1), (2, 2)])
def test_a_process_that_is_late_is_found(num_processes, num_devices):
    places = {"num_processes": num_processes, "num_devices": num_devices}
    results = launcher.run(waiting.wait_for_the_last, HELD_S, **places)
    ranks = num_processes * num_devices
    check_found(results, range(ranks - num_devices, ranks))


@pytest.mark.gpu_only
@pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("env", [{}, {"JAX_SM_FREE_NVSHMEM_PUTS": "1"}], ids=["pointers", "puts"])
def test_a_gpu_that_is_late_is_found(env):
    ranks = support.MAX_RANKS
    results = launcher.run(
        waiting.wait_for_the_last, HELD_S, num_processes=ranks, timeout_s=120.0, env=env
    )
    check_found(results, [ranks - 1])
