"""`grouped_matmul`: each expert's rows times the expert's matrix, by the fastest way there is."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap

from jax_sm_free import blocked_matmul, mosaic_matmul, ragged_matmul
from jax_sm_free.checks import describe
from jax_sm_free.results import Received
from jax_sm_free.varying import vary_alike

Implementation = Literal["auto", "batched", "blocked", "mosaic", "ragged_dot"]

_MODULES: dict[str, ModuleType] = {
    "blocked": blocked_matmul,
    "mosaic": mosaic_matmul,
    "ragged_dot": ragged_matmul,
}
_CHOICES = ("auto", "batched", *_MODULES)


def grouped_matmul(
    rows: Array, weights: Array, recv: Received, *, implementation: Implementation = "auto"
) -> Array:
    """Multiplies each expert's rows by the expert's matrix. Not collective.

    Row i of the result is rows[i] @ weights[recv.expert[i]], summed in float32. Rows past the last
    group are zero. There are gradients of first order with respect to rows and weights. `jax.vmap`
    runs one product after the other, except for "batched".

    | implementation | what it is | where |
    | --- | --- | --- |
    | "batched" | one product of [E, expert_capacity, A] and [E, A, B] | groups of one size |
    | "blocked" | a loop over the blocks of each group, in plain JAX | anywhere; made for CPU |
    | "mosaic" | JAX's Pallas kernels for Hopper GPUs | see the errors below |
    | "ragged_dot" | `jax.lax.ragged_dot` | anywhere; slow on GPUs |

    "auto" is "batched" for a buffer with an `expert_capacity`. For other buffers it is "blocked" on
    CPU, where a NaN of one expert reaches only that expert's rows. On GPUs it is "mosaic" if that
    is possible, or else "ragged_dot", with a warning that gives the reason. A process without GPUs
    that compiles for GPUs compiles "ragged_dot", and does not warn. docs/experts.md has the cost of
    each.

    Args:
      rows: [recv_capacity, A] of a float dtype, grouped as `recv.x`.
      weights: [num_local_experts, A, B] of a float dtype. They are cast to the dtype of rows.
      recv: the result of the dispatch from which the rows come.
      implementation: see above.

    Returns:
      [recv_capacity, B] in the dtype of rows.

    Raises:
      TypeError, ValueError: at trace time, for a dtype or a shape other than these, for an unknown
        implementation, and for "batched" without an `expert_capacity`.
      NotImplementedError: for "mosaic" if JAX has no such kernel, if the devices of the process are
        not all Hopper GPUs, if the dtype is not bfloat16 or float16, if A or B is no multiple of
        128, if recv_capacity is no multiple of 8, or if `jax.shard_map` has check_vma=True.
    """
    _check(rows, weights, recv)
    if implementation not in _CHOICES:
        raise ValueError(
            f"grouped_matmul: expected implementation to be one of {_CHOICES}, got "
            f"{implementation!r}"
        )
    weights = weights.astype(rows.dtype)
    if implementation == "batched" or (implementation == "auto" and recv.expert_capacity):
        return _batched(rows, weights, recv)
    if implementation == "mosaic" and (reason := mosaic_matmul.why_not(rows, weights)):
        raise NotImplementedError(f"grouped_matmul: implementation 'mosaic': {reason}")
    is_auto = implementation == "auto"
    names = ("blocked", _for_gpus(rows, weights)) if is_auto else (implementation,) * 2
    return multiply(names, rows, weights, recv.group_sizes)


def _check(rows: Any, weights: Any, recv: Any) -> None:
    if not isinstance(recv, Received):
        raise TypeError(
            "grouped_matmul: expected recv to be a Received, of a dispatch with output='experts', "
            f"got {type(recv).__name__}"
        )
    num_rows, num_experts = recv.weights.shape[0], recv.group_sizes.shape[0]
    for name, array in (("rows", rows), ("weights", weights)):
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"grouped_matmul: expected {name} to be an array of a float dtype, got "
                f"{describe(array)}"
            )
    if rows.ndim != 2 or rows.shape[0] != num_rows:
        raise ValueError(f"grouped_matmul: expected rows [{num_rows}, A], got {describe(rows)}")
    if weights.ndim != 3 or weights.shape[:2] != (num_experts, rows.shape[1]):
        raise ValueError(
            f"grouped_matmul: expected weights [{num_experts}, {rows.shape[1]}, B], got "
            f"{describe(weights)}"
        )


def _batched(rows: Array, weights: Array, recv: Received) -> Array:
    if recv.expert_capacity is None:
        raise ValueError(
            "grouped_matmul: implementation 'batched': expected rows of a buffer with an "
            "expert_capacity, got groups of many sizes"
        )
    batch = rows.reshape(weights.shape[0], recv.expert_capacity, rows.shape[1])
    return jnp.einsum("eca,eab->ecb", batch, weights).reshape(rows.shape[0], weights.shape[2])


def _for_gpus(rows: Array, weights: Array) -> str:
    reason = mosaic_matmul.why_not(rows, weights)
    if reason is None:
        return "mosaic"
    if any(device.platform == "gpu" for device in jax.devices()):
        warnings.warn(
            "grouped_matmul: uses jax.lax.ragged_dot, which is slow on GPUs, and not JAX's Pallas "
            f"kernels: {reason}. An expert_capacity makes products fast without these kernels.",
            stacklevel=3,
        )
    return "ragged_dot"


def _by_platform(step: str, names: tuple[str, str], *operands: Array) -> Any:
    """Runs a function of one module on CPU, and that of another module elsewhere.

    Under `jax.vmap` one call runs after the other, for two reasons. Loops of "blocked" that are
    batched would all run as long as the longest one. And `jax.lax.ragged_dot` has no batching rule
    for mapped rows with weights that are not mapped.
    """
    on_cpu, elsewhere = (getattr(_MODULES[name], step) for name in names)

    @sequential_vmap
    def run(*operands: Array) -> Array:
        if on_cpu is elsewhere:
            return on_cpu(*operands)
        return jax.lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere)

    return run(*operands)


def multiply(names: tuple[str, str], rows: Array, weights: Array, group_sizes: Array) -> Array:
    """The product, by the module of the first name on CPU and that of the second elsewhere.

    Args:
      names: keys of `_MODULES`.
      rows: [M, A].
      weights: [E, A, B] of the same dtype.
      group_sizes: i32 [E], rows of each group. The groups follow each other from row 0 on.

    Returns:
      [M, B].
    """
    return _multiply(names, *vary_alike(rows, weights, group_sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(names: tuple[str, str], *operands: Array) -> Any:
    return _by_platform("product", names, *operands)


def _multiply_fwd(names: tuple[str, str], *operands: Array) -> Any:
    return _by_platform("product", names, *operands), operands


def _multiply_bwd(names: tuple[str, str], operands: Any, grads: Array) -> Any:
    rows, weights, group_sizes = operands
    return (
        _by_platform("rows_grad", names, grads, weights, group_sizes),
        _by_platform("weights_grad", names, rows, grads, weights, group_sizes),
        None,
    )


_multiply.defvjp(_multiply_fwd, _multiply_bwd)
