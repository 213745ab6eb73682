"""Two tiers over CPU devices of several processes, and what happens when one of them fails."""

from __future__ import annotations

import time

import failing
import layers
import pytest
import running
import tiers
from support import assert_matches
from test_ucx import assert_fails_in_time

from processes import launcher

pytestmark = pytest.mark.cpu_only

# Two nodes of two processes each, with one rank each: ranks 0 and 1 are node 0.
NODES = {"num_processes": 4, "num_devices": 1}


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("mesh", tiers.MESHES)
def test_as_one_tier_and_as_the_reference(mesh, num_processes, num_devices):
    launcher.run(tiers.compare, mesh, num_processes=num_processes, num_devices=num_devices)


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 4), (4, 1)])
def test_many_runs_of_two_buffers(num_processes, num_devices):
    places = {"num_processes": num_processes, "num_devices": num_devices}
    launcher.run(running.run_many, 100, 16, 2, timeout_s=120, **places)


# ---------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("place", layers.PLACES)
def test_a_node_that_is_killed_is_named(place):
    """At once, not after the timeout. The ranks of the other node can go on without it."""
    acts = {2: ("pause", place), 3: ("pause", place)}
    with launcher.start(failing.fail, acts, 2, layers.LONG_S, 2, **NODES) as group:
        for rank in group[2:]:
            rank.wait_for(place)
        for rank in group[2:]:
            rank.kill()
        ended = group.wait()
    assert [end.status for end in ended] == [0, 0, -9, -9], group.output()
    # What a node has sent before arrives. It is missed first where it would have forwarded.
    op = "dispatch_forward" if place == "before_send" else "combine_recv"
    waits = rf"{op} on rank [01] of node 0, peer rank [23] of node 1: expected a message from rank"
    results = [end.result for end in ended[:2]]
    assert_fails_in_time(results, waits, "process is gone", seconds=layers.AT_ONCE_S)


def test_a_rail_peer_that_is_killed_in_its_forward_is_named():
    """Its forward waits for rank 1, which has not sent yet."""
    acts = {1: ("pause", "before_send"), 3: ("announce", "between")}
    with launcher.start(failing.fail, acts, 3, layers.LONG_S, 2, **NODES) as group:
        group[1].wait_for("before_send")
        group[3].wait_for("between")
        time.sleep(0.5)
        group[3].kill()
        group[0].wait_for("has failed", seconds=layers.AT_ONCE_S)
        group[1].resume()
        ended = group.wait()
    assert [end.status for end in ended] == [0, 0, 0, -9], group.output()
    waits = "dispatch_recv on rank 2 of node 1, peer rank 3 of node 1: expected a message from rank"
    for end, seconds in zip(
        ended[:3], (layers.AT_ONCE_S, layers.LONG_S, layers.AT_ONCE_S), strict=True
    ):
        assert_fails_in_time([end.result], waits, "process is gone", seconds=seconds)


def test_a_rail_peer_that_is_stopped_before_its_forward_is_named():
    """The stopped process gets the error when it goes on, and can open the next buffer."""
    acts = {3: ("pause", "between")}
    with launcher.start(failing.fail, acts, None, layers.TIMEOUT_S, 2, **NODES) as group:
        group[3].wait_for("between")
        group[3].stop()
        for rank in group[:3]:
            rank.wait_for("has failed")
        group[3].go_on()
        group[3].resume()
        *others, stopped = group.results()
    # Rank 2 waits for its rows. What rank 2 makes of them is missed by rank 0.
    waits = r"_recv on rank \d of node \d, peer rank [23] of node 1: ", "none from rank"
    assert_fails_in_time(others, *waits)
    assert_matches(stopped[0], *waits)


@pytest.mark.parametrize(
    ("place", "waits"),
    [
        ("before_send", "dispatch_forward on rank 1 of node 0, peer rank 3 of node 1: "),
        ("between", "dispatch_recv on rank 2 of node 1, peer rank 3 of node 1: "),
        ("before_combine", "combine_forward on rank 2 of node 1, peer rank 3 of node 1: "),
    ],
)
def test_a_rank_that_raises_is_waited_for_and_named(place, waits):
    """It does not send, or it does not forward."""
    acts = {3: ("raise", place)}
    with launcher.start(failing.fail, acts, None, layers.TIMEOUT_S, 2, **NODES) as group:
        for rank in group[:3]:
            rank.wait_for("has failed")
        group[3].resume()
        *others, died = group.results()
    assert_matches(died[0], "this process died")
    assert_fails_in_time(others, waits, "none from rank")


@pytest.mark.parametrize("place", layers.PLACES)
def test_a_rank_that_raises_and_goes_on_is_named_at_once(place):
    """Its next run is not taken for the one that the others wait in."""
    acts = {3: ("raise, go on", place)}
    *others, died = launcher.run(failing.fail, acts, None, layers.LONG_S, 2, **NODES)
    assert_matches(died[0], "this process died")
    text = "started 1 times (more|less) often" if place == "before_send" else "has begun run 2"
    assert_fails_in_time(others, "rank 3 of node 1", text, seconds=layers.AT_ONCE_S)


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ("name", ("is jit_ours,", "is jit_theirs,")),
        ("shape", (r"jit_ours, dispatch_send 0 \(float32\[5, 6\]", r"\(float32\[4, 6\]")),
        ("copies", ("jit_ours, dispatch_send 0", "copy 0 of 2")),
    ],
)
def test_ranks_that_run_other_programs_are_named(how, texts):
    """The error comes at once, also to ranks that exchange nothing with the one that differs."""
    for error, took in launcher.run(failing.run_differently, how, 2, **NODES):
        assert took < 20.0  # compiling included
        assert_matches(error, "of node .*same programs in the same order", *texts)
