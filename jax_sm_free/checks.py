"""Checks of arguments and operands. Every error says what was expected and what was got."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from jax_sm_free.config import Config
from jax_sm_free.pending import Sent
from jax_sm_free.primitives import RowType
from jax_sm_free.results import Layout


def describe(array: Any) -> str:
    """Dtype and shape of an array, as in bfloat16[128, 7168]; the type of anything else."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return type(array).__name__
    return f"{getattr(array.dtype, 'name', array.dtype)}{list(array.shape)}"


def check_array(op: str, name: str, array: Any, dtype: Any, shape: tuple[Any, ...]) -> None:
    """Raises unless `array` has this dtype and shape; a string in `shape` allows any size."""
    want = f"{jnp.dtype(dtype).name}[{', '.join(map(str, shape))}]"
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{op}: expected {name} to be an array {want}, got {describe(array)}")
    if array.dtype != dtype:
        raise TypeError(f"{op}: expected {name} {want}, got {describe(array)}")
    fits = len(array.shape) == len(shape) and all(
        isinstance(expected, str) or size == expected
        for size, expected in zip(array.shape, shape, strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: expected {name} {want}, got {describe(array)}")


def check_inside(op: str, mesh: Mesh, axes: tuple[str, ...]) -> None:
    """Raises unless the caller runs in a shard_map over the buffer's mesh, manual in every axis.

    Axes of one device need not be manual, because there is nothing to partition.
    """
    here = jax.sharding.get_abstract_mesh()
    manual = {
        name
        for name, kind in zip(here.axis_names, here.axis_types or (), strict=False)
        if kind == AxisType.Manual
    }
    if not set(axes) <= manual:
        raise ValueError(
            f"{op}: expected to be called inside jax.shard_map over the buffer's axis "
            f"{axes if len(axes) > 1 else axes[0]!r}, got a call where the manual axes are "
            f"{sorted(manual) or 'none'}"
        )
    want, got = dict(mesh.shape), dict(here.shape)
    if list(want.items()) != list(got.items()):
        raise ValueError(f"{op}: expected the buffer's mesh {want}, got shard_map over {got}")
    left_out = [name for name in larger_axes(mesh) if name not in manual]
    if left_out:
        names = ", ".join(map(repr, left_out))
        raise ValueError(
            f"{op}: expected shard_map to be manual in every axis of the mesh {want}, got one that "
            f"leaves out {names}, where XLA cannot partition a call with a side effect; either "
            "call shard_map without axis_names, and name each axis in in_specs and out_specs; or "
            f"put this call into a shard_map of its own: jax.shard_map(f, axis_names={{{names}}}, "
            "in_specs=jax.P(), out_specs=jax.P(), check_vma=False); gradients then need "
            "check_vma=False in the shard_map around it, too"
        )


def check_rows(op: str, config: Config, x: Any) -> RowType:
    """Returns the type of the rows of x. Raises unless x is an operand of a `dispatch_send`."""
    if not isinstance(x, (tuple, list)):
        check_array(op, "x", x, config.dtype, ("T", config.hidden))
        return RowType(config.hidden, config.dtype)
    if config.wire.quantises:
        raise TypeError(
            f"{op}: expected x {config.dtype.name}[T, {config.hidden}], which a buffer with "
            f"wire_dtype={config.wire_dtype.name} quantises itself, got a tuple of {len(x)} parts"
        )
    if len(x) != 2:
        raise TypeError(f"{op}: expected x as an array or (values, scales), got {len(x)} parts")
    for name, part in zip(("values", "scales"), x, strict=True):
        if not hasattr(part, "shape") or len(part.shape) != 2:
            raise ValueError(f"{op}: expected {name} of two dimensions, got {describe(part)}")
        if not _has_whole_bytes(part.dtype):
            raise TypeError(f"{op}: expected {name} of whole bytes each, got {describe(part)}")
    values, scales = x
    if values.shape[0] != scales.shape[0]:
        raise ValueError(
            f"{op}: expected as many rows of scales as of values, got {describe(values)} and "
            f"{describe(scales)}"
        )
    if scales.shape[1] == 0:
        raise ValueError(f"{op}: expected scales to have columns, got {describe(scales)}")
    rows = RowType(values.shape[1], values.dtype, scales.shape[1], scales.dtype)
    if rows.num_bytes > config.row_bytes:
        raise ValueError(
            f"{op}: expected rows of at most {config.row_bytes} bytes (hidden={config.hidden}, "
            f"{config.dtype.name}), got {rows.num_bytes} from {describe(values)} and "
            f"{describe(scales)}"
        )
    return rows


def _has_whole_bytes(dtype: Any) -> bool:
    """Whether each element is a number of 8 bits or more. Smaller elements share bytes."""
    if dtype == jnp.bool_:
        return True
    if not jnp.issubdtype(dtype, jnp.number):
        return False
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits >= 8


def check_topk(op: str, config: Config, num_tokens: int, topk_idx: Any, weights: Any) -> None:
    """Raises unless both are [num_tokens, top_k] and num_tokens is within max_tokens."""
    if num_tokens > config.max_tokens:
        raise ValueError(
            f"{op}: expected at most {config.max_tokens} tokens (max_tokens), got {num_tokens}"
        )
    check_array(op, "topk_idx", topk_idx, jnp.int32, (num_tokens, config.top_k))
    check_array(op, "topk_weights", weights, jnp.float32, (num_tokens, config.top_k))


def check_layout(op: str, config: Config, layout: Any) -> None:
    """Raises unless `layout` came out of a dispatch of this configuration."""
    if not isinstance(layout, Layout):
        raise TypeError(f"{op}: expected the layout of a dispatch, got {type(layout).__name__}")
    fanout = config.top_k if layout.output == "experts" else 1
    check_array(op, "layout.rows", layout.rows, jnp.int32, (config.max_recv_tokens, fanout))
    check_array(op, "layout.topk_idx", layout.topk_idx, jnp.int32, ("T", config.top_k))
    check_array(op, "layout.num_rows_from", layout.num_rows_from, jnp.int32, (config.ep_size,))
    if config.num_nodes > 1:
        shape = config.max_node_tokens, config.top_k
        check_array(op, "layout.node_topk", layout.node_topk, jnp.int32, shape)
    elif layout.node_topk is not None:
        raise ValueError(
            f"{op}: expected the layout of a buffer without a node_axis, got one with node_topk "
            f"{describe(layout.node_topk)}"
        )


def check_combine(config: Config, y: Any, layout: Any, weights: Any) -> None:
    """Raises unless these are the operands of a `combine_send`."""
    op = "combine_send"
    check_layout(op, config, layout)
    num_rows = config.recv_capacity if layout.output == "experts" else config.max_recv_tokens
    check_array(op, "y", y, config.dtype, (num_rows, config.hidden))
    if weights is not None:
        check_array(op, "weights", weights, jnp.float32, (num_rows,))


def check_sent(op: str, sent: Any, kind: str) -> None:
    if not isinstance(sent, Sent):
        raise TypeError(f"{op}: expected what {kind}_send returned, got {type(sent).__name__}")
    if sent.kind != kind:
        raise TypeError(f"{op}: expected what {kind}_send returned, got that of {sent.kind}_send")


def check_not_forwarded(op: str, is_forwarded: bool) -> None:
    if is_forwarded:
        raise ValueError(
            f"{op}: expected a sent value that has not been forwarded, got one that {op} returned"
        )


def check_mesh(mesh: Any, axis: Any) -> tuple[str, ...]:
    """Returns the expert axes as a tuple. Raises unless they are different axes of the mesh."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"expected mesh to be a jax.sharding.Mesh, got {type(mesh).__name__}")
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    unknown = [name for name in axes if name not in mesh.axis_names]
    if unknown or not axes or len(set(axes)) != len(axes):
        raise ValueError(
            f"expected axis to name axes of the mesh {list(mesh.axis_names)}, each once, "
            f"got {axis!r}"
        )
    return axes


def nodes_of(mesh: Mesh, axes: tuple[str, ...], node_axis: Any) -> dict[str, int]:
    """The sizes of `Config` that follow from `node_axis`. Raises unless it is None or an axis."""
    if node_axis is None:
        return {"num_nodes": 1, "node_stride": group_size(mesh, axes)}
    if not isinstance(node_axis, str):
        raise TypeError(f"expected node_axis to be the name of an axis or None, got {node_axis!r}")
    if node_axis not in axes:
        raise ValueError(
            f"expected node_axis to be one of the buffer's axes {list(axes)}, got {node_axis!r}"
        )
    behind = axes[axes.index(node_axis) + 1 :]
    num_nodes = mesh.shape[node_axis]
    stride = group_size(mesh, behind if num_nodes > 1 else axes)
    return {"num_nodes": num_nodes, "node_stride": stride}


def check_config(
    op: str, config: Any, mesh: Mesh, axes: tuple[str, ...], node_axis: Any = None
) -> None:
    """Raises unless `config` is a Config for the groups of ranks along `axes`, and their nodes."""
    if not isinstance(config, Config):
        raise TypeError(f"{op}: expected a Config, got {type(config).__name__}")
    ep_size = group_size(mesh, axes)
    if config.ep_size != ep_size:
        raise ValueError(
            f"{op}: expected a Config with ep_size={ep_size}, the number of devices along the axis "
            f"of the mesh, got ep_size={config.ep_size}"
        )
    want = nodes_of(mesh, axes, node_axis)
    if any(getattr(config, name) != size for name, size in want.items()):
        expected, got = (
            f"num_nodes={num_nodes} and node_stride={stride}"
            for num_nodes, stride in (want.values(), (config.num_nodes, config.node_stride))
        )
        raise ValueError(
            f"{op}: expected a Config with {expected}, because node_axis is {node_axis!r}, got "
            f"{got}"
        )


def larger_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of more than one device. shard_map has to be manual in these."""
    return tuple(name for name, size in mesh.shape.items() if size > 1)


def group_size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in axes)
