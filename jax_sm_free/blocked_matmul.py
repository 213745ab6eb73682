"""Grouped matrix products on CPU, at the cost of the rows in use.

On CPU, `jax.lax.ragged_dot` multiplies every row by every group's matrix, and then multiplies the
products with other groups' matrices by zero. For E groups that is E times the work, and a NaN of
one group reaches all rows. Here a loop over the groups takes as many blocks of rows as each group
needs. The last block of a group may reach into the next group, and its results there are discarded.
Rows past the last group cost no work, they stay zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_sm_free.varying import vary_alike

# Rows of a block. A group takes large blocks as long as it fills them, and small ones for the rest.
# These sizes were the fastest, or within the noise of the fastest, among (512, 64), (256, 32),
# (128, 16), (64, 16) and single sizes. That was for groups of 16 to 256 rows and matrices from
# [32, 64] to [512, 1024].
BLOCKS = (128, 16)


def _wide(*dtypes: Any) -> Any:
    """float32, or float64 if one of the dtypes is. JAX itself promotes no floats of 8 bits."""
    return max(jnp.dtype(jnp.float32), *dtypes, key=lambda dtype: dtype.itemsize)


def _as_bits(array: Array) -> Array:
    """Floats narrower than float32 as integers of their bits.

    XLA:CPU computes in float32 where a program has narrower floats, also slices and updates of
    slices. So it would convert the whole array for every block.
    """
    if array.dtype.itemsize >= 4:
        return array
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _from_bits(array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


def _over_blocks(
    step: Callable[[int, Array, Array, Array], Array],
    carry: Array,
    begin: Array,
    end: Array,
    num_rows: int,
) -> Array:
    """Takes rows begin to end in blocks, by carry = step(size, start, mine, carry) for each block.

    A block has `size` rows from `start` on. `mine`, bool [size, 1], is true for the rows of the
    block that are among begin to end and have not been taken yet.
    """
    if num_rows == 0:
        return carry
    for size in [min(size, num_rows) for size in BLOCKS]:
        num_rows_left = end - begin
        last = size == min(BLOCKS[-1], num_rows)
        steps = jax.lax.div(num_rows_left + (size - 1 if last else 0), jnp.full_like(end, size))

        def body(_: Array, state: tuple[Array, Array], size: int = size) -> tuple[Array, Array]:
            first, carry = state
            start = jnp.minimum(first, num_rows - size)
            row = start + jax.lax.broadcasted_iota(first.dtype, (size, 1), 0)
            return first + size, step(size, start, (row >= first) & (row < end), carry)

        begin, carry = jax.lax.fori_loop(0, steps, body, (begin, carry))
        if last:
            break
    return carry


def _times_matrices(rows: Array, weights: Array, group_sizes: Array, *, contract: int) -> Array:
    """[M, N]: rows [M, K] times a matrix of weights [E, ...], over its dimension `contract`."""
    num_rows, dtype, weights_dtype = rows.shape[0], rows.dtype, weights.dtype
    wide = _wide(dtype, weights_dtype)
    row_bits = _as_bits(rows)
    out = jnp.zeros((num_rows, weights.shape[2 - contract]), row_bits.dtype)
    out, _ = vary_alike(out, row_bits)

    def group(out: Array, of: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix_bits, size, end = of
        matrix = _from_bits(matrix_bits, weights_dtype).astype(wide)

        def step(size: int, start: Array, mine: Array, out: Array) -> Array:
            block = jax.lax.dynamic_slice_in_dim(row_bits, start, size)
            block = _from_bits(block, dtype).astype(wide)
            product = jax.lax.dot_general(block, matrix, (((1,), (contract,)), ((), ())))
            old = jax.lax.dynamic_slice_in_dim(out, start, size)
            new = jnp.where(mine, _as_bits(product.astype(dtype)), old)
            return jax.lax.dynamic_update_slice_in_dim(out, new, start, 0)

        return _over_blocks(step, out, end - size, end, num_rows), None

    groups = _as_bits(weights), group_sizes, jnp.cumsum(group_sizes)
    out, _ = jax.lax.scan(group, out, groups)
    return _from_bits(out, dtype)


def product(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """From rows [M, A] and weights [E, A, B]: [M, B] in the dtype of rows."""
    return _times_matrices(rows, weights, group_sizes, contract=0)


def rows_grad(grads: Array, weights: Array, group_sizes: Array) -> Array:
    """From grads [M, B] and weights [E, A, B]: [M, A] in the dtype of grads."""
    return _times_matrices(grads, weights, group_sizes, contract=1)


def weights_grad(rows: Array, grads: Array, weights: Array, group_sizes: Array) -> Array:
    """From rows [M, A] and grads [M, B]: [E, A, B] in the dtype of weights."""
    num_rows, wide = rows.shape[0], _wide(rows.dtype, grads.dtype)
    factors = [(_as_bits(rows), rows.dtype), (_as_bits(grads), grads.dtype)]
    zero, _ = vary_alike(jnp.zeros(weights.shape[1:], wide), group_sizes)

    def group(_: None, of: tuple[Array, Array]) -> tuple[None, Array]:
        size, end = of

        def step(size: int, start: Array, mine: Array, total: Array) -> Array:
            left, right = (
                _from_bits(
                    jnp.where(mine, jax.lax.dynamic_slice_in_dim(bits, start, size), 0), dtype
                ).astype(wide)
                for bits, dtype in factors
            )
            return total + jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))

        total = _over_blocks(step, zero, end - size, end, num_rows)
        return None, _as_bits(total.astype(weights.dtype))

    _, bits = jax.lax.scan(group, None, (group_sizes, jnp.cumsum(group_sizes)))
    return _from_bits(bits, weights.dtype)
