"""What ranks run in the tests of two tiers over several processes, in which all goes well."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import layers
import numpy as np

import jax_sm_free as smf
from jax_sm_free import reference

# By name, how the devices of all processes, one process behind the other, make a mesh: they are
# reshaped, transposed, and reshaped to these axes. "across" makes nodes of devices of several
# processes, of which each has devices of both nodes if there are two. The others make nodes of
# whole processes.
MESHES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]] = {
    "in_order": ((-1,), (0,), {"node": 2, "ep": -1}),
    "across": ((2, -1), (1, 0), {"node": 2, "ep": -1}),
    "node_behind": ((2, -1), (1, 0), {"ep": -1, "node": 2}),
    "two_groups": ((2, -1), (0, 1), {"node": 2, "dp": 2, "ep": -1}),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    first, order, shape = MESHES[name]
    devices = np.array(jax.devices()).reshape(first).transpose(order).reshape(*shape.values())
    return jax.sharding.Mesh(devices, tuple(shape))


def compare(name: str) -> None:
    """Rows are those of one tier; sums are those of the reference, and gradients but for order."""
    mesh = mesh_of(name)
    rng = np.random.default_rng(0)
    rows = mesh.size * layers.TOKENS
    x = rng.normal(size=(rows, layers.HIDDEN)).astype(np.float32)
    topk_idx = rng.integers(-1, mesh.size, (rows, layers.TOP_K)).astype(np.int32)
    weights = rng.normal(size=(rows, layers.TOP_K)).astype(np.float32)
    inputs = tuple(global_array(mesh, a) for a in (x, topk_idx, weights))
    with (
        layers.open_buffer(mesh) as two,
        layers.open_buffer(mesh, node_axis=None) as one,
    ):
        theirs = reference.Buffer.from_config(
            mesh, layers.axes_of(mesh), two.config, node_axis="node"
        )
        got, flat, want = (
            layers.on_ranks(mesh, functools.partial(trained, buffer, module))(*inputs)
            for buffer, module in ((two, smf), (one, smf), (theirs, reference))
        )
        same_here(got[0], flat[0])
        same_here(got[0], want[0])
        same_here(got[1], want[1])
        close_here(got[2], want[2])
        two.check()


def trained(buffer: Any, module: ModuleType, x: Any, topk_idx: Any, weights: Any) -> Any:
    """What a dispatch receives, what a combine sums up, and gradients of a layer of both."""

    def layer(x: Any, weights: Any) -> Any:
        sent = buffer.dispatch_send(x, topk_idx, weights)
        shared, sent = module.overlap(sent, jax.numpy.sin, x)
        sent = buffer.dispatch_forward(sent)
        shared, sent = module.overlap(sent, jax.numpy.cos, shared)
        recv = buffer.dispatch_recv(sent)
        out = buffer.combine(recv.x * recv.x, recv.layout, weights=recv.weights)
        return (out * shared).sum(), (recv, out)

    gradients, (recv, out) = jax.grad(layer, (0, 1), has_aux=True)(x, weights)
    received = (recv.x, recv.group_sizes, recv.counts, recv.weights, recv.dropped[None])
    return (*received, recv.layout.rows, recv.layout.num_rows_from), out, gradients


def global_array(mesh: jax.sharding.Mesh, array: np.ndarray) -> jax.Array:
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def for_each_shard(compare: Callable[[Any, Any], None], got: Any, want: Any) -> None:
    """Compares the parts of this process."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for ours, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
            compare(np.asarray(ours.data), np.asarray(theirs.data))


def same_here(got: Any, want: Any) -> None:
    for_each_shard(
        lambda a, b: np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32)), got, want
    )


def close_here(got: Any, want: Any) -> None:
    for_each_shard(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
