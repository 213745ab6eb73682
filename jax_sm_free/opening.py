"""`buffer_for`: finds a buffer by its arguments, also after copying and pickling."""

from __future__ import annotations

import copyreg
import inspect
import threading
from collections.abc import Callable, Hashable
from types import NoneType
from typing import Any

import jax
import numpy as np

# JAX has no public name for the mesh with devices that `jax.set_mesh` or `with mesh:` has put in
# force while a function is traced; `jax.sharding.get_mesh` refuses to be called there.
from jax._src.mesh import get_concrete_mesh, thread_resources
from jax.sharding import AbstractMesh, Mesh

from jax_sm_free import checks
from jax_sm_free.buffer import Buffer, named_buffers
from jax_sm_free.config import Config

_lock = threading.RLock()
_buffers: dict[Hashable, Buffer] = {}


def buffer_for(
    axis: str | tuple[str, ...], mesh: Mesh | AbstractMesh | None = None, **sizes: Any
) -> Buffer:
    """The open buffer for these arguments. The first call with equal arguments opens it.

    A layer calls `buffer_for` where it needs its buffer, also while JAX traces. Opening is
    collective where the mesh has devices of several processes: all of them make the same calls in
    the same order. They do so if all trace the same program.

    The buffer stays open until the process ends, or until `close()`. After that the next call opens
    another one. Layers that call it with equal arguments share one buffer, and so share its
    `num_slots`, the exchanges that may be in flight at once.

    A function that calls `buffer_for` without `mesh` works for one mesh only, because JAX traces it
    once for all meshes of `jax.set_mesh` that have the same shape. On the devices of another mesh
    it ends in a fault (docs/layers.md).

    Args:
      axis: as for `Buffer`.
      mesh: the devices. None for the mesh in force, of `jax.set_mesh(mesh)` or `with mesh:`. An
        AbstractMesh, such as a layer sees under `jax.jit`, stands for the mesh in force, which has
        to have the same shape.
      **sizes: the other arguments of `Buffer`: hidden, num_experts, top_k, max_tokens, and all that
        have defaults.

    Raises:
      ValueError: if no mesh with devices is in force, or if it has another shape than the
        AbstractMesh of the code around.
      TypeError, ValueError, and others: as `Buffer` does.
    """
    if mesh is None or isinstance(mesh, AbstractMesh):
        mesh = _mesh_in_force(mesh)
    _check_names(sizes)
    axes = checks.check_mesh(mesh, axis)
    name, transport = sizes.pop("name", None), sizes.pop("transport", "auto")
    node_axis = sizes.pop("node_axis", None)
    nodes = checks.nodes_of(mesh, axes, node_axis)
    config = Config(ep_size=checks.group_size(mesh, axes), **nodes, **sizes)
    return _find(
        (mesh, axes, node_axis, config, name, transport),
        lambda: Buffer(mesh, axes, node_axis=node_axis, **sizes, name=name, transport=transport),
    )


def _find(key: Hashable, open_buffer: Callable[[], Buffer]) -> Buffer:
    with _lock:
        buffer = _buffers.get(key)
        if buffer is None or buffer.is_closed:
            buffer = _buffers[key] = open_buffer()
        return buffer


def _check_names(sizes: dict[str, Any]) -> None:
    """Raises unless `Buffer` takes these arguments, and has all that it needs."""
    parameters = list(inspect.signature(Buffer).parameters.values())[2:]  # behind mesh and axis
    unknown = sizes.keys() - {parameter.name for parameter in parameters}
    needed = {p.name for p in parameters if p.default is inspect.Parameter.empty}
    for problem, names in (("also", unknown), ("none of", needed - sizes.keys())):
        if names:
            expected = ", ".join(sorted(needed)) + " and what else Buffer takes"
            raise TypeError(
                f"buffer_for: expected {expected}, got {problem} {', '.join(sorted(names))}"
            )
    for name in ("name", "transport"):
        if not isinstance(sizes.get(name, ""), (str, NoneType)):
            raise TypeError(f"buffer_for: expected {name} to be a string, got {sizes[name]!r}")


def _mesh_in_force(expected: AbstractMesh | None) -> Mesh:
    around = expected or jax.sharding.get_abstract_mesh()
    shape = dict(around.shape)
    for mesh in (get_concrete_mesh(), thread_resources.env.physical_mesh):
        if mesh is not None and not mesh.empty:
            if shape and dict(mesh.shape) != shape:
                raise ValueError(
                    f"buffer_for: expected a mesh with devices of the shape {shape}, as the "
                    f"AbstractMesh has, got {dict(mesh.shape)} in force; pass mesh="
                )
            return mesh
    seen = f"an AbstractMesh {shape} alone, which has no devices" if shape else "none"
    raise ValueError(
        f"buffer_for: expected a mesh with devices in force, got {seen}; call the program under "
        "jax.set_mesh(mesh), or pass mesh="
    )


# Pickling a buffer, so that a module that holds one can be pickled.


def _reduce(buffer: Buffer) -> Any:
    if buffer.transport == "abstract":
        raise TypeError(
            "pickle: expected a Buffer of devices that are there, got one for a mesh that was "
            "described for ahead-of-time compiling"
        )
    mesh, devices = buffer.mesh, buffer.mesh.devices
    ids = tuple(device.id for device in devices.flat)
    where = devices.flat[0].platform, ids, devices.shape, mesh.axis_names, mesh.axis_types
    axes, config, name = buffer.axes, buffer.config, buffer.name
    return _find_or_open, (buffer.program_name, where, axes, config, name, buffer.node_axis)


def _find_or_open(
    program_name: str,
    where: tuple[Any, ...],
    axes: tuple[str, ...],
    config: Config,
    name: str | None,
    node_axis: str | None = None,  # which older pickles do not have
) -> Buffer:
    """The buffer that was pickled, if it is open here; else the buffer for its arguments."""
    mesh = _mesh_of(*where)
    buffer = named_buffers.get(program_name)
    if buffer is not None and not buffer.is_closed and buffer.mesh == mesh:
        return buffer
    return _find(
        (mesh, axes, node_axis, config, name, "auto"),
        lambda: Buffer.from_config(mesh, axes, config, node_axis=node_axis, name=name),
    )


def _mesh_of(
    platform: str,
    ids: tuple[int, ...],
    shape: tuple[int, ...],
    names: tuple[str, ...],
    types: tuple[Any, ...],
) -> Mesh:
    here = {device.id: device for device in jax.devices(platform)}
    missing = [number for number in ids if number not in here]
    if missing:
        raise ValueError(
            f"pickle: expected the {platform} devices {list(ids)}, which a Buffer was opened for, "
            f"got a process without {missing}"
        )
    devices = np.array([here[number] for number in ids]).reshape(shape)
    return Mesh(devices, names, axis_types=types)


copyreg.pickle(Buffer, _reduce)
