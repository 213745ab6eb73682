"""Transport "nvshmem": a symmetric heap that GPUs of several processes share."""

from __future__ import annotations

import functools
import importlib.util
import logging
import pathlib

from jax.sharding import Mesh

from jax_sm_free.config import Config
from jax_sm_free.transports.devices import Devices, places
from jax_sm_free.transports.several_processes import Meeting, SeveralProcesses
from jax_sm_free.transports.transport import Opened, Request

_log = logging.getLogger(__name__)


def library() -> str:
    """The path of NVSHMEM's library for hosts, in the package that JAX for CUDA brings along."""
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


class Nvshmem(SeveralProcesses):
    """Connects GPUs of several processes, one GPU of each."""

    name = "nvshmem"
    platform = "cuda"

    def why_not(self, devices: Devices) -> str | None:
        for process, count in devices.num_of_process.items():
            if count > 1 and super().why_not(devices) is None:
                return (
                    f"{self.name!r} needs a mesh with one GPU of each process, got {count} of "
                    f"process {process}"
                )
        return super().why_not(devices)

    def open(self, mesh: Mesh, axes: tuple[str, ...], config: Config, name: str | None) -> Opened:
        library()  # Where it is missing, this process raises before it meets the others.
        return super().open(mesh, axes, config, name)

    def _open_part(self, request: Request, meeting: Meeting) -> None:
        this_process = meeting.bootstrap.index
        request.native.module.open_nvshmem_buffer(
            meeting.buffer_id,
            meeting.program_name,
            request.config.sizes(),
            places(request.mesh, request.axes),
            this_process,
            # By rank of the group that has this process's device.
            next(group for group in meeting.process_of_rank if this_process in group),
            library(),
            meeting.bootstrap.exchange,  # gives bytes to all processes, returns those of all
            functools.partial(_log.warning, "transport 'nvshmem': %s"),  # what works, but slowly
        )
