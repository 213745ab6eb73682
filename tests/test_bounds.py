"""Bounds of GPUs: refused where a buffer opens and where programs are compiled ahead of time."""

from __future__ import annotations

import pathlib
import re
import types

import aot
import jax.numpy as jnp
import numpy as np
import pytest
from support import make_config

import jax_sm_free as smf
from jax_sm_free import bounds, transports, wire_format
from jax_sm_free.reference import float8
from jax_sm_free.transports.in_process import InProcess
from jax_sm_free.transports.ucx import Ucx

CONFIG = make_config(2)
# Sizes of which one is larger by one than GPUs support, and the error.
TOO_MANY_RANKS = make_config(33, num_experts=66), r"ep_size must be at most 32 on GPUs, got 33"
TOO_MANY_EXPERTS = (
    make_config(4, num_experts=32764),
    r"num_experts must be at most 32763 on GPUs with ep_size=4, got 32764",
)


def gpus(count: int, num_processes: int):
    """A mesh of GPUs that do as if they were there."""
    client = types.SimpleNamespace(runtime_type="real")
    devices = [
        types.SimpleNamespace(platform="gpu", process_index=i % num_processes, client=client)
        for i in range(count)
    ]
    return types.SimpleNamespace(devices=np.array(devices), axis_names=("ep",))


@pytest.mark.parametrize(("config", "words"), [TOO_MANY_RANKS, TOO_MANY_EXPERTS])
@pytest.mark.parametrize("transport", ["cuda_peer", "nvshmem"])
def test_opening_on_gpus_is_refused(config, words, transport, monkeypatch):
    monkeypatch.setattr("jax_sm_free.transports.nvshmem.library", lambda: "")
    mesh = gpus(config.ep_size, 1 if transport == "cuda_peer" else config.ep_size)
    with pytest.raises(ValueError, match=words):
        transports.choose(mesh, transport).open(mesh, ("ep",), config, None)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("config", "words"), [TOO_MANY_RANKS, TOO_MANY_EXPERTS])
def test_compiling_ahead_of_time_is_refused(config, words):
    """With the same error, on a machine without a GPU."""
    with pytest.raises(ValueError, match=words):
        smf.Buffer.from_config(aot.mesh(num_gpus=config.ep_size), "ep", config)


@pytest.mark.cpu_only
def test_compiling_ahead_of_time_goes_up_to_the_bounds():
    bounds.check_gpus(make_config(1, num_experts=32766))
    config = make_config(32, num_experts=64)
    with smf.Buffer.from_config(aot.mesh(num_gpus=32), "ep", config) as buffer:
        assert buffer.transport == "abstract"


@pytest.mark.parametrize("transport", [InProcess(), Ucx()])
def test_cpus_have_no_such_bounds(transport):
    for config, _ in (TOO_MANY_RANKS, TOO_MANY_EXPERTS):
        transport.check(config)


# ------------------------------------------------------------------------ the numbers of C++

CC = pathlib.Path(smf.__file__).parents[1] / "cc"


def constant(name: str) -> float:
    """The value of a constexpr number in the C++ sources."""
    found = {
        value
        for path in CC.rglob("*.h")
        for value in re.findall(rf"constexpr \w+ {name} = ([-+.e\d]+)F?;", path.read_text())
    }
    assert len(found) == 1, f"expected one value of {name} in {CC}, got {found}"
    return float(found.pop())


@pytest.mark.skipif(not CC.exists(), reason="reads the C++ sources of a checkout")
def test_cpp_has_the_same_numbers():
    assert constant("kMaxRanks") == bounds.MAX_GPU_RANKS
    assert constant("kMaxSlots") == bounds.MAX_NUM_SLOTS
    assert constant("kTileEntries") * 64 == bounds.MAX_GPU_COUNTERS
    assert "NumKeys(config) > kTileEntries * 64" in "".join(
        path.read_text() for path in CC.rglob("*.cc")
    )
    assert constant("kScaleColumns") == wire_format.FLOAT8.scale_columns
    assert constant("kMinAmax") == float8.MIN_AMAX
    assert constant("kMaxValue") == float8.MAX_FLOAT8
    formats = (CC / "wire_format.h").read_text()
    assert f"kFloat8Block128 = {wire_format.FLOAT8.number}" in formats
    assert float(jnp.finfo(wire_format.FLOAT8.dtype).max) == float8.MAX_FLOAT8


@pytest.mark.skipif(not CC.exists(), reason="reads the C++ sources of a checkout")
def test_cpp_has_the_sizes_that_python_gives():
    struct = (CC / "config.h").read_text().partition("struct Config {")[2].partition("};")[0]
    assert set(re.findall(r"^  \w+ (\w+) = ", struct, re.MULTILINE)) == set(CONFIG.sizes())
