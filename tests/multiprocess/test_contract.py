"""The tests of one process, over the devices of several: the same programs, bit by bit."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

import jax
import pytest

from processes import launcher

pytestmark = [pytest.mark.timeout(1000), pytest.mark.long]

TESTS = pathlib.Path(__file__).parents[1]
PARTS = {
    "apis": ("api", "buffer", "programs", "meshes", "stats"),
    "numbers": ("numbers", "wire_dtype", "wire_dtype_gradients"),
    "flights": ("flight", "broken_rules"),
    "stress": ("stress",),
    "faults": ("faults", "routing"),
    "tiers": ("tiers", "tiers_stats"),
}
PLACES = {
    "apis": (2, 1),
    "numbers": (2, 2),
    "flights": (2, 2),
    "stress": (4, 1),
    "faults": (2, 4),
    "tiers": (2, 2),
}
# Of the tests of a part, those with one of these words in their names; else all.
SELECTED = {"tiers": "between_nodes or float8 or in_flight or tiers_stats"}


@pytest.mark.cpu_only
@pytest.mark.parametrize("part", PARTS)
def test_over_cpu_processes(part):
    num_processes, num_devices = PLACES[part]
    run(part, num_processes=num_processes, num_devices=num_devices)


@pytest.mark.gpu_only
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("num_processes", [2, 4])
def test_over_gpu_processes(num_processes, part):
    run(
        part,
        num_processes=num_processes,
        gpus="JAX_LOCAL_DEVICE_IDS",
        num_gpus=jax.device_count(),
    )


def run(part: str, **places: Any) -> None:
    # -x: after a failure the processes no longer run the same tests.
    options = ["-qx", "-p", "over_processes", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-k", SELECTED.get(part, "")]
    folders = [str(TESTS), str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
    with launcher.start(
        "pytest",
        *options,
        *(TESTS / f"test_{name}.py" for name in PARTS[part]),
        timeout_s=900,
        # Every process has to draw the same random examples.
        env={"CI": "1", "PYTHONPATH": os.pathsep.join([str(launcher.ROOT), *folders])},
        **places,
    ) as group:
        # JAX's shutdown would raise the errors of runs a second time.
        group.results(shutdown=False)
        assert " passed" in group.log.of(0)
