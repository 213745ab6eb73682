"""GPUs of several processes, one each: opening together, and what happens when one of them dies."""

from __future__ import annotations

import os
import time

import failing
import gpu_layers
import jax
import layers
import opening
import pytest
import running
import support
from support import assert_matches

from processes import launcher

pytestmark = [
    pytest.mark.gpu_only,
    pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two GPUs"),
]

MARGIN_S = 2.0  # how much later than the timeout an error may come
PLACES = {"num_processes": support.MAX_RANKS, "timeout_s": 120.0}
LAST = support.MAX_RANKS - 1
# On two GPUs, two processes each.
FOUR = {
    "num_processes": 4,
    "gpus": "JAX_LOCAL_DEVICE_IDS",
    "num_gpus": jax.device_count(),
    "timeout_s": 120.0,
}


@pytest.mark.parametrize("env", [{}, {"JAX_SM_FREE_NVSHMEM_PUTS": "1"}], ids=["pointers", "puts"])
def test_many_runs_of_two_buffers(env):
    launcher.run(running.run_many, 100, 8, env=env, **PLACES)


def test_many_runs_of_four_processes():
    launcher.run(running.run_many, 40, 8, **FOUR)


def test_every_process_may_see_all_gpus():
    launcher.run(running.run_many, 4, 2, gpus="JAX_LOCAL_DEVICE_IDS", **PLACES)


def test_groups():
    launcher.run(running.run_in_groups, **FOUR)


def test_a_fault_of_one_group_ends_the_processes_of_all():
    """Results are NaN there, and every process raises the same fault afterwards."""
    with launcher.start(gpu_layers.fail_in_one_group, **FOUR) as group:
        results = group.results()
        told = [line for line in group.output().splitlines() if "] jax_sm_free: " in line]
    for fault, error in results:
        for text in (fault, error):
            assert_matches(text, r"dispatch_send on rank 1: expected topk_idx in \[-1, 4\)")
    assert len(told) == 1, told
    assert_matches(told[0], "expected topk_idx in")


@pytest.mark.alone
def test_memory_of_closed_buffers_is_used_again():
    for in_use in launcher.run(gpu_layers.open_often, 6, **PLACES):
        assert in_use[-1] - in_use[1] < 100 << 20, in_use


def test_nothing_is_left_in_shared_memory():
    before = set(os.listdir("/dev/shm"))
    with launcher.start(gpu_layers.run_once, **PLACES) as group:
        for rank in group:
            rank.wait_for("has run once")
        for rank in group:
            rank.kill()
        names = set(os.listdir("/dev/shm")) - before
    assert not [name for name in names if name.startswith("jax_sm_free")]


def test_buffers_of_different_sizes_do_not_open():
    texts = launcher.run(opening.open_differently, {"num_slots": 3}, **PLACES)
    assert len(set(texts)) == 1
    assert_matches(texts[0], "got num_slots 2 in process 0 and 3 in process")


def test_processes_on_the_same_gpu_are_named():
    env = {"CUDA_VISIBLE_DEVICES": "0"}
    texts = launcher.run(gpu_layers.open_refused, num_processes=2, timeout_s=120.0, env=env)
    for text in texts:
        assert_matches(text, "expected a GPU for each process, seen processes 0 and 1 .* same one")


# ---------------------------------------------------------------------------- what goes wrong


def assert_fails_in_time(failures, *patterns, seconds=layers.TIMEOUT_S + MARGIN_S):
    for failure in failures:
        assert_matches(failure.fault, *patterns)
        assert failure.ran_s < seconds
        assert failure.closed_s < MARGIN_S


@pytest.mark.parametrize("places", [PLACES, FOUR], ids=["all", "four"])
@pytest.mark.parametrize("place", layers.PLACES)
def test_a_killed_process_is_named(place, places):
    with launcher.start(gpu_layers.fail_once, "pause", place, False, **places) as group:
        last = len(group) - 1
        group[last].wait_for(place)
        group[last].kill()
        ended = group.wait()
    assert [end.status for end in ended] == [*[0] * last, -9], group.output()
    # Rows that had left before may have arrived or not.
    waits = "dispatch_recv" if place == "before_send" else "(dispatch|combine)_recv"
    pattern = rf"{waits} on rank \d.*none from rank.* {last}"
    assert_fails_in_time([end.result for end in ended[:last]], pattern)


def test_a_death_while_nvshmem_starts_ends_all():
    """NVSHMEM waits without a limit, so JAX ends the processes that wait for the dead one."""
    distributed = {"heartbeat_timeout_seconds": 10}
    with launcher.start(gpu_layers.die_in_start, distributed=distributed, **PLACES) as group:
        ended = group.wait()
    assert ended[LAST].status == -9
    for end in ended[:LAST]:
        assert end.status == -6, group.output()


@pytest.mark.parametrize("place", layers.PLACES)
def test_a_process_that_raises_is_waited_for_and_named(place):
    *others, died = launcher.run(gpu_layers.fail_once, "raise", place, True, **PLACES)
    assert_fails_in_time(others, rf"_recv on rank \d, peer rank {LAST}: ", f"none from rank {LAST}")
    assert died.fault in {other.fault for other in others}


def test_a_process_that_is_stopped_for_long_is_named():
    """The stopped process gets the error when it goes on, and can open the next buffer."""
    with launcher.start(gpu_layers.fail_once, "pause", "before_send", True, **PLACES) as group:
        group[LAST].wait_for("before_send")
        group[LAST].stop()
        for rank in group[:LAST]:
            rank.wait_for("has failed")
        group[LAST].go_on()
        group[LAST].resume()
        *others, stopped = group.results()
    pattern = rf"dispatch_recv on rank \d, peer rank {LAST}: .*none from rank {LAST}"
    assert_fails_in_time(others, pattern)
    assert_matches(stopped.fault, pattern)


def test_a_process_that_is_stopped_shortly_is_slow():
    with launcher.start(failing.stop_shortly, **PLACES) as group:
        group[LAST].wait_for("before_send")
        group[LAST].stop()
        time.sleep(2.0)
        group[LAST].go_on()
        group[LAST].resume()
        group.results()


def test_a_process_that_closes_its_buffer_ends_the_others_waits():
    *others, _ = launcher.run(gpu_layers.close_early, **PLACES)
    assert_fails_in_time(others, r"dispatch_recv on rank \d", "was closed", seconds=MARGIN_S)
