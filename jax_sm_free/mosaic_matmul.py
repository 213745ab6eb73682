"""Grouped matrix products by JAX's Pallas kernels for Hopper GPUs.

The kernels are `jax.experimental.pallas.ops.gpu.ragged_dot_mgpu` and `transposed_ragged_dot_mgpu`.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_sm_free.varying import axes_of

_KERNELS = "jax.experimental.pallas.ops.gpu"
_DTYPES = ("bfloat16", "float16")
_CAPABILITY = "9.0"
_ROWS_MULTIPLE = 8
# The fastest of the sizes that were tried on an H200 (benchmarks/experts.py).
_BLOCKS = {
    "block_m": 128,
    "block_n": 128,
    "block_k": 64,
    "max_concurrent_steps": 6,
    "grid_block_n": 16,
}


def why_not(rows: Any, weights: Any) -> str | None:
    """Why the kernels cannot multiply rows [M, A] by weights [E, A, B] here; None if they can."""
    try:
        importlib.import_module(f"{_KERNELS}.ragged_dot_mgpu")
        importlib.import_module(f"{_KERNELS}.transposed_ragged_dot_mgpu")
    except ImportError as error:
        return f"this JAX has no such kernels ({error})"
    found = {str(getattr(device, "compute_capability", "none")) for device in jax.devices()}
    if found != {_CAPABILITY}:
        return (
            f"they need GPUs of compute capability {_CAPABILITY}, and the devices of this process "
            f"have {', '.join(sorted(found))}"
        )
    if rows.dtype.name not in _DTYPES:
        return f"they need rows of {' or '.join(_DTYPES)}, and these are {rows.dtype.name}"
    multiple = _BLOCKS["block_n"]
    if any(size % multiple for size in weights.shape[1:]):
        return (
            f"they need weights [E, A, B] with A and B multiples of {multiple}, and these are "
            f"{list(weights.shape)}"
        )
    if rows.shape[0] % _ROWS_MULTIPLE:
        return f"they need rows in multiples of {_ROWS_MULTIPLE}, and these are {rows.shape[0]}"
    if axes_of(rows) | axes_of(weights):
        return "they need jax.shard_map(..., check_vma=False)"
    return None


def product(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """From rows [M, A] and weights [E, A, B]: [M, B]."""
    return _product(rows, weights, group_sizes, transpose_rhs=False)


def rows_grad(grads: Array, weights: Array, group_sizes: Array) -> Array:
    """From grads [M, B] and weights [E, A, B]: [M, A]."""
    return _product(grads, weights, group_sizes, transpose_rhs=True)


def weights_grad(rows: Array, grads: Array, weights: Array, group_sizes: Array) -> Array:
    """From rows [M, A] and grads [M, B]: [E, A, B]."""
    del weights
    kernel = importlib.import_module(f"{_KERNELS}.transposed_ragged_dot_mgpu")
    return kernel.transposed_ragged_dot(rows, grads, group_sizes=group_sizes, **_BLOCKS)


def _product(left: Array, weights: Array, group_sizes: Array, *, transpose_rhs: bool) -> Array:
    kernel = importlib.import_module(f"{_KERNELS}.ragged_dot_mgpu")
    out = kernel.ragged_dot(
        left, weights, group_sizes=group_sizes, transpose_rhs=transpose_rhs, **_BLOCKS
    )
    # The kernel does not write the rows past the last group.
    in_use = jnp.arange(left.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes)
    return jnp.where(in_use[:, None], out, jnp.zeros((), out.dtype))
