"""The GPU benchmark over processes, small and on CPU devices: that it runs and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from processes import launcher

pytestmark = [pytest.mark.cpu_only, pytest.mark.long]

SMALL = (
    "--processes=2 --rounds=1 -- --tokens=32 --hidden=64 --experts=16 --top_k=4 --gemm_rows=16 "
    "--gemms=2 --steps=2 --layer_steps=2 --expert_width=8 --shared_width=8 --seconds=0 "
    "--probe_mib=1"
)


def test_command(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_processes", f"--out={tmp_path}", *SMALL.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(launcher.ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "bench_gpu_processes.json").read_text())
    assert found["processes"] == 2
    names = [row["name"] for row in found["rows"]]
    timed = ["dispatch", "combine", "layer forward", "layer forward + backward"]
    timed += ["dispatch + gradient", "combine + gradient"]
    timed += [f"{op} exposed, 2 GEMMs" for op in ("dispatch", "combine")]
    assert sorted(names) == sorted(timed)
    for row in found["rows"]:
        assert len(row["one"]) == len(row["several"]) == 1
        assert f"{row['name']} " in run.stdout
    assert min(found["rows"][0]["one"] + found["rows"][0]["several"]) > 0
