"""CPU devices of several processes: opening together, and what happens when one of them fails."""

from __future__ import annotations

import time

import failing
import layers
import opening
import pytest
import running
from support import assert_matches

from processes import launcher

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 1), (2, 4)])
def test_many_runs_of_two_buffers(num_processes, num_devices):
    """JAX 0.10.2 hangs with more than about 32 runs in flight, whatever they run."""
    places = {"num_processes": num_processes, "num_devices": num_devices}
    launcher.run(running.run_many, 300, 16, timeout_s=120, **places)


def test_a_buffer_over_the_devices_of_each_process():
    launcher.run(running.run_alone, num_processes=2, num_devices=2)


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 1), (2, 2)])
def test_mapped_calls(num_processes, num_devices):
    launcher.run(running.run_mapped, 3, num_processes=num_processes, num_devices=num_devices)


def test_a_layer_opens_its_buffer_while_it_is_traced():
    launcher.run(running.run_found_while_traced, num_processes=2, num_devices=2)


@pytest.mark.parametrize(("num_processes", "num_devices"), [(4, 1), (2, 2)])
def test_groups(num_processes, num_devices):
    launcher.run(running.run_in_groups, num_processes=num_processes, num_devices=num_devices)


def test_programs_from_a_cache_of_one_process(tmp_path):
    """The first process alone writes and reads JAX's cache: it runs what it has not compiled."""
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for _ in range(2):
        launcher.run(running.run_shared, num_processes=2, num_devices=2, env=env)
        assert list(tmp_path.iterdir())


def test_a_process_that_has_compiled_equal_programs_is_in_step():
    launcher.run(running.run_after_others_were_compiled, num_processes=2, num_devices=2)


# --------------------------------------------------------------------------- opening together


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [("top_k", 2, 1), ("num_slots", 2, 3), ("timeout_s", 60.0, 61.0), ("max_tokens", 5, 6)],
)
def test_buffers_of_different_sizes_do_not_open(name, here, there):
    texts = launcher.run(opening.open_differently, {name: there}, num_processes=2)
    assert texts[0] == texts[1]
    assert_matches(
        texts[0],
        f"got {name} {here} in process 0 and {there} in process 1",
    )


def test_a_process_without_ucx_is_named():
    here, there = launcher.run(opening.open_without_ucx, num_processes=2)
    assert_matches(there, "^ImportError: expected the package libucx-cu13")
    assert_matches(here, "^RuntimeError: .*process 1 could not: ImportError: .*libucx-cu13")


# ---------------------------------------------------------------------------- what goes wrong


def assert_fails_in_time(results, *patterns, seconds=layers.TIMEOUT_S + layers.MARGIN_S):
    for error, took, kept in results:
        assert took < seconds, error
        assert_matches(error, *patterns)
        assert_matches(kept, *patterns)  # maybe the fault of another rank


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("place", layers.PLACES)
def test_a_killed_process_is_named(place, num_devices):
    """At once, not after the timeout; the others can go on without it."""
    args = ("pause", place, 2, layers.LONG_S)
    with launcher.start(
        failing.fail_once, *args, num_processes=3, num_devices=num_devices
    ) as group:
        group[2].wait_for(place)
        group[2].kill()
        ended = group.wait()
    assert [end.status for end in ended] == [0, 0, -9], group.output()
    # Rows that had left before may have arrived or not.
    waits = "dispatch_recv" if place == "before_send" else "(dispatch|combine)_recv"
    bad = "" if place == "between" else rf"peer rank [{2 * num_devices}-{3 * num_devices - 1}]: "
    patterns = (rf"{waits} on rank \d", bad, "expected a message from rank", "process is gone")
    results = [end.result for end in ended[:2]]
    assert_fails_in_time(results, *patterns, seconds=layers.AT_ONCE_S)


