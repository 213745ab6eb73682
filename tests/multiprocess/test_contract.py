"""The tests of one process, over CPU devices of several: the same programs, bit by bit."""

from __future__ import annotations

import os
import pathlib
import sys

import launcher
import pytest

pytestmark = [pytest.mark.cpu_only, pytest.mark.timeout(600)]

TESTS = pathlib.Path(__file__).parents[1]
# What reads an array of other processes, or expects a buffer to go on after a fault.
LEFT_OUT = (
    "test_sent_and_never_received",
    "test_source_overwritten_after_send",
    "test_without_jit",
    "test_everything_replicated",
)


@pytest.mark.parametrize(
    ("num_processes", "num_devices", "name"),
    [
        (2, 1, "test_routing.py"),
        (4, 1, "test_programs.py"),
        (2, 4, "test_flight.py"),
        (2, 2, "test_wire_dtype.py"),
    ],
)
def test_over_processes(num_processes, num_devices, name):
    # Processes that no longer do the same have nothing more to say: -x.
    options = ["-qx", "-p", "over_processes", "-p", "no:cacheprovider", "-p", "no:xdist"]
    left_out = [f"--deselect={TESTS.name}/{name}::{test}" for test in LEFT_OUT]
    folders = [str(TESTS), str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
    with launcher.start(
        "pytest",
        *options,
        *left_out,
        TESTS / name,
        num_processes=num_processes,
        num_devices=num_devices,
        timeout_s=500,
        # Every process has to draw the same random examples.
        env={"CI": "1", "PYTHONPATH": os.pathsep.join([str(launcher.ROOT), *folders])},
    ) as group:
        group.results()
        assert " passed" in group.log.of(0)
