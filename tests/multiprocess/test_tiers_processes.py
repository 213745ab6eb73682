"""Two tiers over processes: results are those of the reference; faults name ranks and nodes."""

from __future__ import annotations

import failing
import layers
import pytest
import tiers
from support import assert_matches

from processes import launcher

pytestmark = pytest.mark.cpu_only

# How much later than the timeout an error may come.
LATER_S = 2.0
# The shape of the mesh, and the axes of the buffer.
BY_NODE = ({"node": 2, "gpu": 4}, ("node", "gpu"))
PLACES = {
    "a_node_is_a_process": (2, 4, *BY_NODE),
    "a_node_has_two_processes": (4, 2, *BY_NODE),
    "four_nodes": (4, 2, {"node": 4, "gpu": 2}, ("node", "gpu")),
    "neighbours_are_on_other_nodes": (2, 4, {"node": 2, "gpu": 4}, ("gpu", "node")),
    "each_process_is_on_each_node": (2, 4, {"a": 2, "node": 2, "b": 2}, ("a", "node", "b")),
    "two_groups": (2, 4, {"node": 2, "dp": 2, "gpu": 2}, ("node", "gpu")),
}


@pytest.mark.parametrize("name", PLACES)
def test_results_are_those_of_one_tier_and_of_the_reference(name):
    num_processes, num_devices, shape, axes = PLACES[name]
    places = {"num_processes": num_processes, "num_devices": num_devices}
    launcher.run(tiers.check_against_reference, shape, axes, timeout_s=120, **places)


@pytest.mark.long
def test_each_node_is_a_host(hosts):
    places = {"num_processes": 2, "num_devices": 4, "hosts": hosts.hosts}
    launcher.run(tiers.check_against_reference, *BY_NODE, timeout_s=120, **places)


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 2), (4, 1)])
def test_many_runs_beside_one_tier(num_processes, num_devices):
    places = {"num_processes": num_processes, "num_devices": num_devices}
    launcher.run(tiers.run_many, 100, 16, 2, timeout_s=120, **places)


# ---------------------------------------------------------------------------- what goes wrong


# Who may be the first to end its wait if rank 3 of 4 does not go on. Ranks that wait for it keep
# rank 0 waiting: rank 1 forwards to rank 0, and rank 2 sums for rank 0.
NEVER_SENT = (
    r"dispatch_(forward on rank 1 of node 0|recv on rank 2 of node 1), peer rank 3 of node 1: "
    r".*none from rank 3"
    r"|dispatch_recv on rank 0 of node 0, peer rank 1 of node 0: .*none from rank 1"
)
NEVER_FORWARDED = (
    r"(dispatch_recv on rank 2 of node 1|combine_(forward|recv) on rank 1 of node 0), "
    r"peer rank 3 of node 1: .*none from rank 3"
    r"|combine_(forward|recv) on rank 0 of node 0, peer rank [12] of node [01]: "
    r".*none from rank [12]"
    # A process that is stopped may not have put all that it has sent on the wire.
    rf"|{NEVER_SENT}"
)


def assert_named(results, *patterns, seconds):
    """That the error of each process, and what `check` raised, name op, ranks and nodes."""
    for error, took, kept in results:
        for text in (error, kept):  # one may be the fault of another rank
            assert_matches(text, *patterns)
        assert took < seconds, error


@pytest.mark.parametrize("place", layers.PLACES_OF_TIERS)
def test_a_killed_node_is_named(place):
    """Both of its processes are gone; the other node learns it at once, and can go on alone."""
    args = ("pause", place, 2, layers.LONG_S, 2, 2)
    with launcher.start(failing.fail_once, *args, num_processes=4) as group:
        for rank in group[2:]:
            rank.wait_for(place)
        for rank in group[2:]:
            rank.kill()
        ended = group.wait()
    assert [end.status for end in ended] == [0, 0, -9, -9], group.output()
    assert_named(
        [end.result for end in ended[:2]],
        r"(dispatch|combine)_(forward|recv) on rank [01] of node 0, peer rank [23] of node 1: ",
        "process is gone",
        seconds=layers.AT_ONCE_S,
    )


def test_a_process_that_is_killed_in_its_forward_is_named():
    """Rank 1 waits for rank 3, which is late, and is killed meanwhile."""
    args = ("pause", "before_send", 0, layers.LONG_S, 2)
    with launcher.start(failing.fail_once, *args, num_processes=4) as group:
        group[3].wait_for("before_send")
        group[1].kill()
        for number in (0, 2):
            group[number].wait_for("has failed", seconds=layers.AT_ONCE_S)
        group[3].resume()
        ended = group.wait()
    assert [end.status for end in ended] == [0, -9, 0, 0], group.output()
    assert_named(
        [ended[number].result for number in (0, 2, 3)],
        r"dispatch_(forward|recv) on rank [023] of node [01], peer rank 1 of node 0: ",
        "process is gone",
        seconds=layers.AT_ONCE_S,
    )


@pytest.mark.parametrize("how", ["stopped", "late"])
@pytest.mark.parametrize("place", ["before_send", "between"])
def test_a_process_that_neither_sends_nor_forwards_is_named(place, how):
    """After the timeout; it gets the error when it goes on, and all can open the next buffer."""
    args = ("pause", place, None, layers.TIMEOUT_S, 2)
    with launcher.start(failing.fail_once, *args, num_processes=4) as group:
        group[3].wait_for(place)
        if how == "stopped":
            group[3].stop()
        for rank in group[:3]:
            rank.wait_for("has failed")
        if how == "stopped":
            group[3].go_on()
        group[3].resume()
        *others, late = group.results()
    named = NEVER_SENT if place == "before_send" else NEVER_FORWARDED
    assert_named(others, named, seconds=layers.TIMEOUT_S + LATER_S)
    assert_matches(late[0], named)


def test_a_process_that_raises_before_its_send_is_named():
    args = ("raise", "before_send", None, layers.TIMEOUT_S, 2)
    with launcher.start(failing.fail_once, *args, num_processes=4) as group:
        for rank in group[:3]:
            rank.wait_for("has failed")
        group[3].resume()
        *others, died = group.results()
    assert_matches(died[0], "this process died")
    assert_named(others, NEVER_SENT, seconds=layers.TIMEOUT_S + LATER_S)


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ("name", ("is jit_ours,", "is jit_theirs,")),
        ("shape", (r"jit_ours, dispatch_send 0 \(float32\[5, 6\]", r"\(float32\[4, 6\]")),
    ],
)
def test_processes_that_run_other_programs_are_named(how, texts):
    for error, took in launcher.run(
        failing.run_differently, how, 2, num_processes=2, num_devices=2
    ):
        assert took < 20.0  # compiling included
        assert_matches(error, "same programs in the same order", "run 1 of this buffer", *texts)
