"""Opens a buffer over the GPUs of several processes, one each, through NVSHMEM."""

from __future__ import annotations

import collections
import importlib.util
import pathlib

import jax
from jax.sharding import Mesh

from jax_sm_free import bootstrap
from jax_sm_free.config import Config
from jax_sm_free.primitives import Native

_PACKAGE = "nvidia-nvshmem-cu13"


def open_buffer(
    native: Native,
    mesh: Mesh,
    axes: tuple[str, ...],
    config: Config,
    places: list[tuple[int, int, int] | None],
    of_rank: list[int],
) -> int:
    """Opens a buffer. Collective over all processes of the mesh.

    Args:
      native: of platform "cuda".
      mesh: with one device of each of its processes, this one among them.
      axes: the buffer's.
      config: the sizes.
      places: as for `Native.open_buffer`.
      of_rank: the process index of each rank of this process's group.

    Returns:
      The buffer's id, the same in all processes.

    Raises:
      ValueError: for a mesh with several devices of a process, or if processes disagree.
      NotImplementedError: if NVSHMEM is not installed.
      RuntimeError: if this process or another can not open the buffer, with the reason.
      TimeoutError: if a process does not come.
    """
    for process, count in collections.Counter(d.process_index for d in mesh.devices.flat).items():
        if count > 1:
            raise ValueError(
                f"expected a mesh with one GPU of each process, got {count} of process {process}"
            )
    library = _library()
    buffer_id = None
    try:
        with bootstrap.Bootstrap(mesh, config.timeout_s) as meeting:
            meeting.compare(bootstrap.facts_of(mesh, axes, config, "nvshmem"))
            buffer_id = native.open_nvshmem_buffer(
                config,
                places,
                library,
                meeting.index,
                [meeting.processes.index(process) for process in of_rank],
                meeting.exchange,
            )
    except BaseException:
        if buffer_id is not None:  # and another process did not end its opening
            native.close_buffer(buffer_id)
        raise
    return buffer_id


def _library() -> str:
    """The path of NVSHMEM's library for hosts, which JAX for CUDA brings along."""
    spec = None
    if importlib.util.find_spec("nvidia") is not None:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(pathlib.Path(folder, "lib").glob("libnvshmem_host.so.3*")):
            return str(path)
    raise NotImplementedError(
        f"expected the package {_PACKAGE} for transport 'nvshmem', in process "
        f"{jax.process_index()} found none: pip install {_PACKAGE}"
    )
