"""Which transport connects the devices of a mesh, and opening a buffer over it."""

from __future__ import annotations

import collections
import functools
import importlib.util
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_sm_free import checks, identity, ucx
from jax_sm_free.bootstrap import Bootstrap, facts_of
from jax_sm_free.config import Config
from jax_sm_free.native import Native

_log = logging.getLogger(__name__)

# The platform whose devices a transport connects, and whether these are of several processes.
_TRANSPORTS = {
    "in_process": ("cpu", False),
    "ucx": ("cpu", True),
    "cuda_peer": ("cuda", False),
    "nvshmem": ("cuda", True),
}
_PLATFORM_NAMES = {"cpu": "cpu", "gpu": "cuda"}  # what JAX calls it -> what we do

# For each device ordinal its (group, rank, position in the mesh); None outside the mesh.
Places = list[tuple[int, int, int] | None]


def choose(mesh: Mesh, transport: str) -> str:
    """The transport for a mesh: of `_TRANSPORTS`, or "abstract" for devices that are not there.

    Args:
      mesh: the devices.
      transport: "auto", or the transport expected.

    Raises:
      ValueError: for an unknown transport, or one that does not connect these devices.
      NotImplementedError: for devices that no transport of this build reaches.
    """
    choices = ("auto", *_TRANSPORTS)
    if transport not in choices:
        raise ValueError(f"expected transport to be one of {choices}, got {transport!r}")
    devices = list(mesh.devices.flat)
    platforms = {device.platform for device in devices}
    if platforms == {"gpu"} and all(_is_abstract(device) for device in devices):
        return "abstract"
    processes = sorted({device.process_index for device in devices})
    platform = _PLATFORM_NAMES.get(devices[0].platform)
    if platform is None or len(platforms) > 1:
        raise NotImplementedError(
            f"expected a mesh of CPU devices or of GPUs, got devices of {sorted(platforms)}"
        )
    spans = processes != [jax.process_index()]
    fitting = [name for name, kind in _TRANSPORTS.items() if kind == (platform, spans)]
    if not fitting:
        raise NotImplementedError(
            f"expected all devices of the mesh in this process ({jax.process_index()}) for "
            f"{devices[0].platform} devices, got devices of processes {processes}"
        )
    chosen = fitting[0]
    if transport not in ("auto", chosen):
        raise ValueError(
            f"expected transport {chosen!r} for devices of {sorted(platforms)} in "
            f"{_count(processes)}, got {transport!r}"
        )
    if transport == "auto":
        _log.info(
            "transport %r: %d %s devices of %s",
            chosen,
            len(devices),
            devices[0].platform,
            _count(processes),
        )
    return chosen


def for_real(mesh: Mesh) -> str:
    """The transport of GPUs as a mesh describes them, which are not there."""
    processes = {device.process_index for device in mesh.devices.flat}
    return "cuda_peer" if len(processes) == 1 else "nvshmem"


def open_buffer(
    transport: str, mesh: Mesh, axes: tuple[str, ...], config: Config, description: str
) -> tuple[Native, int, str]:
    """Opens a buffer over `transport`; collective where that connects processes.

    Returns:
      The extension, the number by which it knows the buffer, and the name by which programs do:
      both are the same in all processes. `description` is what the name begins with.
    """
    native = Native(_TRANSPORTS[transport][0])
    if transport == "ucx":
        process_of_rank = _by_rank(mesh, axes, lambda device, _: device.process_index)
        places = _places(mesh, axes)
        opened = ucx.open_buffer(native, mesh, axes, config, places, process_of_rank, description)
        return native, *opened
    if transport == "nvshmem":
        return native, *_open_nvshmem(native, mesh, axes, config, description)
    name = identity.take_name(description)
    return native, native.open_buffer(config, _places(mesh, axes), name), name


def names_calls(transport: str) -> bool:
    """Whether sends carry a name that is the same in all processes: on GPUs their order is."""
    return transport == "ucx"


def ordinal(device: Any) -> int:
    """The number by which XLA tells a handler on which of this process's devices it runs."""
    return int(device.id if device.platform == "cpu" else device.local_hardware_id)


def _open_nvshmem(
    native: Native, mesh: Mesh, axes: tuple[str, ...], config: Config, description: str
) -> tuple[int, str]:
    for process, count in collections.Counter(d.process_index for d in mesh.devices.flat).items():
        if count > 1:
            raise ValueError(
                f"expected a mesh with one GPU of each process, got {count} of process {process}"
            )
    library = nvshmem_library()
    buffer_id = None
    try:
        with Bootstrap(mesh, config.timeout_s) as bootstrap:
            bootstrap.compare(facts_of(mesh, axes, config, "nvshmem", description))
            buffer_id, name = identity.agree(
                bootstrap.exchange, description, native.lowest_free_id()
            )
            index = bootstrap.processes.index
            groups = _by_rank(mesh, axes, lambda device, _: index(device.process_index))
            native.open_nvshmem_buffer(
                buffer_id,
                name,
                config,
                _places(mesh, axes),
                bootstrap.index,
                next(group for group in groups if bootstrap.index in group),
                library,
                bootstrap.exchange,
                functools.partial(_log.warning, "transport 'nvshmem': %s"),
            )
    except BaseException:
        if buffer_id is not None:
            native.close_buffer(buffer_id)
        raise
    return buffer_id, name


def nvshmem_library() -> str:
    """The path of NVSHMEM's library for hosts, of the package that JAX for CUDA brings along."""
    spec = None
    if importlib.util.find_spec("nvidia") is not None:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder, "lib", "libnvshmem_host.so.3")
        if path.exists():
            return str(path)
    raise ImportError(
        "expected the package nvidia-nvshmem-cu13 for transport 'nvshmem', which connects GPUs of "
        "several processes, but it is not installed: pip install nvidia-nvshmem-cu13"
    )


def _by_rank(
    mesh: Mesh, axes: tuple[str, ...], value_of: Callable[[Any, int], Any]
) -> list[list[Any]]:
    """value_of(device, position in the mesh) by [group][rank]."""
    names = mesh.axis_names
    others = [name for name in names if name not in axes]
    order = [names.index(name) for name in (*others, *axes)]
    positions = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    by_group = np.transpose(positions, order).reshape(-1, checks.group_size(mesh, axes))
    devices = list(mesh.devices.flat)
    return [[value_of(devices[position], int(position)) for position in row] for row in by_group]


def _places(mesh: Mesh, axes: tuple[str, ...]) -> Places:
    """Of this process's devices."""
    here: dict[int, tuple[int, int, int]] = {}
    by_rank = _by_rank(mesh, axes, lambda device, position: (device, position))
    for group, ranks in enumerate(by_rank):
        for rank, (device, position) in enumerate(ranks):
            if device.process_index == jax.process_index():
                here[ordinal(device)] = (group, rank, position)
    return [here.get(number) for number in range(max(here) + 1)]


def _is_abstract(device: Any) -> bool:
    """Whether a device is of a topology that was only described, to compile for."""
    return str(device.client.runtime_type) == "compile_only_runtime"


def _count(processes: list[int]) -> str:
    return "one process" if len(processes) == 1 else f"{len(processes)} processes"