def test_a_killed_process_that_nobody_reaped_is_named():
    """A launcher may reap another process first, or none at all."""
    args = ("pause", "before_send", 1, layers.LONG_S)
    with launcher.start(failing.fail_once, *args, num_processes=2) as group:
        group[1].wait_for("before_send")
        group[1].kill_unreaped()
        group[0].wait_for("has failed", seconds=layers.AT_ONCE_S)
        assert group[1].status is None
        group[1].kill()
        error, seconds, _ = group.wait()[0].result
    assert seconds < layers.MARGIN_S
    assert_matches(error, "its process is gone: process [0-9]+ has ended")


@pytest.mark.parametrize("place", layers.PLACES)
def test_a_process_that_raises_is_waited_for_and_named(place):
    args = ("raise", place, None, layers.TIMEOUT_S)
    with launcher.start(failing.fail_once, *args, num_processes=3) as group:
        for rank in group[:2]:
            rank.wait_for("has failed")
        group[2].resume()
        *others, died = group.results()
    assert_matches(died[0], "this process died")
    assert_fails_in_time(others, r"_recv on rank \d, peer rank 2: ", "none from rank 2")


@pytest.mark.parametrize("place", layers.PLACES)
def test_a_process_that_raises_and_goes_on_is_named_at_once(place):
    """Its next run is not taken for the one that the others wait in."""
    args = ("raise, go on", place, None, layers.LONG_S)
    *others, died = launcher.run(failing.fail_once, *args, num_processes=3)
    assert_matches(died[0], "this process died")
    text = "started 1 times (more|less) often" if place == "before_send" else "has begun run 2"
    assert_fails_in_time(others, "rank 2", text, seconds=layers.AT_ONCE_S)


def test_a_process_that_is_stopped_for_long_is_named():
    """The stopped process gets the error when it goes on, and can open the next buffer."""
    args = ("pause", "before_send", None, layers.TIMEOUT_S)
    with launcher.start(failing.fail_once, *args, num_processes=3) as group:
        group[2].wait_for("before_send")
        group[2].stop()
        for rank in group[:2]:
            rank.wait_for("has failed")
        group[2].go_on()
        group[2].resume()
        *others, stopped = group.results()
    assert_fails_in_time(others, r"dispatch_recv on rank \d, peer rank 2: ", "none from rank 2")
    assert_matches(stopped[0], r"none from rank 2")


def test_a_process_that_is_stopped_shortly_is_slow():
    with launcher.start(failing.stop_shortly, num_processes=2, num_devices=2) as group:
        group[1].wait_for("before_send")
        group[1].stop()
        time.sleep(2.0)
        group[1].go_on()
        group[1].resume()
        group.results()


def test_a_process_that_closes_its_buffer_is_named():
    *others, _ = launcher.run(failing.close_early, num_processes=3)
    for error, took in others:
        assert took < layers.AT_ONCE_S
        assert_matches(error, r"dispatch_recv on rank \d, peer rank 2: ", "it closed its end")


def test_one_of_two_buffers_is_closed_or_fails():
    """They share a wire; what happens to one does not reach the other."""
    for closed, failed in launcher.run(failing.end_one_of_two, num_processes=2):
        assert_matches(closed, "its process is gone: it closed its end")
        assert_matches(failed, "none from rank 1")


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ("name", ("is jit_ours,", "is jit_theirs,")),
        ("shape", (r"jit_ours, dispatch_send 0 \(float32\[5, 6\]", r"\(float32\[4, 6\]")),
        ("copies", ("jit_ours, dispatch_send 0", "copy 0 of 2")),
    ],
)
def test_processes_that_run_other_programs_are_named(how, texts):
    """Their rows are never mixed: the error comes at once and shows both programs."""
    results = launcher.run(failing.run_differently, how, num_processes=2)
    for error, took in results:
        assert took < 20.0  # compiling included
        assert_matches(error, "same programs in the same order", "run 1 of this buffer", *texts)
