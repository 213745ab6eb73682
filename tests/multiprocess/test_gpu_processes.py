"""GPUs of several processes, one each: opening together, and what happens when one of them dies."""

from __future__ import annotations

import os

import gpu_layers
import launcher
import layers
import pytest
import support
from support import assert_matches

pytestmark = [
    pytest.mark.gpu_only,
    pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two GPUs"),
]

MARGIN_S = 2.0  # how much later than the timeout an error may come
PLACES = {"num_processes": support.MAX_RANKS, "timeout_s": 120.0}


@pytest.mark.parametrize("env", [{}, {"JAX_SM_FREE_NVSHMEM_PUTS": "1"}], ids=["pointers", "puts"])
def test_many_runs_of_two_buffers(env):
    launcher.run(layers.run_many, 100, 8, env=env, **PLACES)


def test_every_process_may_see_all_gpus():
    launcher.run(layers.run_many, 4, 2, gpus="JAX_LOCAL_DEVICE_IDS", **PLACES)


def test_memory_of_closed_buffers_is_used_again():
    for in_use in launcher.run(gpu_layers.open_often, 6, **PLACES):
        assert in_use[-1] - in_use[1] < 100 << 20, in_use


def test_nothing_is_left_in_shared_memory():
    before = set(os.listdir("/dev/shm"))
    with launcher.start(gpu_layers.die_and_time_out, **PLACES) as group:
        for rank in group:
            rank.wait_for("has run once")
        for rank in group:
            rank.kill()
        names = set(os.listdir("/dev/shm")) - before
    assert not [name for name in names if name.startswith("jax_sm_free")]


def test_buffers_of_different_sizes_do_not_open():
    texts = launcher.run(layers.open_differently, {"num_slots": 3}, **PLACES)
    assert len(set(texts)) == 1
    assert_matches(texts[0], "got num_slots 2 in process 0 and 3 in process")


def test_processes_on_the_same_gpu_are_named():
    env = {"CUDA_VISIBLE_DEVICES": "0"}
    texts = launcher.run(gpu_layers.open_refused, num_processes=2, timeout_s=120.0, env=env)
    for text in texts:
        assert_matches(text, "expected a GPU for each process, seen processes 0 and 1 .* same one")


def test_a_killed_process_is_named():
    last = support.MAX_RANKS - 1
    with launcher.start(gpu_layers.die_and_time_out, **PLACES) as group:
        for rank in group:
            rank.wait_for("has run once")
        group[last].kill()
        for rank in group[:last]:
            rank.resume()
        ended = group.wait()
    assert ended[last].status == -9
    for end in ended[:last]:
        fault, ran, closed = end.result
        assert_matches(fault, rf"dispatch_recv on rank \d.*none from rank.* {last}")
        assert ran < layers.TIMEOUT_S + MARGIN_S
        assert closed < MARGIN_S
