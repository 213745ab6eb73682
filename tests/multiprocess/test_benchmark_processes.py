"""The benchmark of two processes, small: that it runs, and that every setting has its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from processes import launcher

pytestmark = pytest.mark.long

SMALL = ["--tokens=64", "--hidden=256", "--rounds=2", "--runs=1", "--gemms=1", "--megabits=400"]
SMALL += ["--starts=1", "--kills=1"]


@pytest.mark.cpu_only
def test_command(hosts, tmp_path):
    del hosts  # The benchmark makes its own, where that is possible.
    path = tmp_path / "times.json"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.processes", *SMALL, f"--out={path}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(launcher.ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(path.read_text())
    settings = ["1 process x 8", "2 x 4, shared memory", "2 x 4, cable", "2 x 4, 400 Mbit/s"]
    for operation in ("dispatch", "combine"):
        rows = [row for row in found["rows"] if row["operation"] == operation]
        assert [row["setting"] for row in rows] == settings
        assert all(len(row["times"]) == 2 and min(row["times"]) > 0 for row in rows)
        assert [row["link"] is not None for row in rows] == [False, True, True, True]
        assert [row["wire"] is not None for row in rows] == [False, False, True, True]
    # Both see how slow the cable is: 50 MB/s.
    assert 0 < found["links"]["2 x 4, 400 Mbit/s"] < 52e6
    assert 0 < rows[-1]["wire"] < 52e6
    assert len(found["starts"]) == 1
    assert all(0 < seconds < 60 for seconds in found["starts"])
    assert [len(seconds) for seconds in found["kills"].values()] == [1, 1]
    assert all(0 < s < 60 for seconds in found["kills"].values() for s in seconds)
    assert "are hidden" in found["summary"]
