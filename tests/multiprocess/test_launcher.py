"""The launcher: results, failures, time-outs, signals, and that nothing is left."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import programs
import pytest

from processes import launcher

pytestmark = pytest.mark.cpu_only

GONE_S = 30.0  # how long it may take until an orphan has been killed and reaped


def is_there(pid: int) -> bool:
    """Whether a process, or a zombie, has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 1), (2, 4)])
def test_results_by_rank(num_processes, num_devices):
    results = launcher.run(programs.add_up, 7, num_processes=num_processes, num_devices=num_devices)
    size = num_processes * num_devices
    total = 7.0 * size + size * (size - 1) / 2
    assert results == [(rank, size, [total] * num_devices) for rank in range(num_processes)]


def test_all_output_is_shown_when_one_fails(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    with launcher.start(programs.fail_in, 1, num_processes=2, distributed=None) as group:
        group[0].wait_for("waits")
        group[1].resume()
        with pytest.raises(launcher.LaunchError) as error:
            group.results()
        assert not any(is_there(r.pid) for r in group)
    text = str(error.value)
    assert text.startswith("ranks [0] did not end in time")
    assert re.search(r"^\[1\] ValueError: no such luck", text, re.M)
    assert re.search(r"^\[0\].*programs.py.*in fail_in", text, re.M)  # where rank 0 was
    assert text.endswith("exit status by rank: -9, 1")


def test_one_that_raises_ends_beside_one_that_goes_on():
    with launcher.start(programs.fail_in, 0, num_processes=1, distributed=None) as group:
        group[0].resume()
        (ended,) = group.wait()
    assert (ended.status, ended.result) == (1, None)
    assert "no such luck" in ended.output


def test_too_late_is_killed_with_its_children():
    with launcher.start(
        programs.hang_with_child, num_processes=1, distributed=None, timeout_s=2.0
    ) as group:
        group[0].wait_for("child")
        with pytest.raises(launcher.LaunchError, match="in hang_with_child"):
            group.wait()
        child = int(re.search(r"child (\d+)", group.output())[1])
    assert not is_there(group[0].pid)
    # The child's new parent may take a moment to reap it.
    end = time.monotonic() + GONE_S
    while is_there(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_there(child)


def test_killed_and_stopped_where_it_said_so():
    with launcher.start(programs.wait_between, num_processes=3, distributed=None) as group:
        for rank in group:
            rank.wait_for("before")
            rank.resume()
        group[1].wait_for("count 2")
        group[1].kill()
        assert not is_there(group[1].pid)
        group[2].wait_for("count 2")
        group[2].stop()
        stopped = group.log.settled(2)
        group[0].wait_for("count 29")
        assert group.log.of(2) == stopped
        group[2].go_on()
        ended = group.wait()
    assert [end.status for end in ended] == [0, -signal.SIGKILL, 0]
    assert [end.result for end in ended] == [29, None, 29]
    assert "count 29" not in ended[1].output


def test_a_rank_that_ends_before_it_comes_this_far():
    with launcher.start(programs.die, num_processes=1, distributed=None) as group:
        with pytest.raises(launcher.LaunchError, match=r"ended \(-11\) and did not write 'far'"):
            group[0].wait_for("far")
        (ended,) = group.wait()
    assert "Segmentation fault" in ended.output  # and where


def fail_beside_a_rank(pids):
    with launcher.start(programs.wait_between, num_processes=1, distributed=None) as group:
        pids.append(group[0].pid)
        group[0].wait_for("before")
        raise ValueError("of the test")


def test_output_is_added_to_an_error_of_the_test():
    pids = []
    with pytest.raises(ValueError, match="of the test") as error:
        fail_beside_a_rank(pids)
    assert "[0] before" in error.value.__notes__[0]
    assert not is_there(pids[0])


def test_free_ports_are_none_that_the_kernel_gives_away(tmp_path, monkeypatch):
    given = tmp_path / "given"
    monkeypatch.setattr(launcher, "_GIVEN_PORTS", given)
    given.write_text("9000\t65000\n")
    for _ in range(20):
        assert not 9000 <= launcher.free_port() <= 65000
    given.write_text("1024\t65535\n")  # If the kernel gives away all ports, one of those has to do.
    assert launcher.free_port() > 1024


def test_starts_again_on_the_same_port():
    port = launcher.free_port()
    for kill in (True, False):
        with launcher.start(programs.add_up_announced, num_processes=2, port=port) as group:
            for rank in group:
                rank.wait_for("ready")
            if kill:
                for rank in group:
                    rank.kill()
            for rank in group:
                rank.resume()
            ended = group.wait()
        assert [end.status for end in ended] == [-signal.SIGKILL if kill else 0] * 2


def test_scripts_and_modules():
    with launcher.start(
        pathlib.Path(programs.__file__), "a", 1, num_processes=2, distributed=None
    ) as group:
        outputs = [end.output for end in group.wait()]
    assert [f"as a script ['a', '1'] {rank}" in out for rank, out in enumerate(outputs)] == [
        True
    ] * 2
    with launcher.start("platform", num_processes=1, distributed=None) as group:
        assert sys.platform in group.wait()[0].output.lower()


def test_ranks_end_with_the_launcher():
    """Also when the launcher is killed; here it runs in a process of its own."""
    lines = (
        "import programs, time",
        "from processes import launcher",
        "with launcher.start(programs.wait_between, num_processes=1, distributed=None) as group:",
        "    group[0].wait_for('before')",
        "    print(group[0].pid, flush=True)",
        "    time.sleep(600)",
    )
    folders = [str(launcher.ROOT), str(pathlib.Path(__file__).parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        stdout=subprocess.PIPE,
    )
    try:
        rank = int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
    end = time.monotonic() + GONE_S
    while is_there(rank) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_there(rank)
