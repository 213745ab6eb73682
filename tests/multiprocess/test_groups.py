"""Several groups over processes: a fault in one ends the program in all, and is told once."""

from __future__ import annotations

import groups
import layers
import pytest
from support import assert_matches

from processes import launcher

pytestmark = pytest.mark.cpu_only

# Processes of how many devices each, and whether a group has devices of several processes.
PLACES = pytest.mark.parametrize(
    ("num_processes", "num_devices", "groups_span_processes"),
    [(4, 1, True), (2, 2, True), (2, 2, False)],
)
FAULTS = {
    "index": (r"dispatch_send on rank 1: expected topk_idx in \[-1, 4\), seen 100\d", 0.0),
    "stall": (r"dispatch_recv on rank \d, peer rank \d: .*none from rank \d", layers.TIMEOUT_S),
}


@PLACES
@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_of_one_group_ends_all_processes(
    how, num_processes, num_devices, groups_span_processes
):
    places = {"num_processes": num_processes, "num_devices": num_devices}
    text, timeout_s = FAULTS[how]
    with launcher.start(groups.fail_in_one_group, how, groups_span_processes, **places) as group:
        results = group.results()
        lines = [line for line in group.output().splitlines() if "jax_sm_free: " in line]
    for error, seconds, kept in results:
        assert seconds < timeout_s + layers.MARGIN_S, error
        assert_matches(error, text)
        assert_matches(kept, text)
    assert len(lines) == 1, lines
    assert_matches(lines[0], text)


@PLACES
def test_an_exchange_of_one_group_alone(num_processes, num_devices, groups_span_processes):
    """The others do not wait for it more than once."""
    places = {"num_processes": num_processes, "num_devices": num_devices}
    for seconds in launcher.run(groups.run_in_one_group_alone, groups_span_processes, **places):
        assert sum(seconds) < groups.ALL_PATIENCE_S + layers.MARGIN_S, seconds
        # A busy machine slows some runs down. A wait would slow all of them down.
        assert min(seconds[2:]) < groups.PATIENCE_S, seconds
