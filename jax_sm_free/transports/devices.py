"""The devices of a mesh: what they are, and which of them is which rank."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_sm_free import checks

_PLATFORM_NAMES = {"cpu": "cpu", "gpu": "cuda"}  # the name in JAX -> the name here

# For each device ordinal its (group, rank, position in the mesh), or None outside of the mesh.
Places = list[tuple[int, int, int] | None]


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a transport has to know of the devices of a mesh.

    Attributes:
      platform: "cpu" or "cuda".
      jax_platform: what JAX calls the platform.
      num_of_process: how many of the devices each process has.
      are_described: whether the devices are only described, so that programs can be compiled for
        them.
    """

    platform: str
    jax_platform: str
    num_of_process: dict[int, int]
    are_described: bool

    @classmethod
    def of(cls, mesh: Mesh) -> Devices:
        """Raises NotImplementedError unless all are CPU devices, or all are GPUs."""
        devices = list(mesh.devices.flat)
        platforms = {device.platform for device in devices}
        platform = _PLATFORM_NAMES.get(devices[0].platform)
        if platform is None or len(platforms) > 1:
            raise NotImplementedError(
                f"expected a mesh of CPU devices or of GPUs, got devices of {sorted(platforms)}"
            )
        counts = collections.Counter(device.process_index for device in devices)
        are_described = platform == "cuda" and all(map(_is_described, devices))
        return cls(platform, devices[0].platform, dict(sorted(counts.items())), are_described)

    @property
    def span_processes(self) -> bool:
        """Whether some of the devices are of another process than this one."""
        if self.are_described:  # None of them is of this process.
            return len(self.num_of_process) > 1
        return list(self.num_of_process) != [jax.process_index()]

    def __str__(self) -> str:
        count = len(self.num_of_process)
        processes = "one process" if count == 1 else f"{count} processes"
        return f"devices of ['{self.jax_platform}'] in {processes}"


def _is_described(device: Any) -> bool:
    return str(device.client.runtime_type) == "compile_only_runtime"


def ordinal(device: Any) -> int:
    """The number by which XLA tells a handler on which of this process's devices it runs."""
    return int(device.id if device.platform == "cpu" else device.local_hardware_id)


def by_rank(
    mesh: Mesh, axes: tuple[str, ...], value_of: Callable[[Any, int], Any]
) -> list[list[Any]]:
    """The results of value_of(device, position in the mesh), by [group][rank]."""
    names = mesh.axis_names
    others = [name for name in names if name not in axes]
    order = [names.index(name) for name in (*others, *axes)]
    positions = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    by_group = np.transpose(positions, order).reshape(-1, checks.group_size(mesh, axes))
    devices = list(mesh.devices.flat)
    return [[value_of(devices[position], int(position)) for position in row] for row in by_group]


def places(mesh: Mesh, axes: tuple[str, ...]) -> Places:
    """The places of this process's devices."""
    here: dict[int, tuple[int, int, int]] = {}
    of_ranks = by_rank(mesh, axes, lambda device, position: (device, position))
    for group, ranks in enumerate(of_ranks):
        for rank, (device, position) in enumerate(ranks):
            if device.process_index == jax.process_index():
                here[ordinal(device)] = (group, rank, position)
    return [here.get(number) for number in range(max(here) + 1)]
