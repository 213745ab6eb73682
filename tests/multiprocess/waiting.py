"""What ranks run in the tests of who waits for whom."""

from __future__ import annotations

import time

import jax
import layers

import jax_sm_free as smf
from processes import together


def wait_for_the_last(seconds: float) -> tuple[smf.BufferStats, float]:
    """What this process counts in a run in which the last one's send comes that much later.

    Returns:
      The counts, and the seconds that the run took in this process.
    """
    mesh = layers.mesh_of()
    with layers.open_buffer(mesh) as buffer:
        inputs, action = layers.make_inputs(mesh), layers.Action()
        run = layers.on_ranks(mesh, layers.layer_of(buffer, action))
        layers.run_well(run, mesh, inputs)
        before = buffer.stats()
        if jax.process_index() == jax.process_count() - 1:
            action.place, action.do = "before_send", lambda: time.sleep(seconds)
        start = time.monotonic()
        layers.check(run(*inputs), inputs)
        took = time.monotonic() - start
        counted = buffer.stats() - before
        together.meet(mesh)
        return counted, took
