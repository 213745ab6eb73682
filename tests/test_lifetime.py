"""A buffer that nobody refers to any more, and programs that do not know."""

from __future__ import annotations

import functools
import gc
import time

import faulty_runs
import jax
import numpy as np
import pytest
import sample_programs
import support
from sample_inputs import layer_inputs
from support import make_config

import jax_sm_free as smf

CONFIG = make_config(num_experts=2 * support.SOME_RANKS)
PAUSE_S = 2.0
MARGIN_S = 8.0


def layer(api, seconds, x, *args):
    """Of ranks that sleep before their first send, and so before anything is in flight."""

    def on_host(x, seconds):
        time.sleep(float(seconds))
        return np.asarray(x)

    return sample_programs.layer(api, jax.pure_callback(on_host, jax.typeof(x), x, seconds), *args)


def open_and_compile():
    """The number of a buffer, and a program that alone refers to it."""
    buffer = support.open_buffer(CONFIG)
    run = support.on_ranks(functools.partial(layer, support.Api(buffer, smf)), buffer.mesh)
    return buffer._id, run


def inputs(seconds=0.0):
    return np.full(CONFIG.ep_size, seconds, np.float32), *layer_inputs(CONFIG)


@functools.cache
def expected_output():
    return support.runners(CONFIG, sample_programs.layer)[1](*layer_inputs(CONFIG))


def is_open(number):
    from jax_sm_free import _cpu

    try:
        _cpu.message_bytes(number, 0)
    except RuntimeError:
        return False
    return True


def assert_goes(number):
    """Waits until the buffer is closed. A program that is ending may keep it open for a moment."""
    deadline = time.monotonic() + MARGIN_S
    while is_open(number):
        assert time.monotonic() < deadline, "nobody refers to the buffer, but it is still open"
        gc.collect()
        time.sleep(0.01)


@pytest.fixture
def _quick_collections():
    """Leaves out of collections what other tests left: looking at it can take seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.cpu_only
@pytest.mark.usefixtures("_quick_collections")
def test_results_that_are_pending_outlive_the_buffer():
    """Collecting the buffer, and the program, ends nothing that was started."""
    number, run = open_and_compile()
    jax.block_until_ready(run(*inputs()))
    start = time.monotonic()
    out = run(*inputs(PAUSE_S))
    started = time.monotonic()
    del run
    gc.collect()
    collected = time.monotonic()
    assert collected - start < PAUSE_S, (
        "expected the buffer to be collected before the run has ended, got "
        f"{started - start:.1f} s to start the run and {collected - started:.1f} s to collect"
    )
    support.assert_same_bits(out, expected_output())
    assert_goes(number)


@pytest.mark.cpu_only
def test_a_compiled_program_keeps_its_buffer():
    number, run = open_and_compile()
    run = run.lower(*inputs()).compile()
    gc.collect()
    support.assert_same_bits(run(*inputs()), expected_output())
    del run
    assert_goes(number)


@pytest.mark.gpu_only
def test_a_buffer_that_nobody_refers_to_is_closed():
    """A program that was compiled for it and outlives it ends with an error."""
    _, run = open_and_compile()
    run = run.lower(*inputs()).compile()
    gc.collect()
    support.assert_matches(faulty_runs.error_of(run, *inputs()), "seen it is closed")
