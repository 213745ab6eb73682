"""What can be seen of transport "nvshmem" without a GPU: when it is chosen, and what it refuses."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from support import make_config

from jax_sm_free import transports
from jax_sm_free.transports import nvshmem

CONFIG = make_config(2)


def mesh_of(*processes):
    """A GPU of each of these processes."""
    client = types.SimpleNamespace(runtime_type="real")
    devices = [
        types.SimpleNamespace(platform="gpu", process_index=process, client=client)
        for process in processes
    ]
    return types.SimpleNamespace(devices=np.array(devices), axis_names=("ep",))


@pytest.mark.parametrize("transport", ["auto", "nvshmem"])
def test_connects_gpus_of_several_processes(transport):
    assert transports.choose(mesh_of(0, 1), transport).name == "nvshmem"


@pytest.mark.parametrize(
    ("processes", "transport", "right"),
    [((0, 1), "cuda_peer", "nvshmem"), ((0, 0), "nvshmem", "cuda_peer")],
)
def test_the_transport_that_fits_is_named(processes, transport, right):
    text = f"expected transport '{right}' for devices of .* got '{transport}'"
    with pytest.raises(ValueError, match=text):
        transports.choose(mesh_of(*processes), transport)


@pytest.mark.parametrize("transport", ["auto", "nvshmem"])
def test_two_gpus_of_a_process_are_refused(transport):
    with pytest.raises(ValueError, match="one GPU of each process, got 2 of process 1"):
        transports.choose(mesh_of(0, 1, 1), transport)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    transport = transports.choose(mesh_of(0, 1), "nvshmem")
    with pytest.raises(ImportError, match="pip install nvidia-nvshmem-cu13"):
        transport.open(mesh_of(0, 1), ("ep",), CONFIG, "any")


def test_the_library_is_found_in_its_package(monkeypatch, tmp_path):
    library = tmp_path / "nvidia" / "nvshmem" / "lib" / "libnvshmem_host.so.3"
    library.parent.mkdir(parents=True)
    library.touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert nvshmem.library() == str(library)
