"""The tests of one process, over CPU devices of several: the same programs, bit by bit."""

from __future__ import annotations

import os
import pathlib
import sys

import launcher
import pytest

pytestmark = [pytest.mark.cpu_only, pytest.mark.timeout(1000), pytest.mark.long]

TESTS = pathlib.Path(__file__).parents[1]
SUITE = [
    (2, 1, ("api", "buffer", "programs")),
    (2, 2, ("numbers", "wire_dtype")),
    (4, 1, ("flight", "broken_rules", "stress")),
    (2, 4, ("faults", "routing")),
]


@pytest.mark.parametrize(("num_processes", "num_devices", "names"), SUITE)
def test_over_processes(num_processes, num_devices, names):
    # Processes that no longer do the same have nothing more to say: -x.
    options = ["-qx", "-p", "over_processes", "-p", "no:cacheprovider", "-p", "no:xdist"]
    folders = [str(TESTS), str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
    with launcher.start(
        "pytest",
        *options,
        *(TESTS / f"test_{name}.py" for name in names),
        num_processes=num_processes,
        num_devices=num_devices,
        timeout_s=900,
        # Every process has to draw the same random examples.
        env={"CI": "1", "PYTHONPATH": os.pathsep.join([str(launcher.ROOT), *folders])},
    ) as group:
        # JAX's shutdown raises once more what runs have raised.
        group.results(shutdown=False)
        assert " passed" in group.log.of(0)
