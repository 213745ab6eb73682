"""Gives the operands of a call one type over the mesh axes, where the call needs that."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Makes all arrays vary over the mesh axes that one of them varies over.

    Under shard_map's check_vma, values that are equal on all ranks have a type of their own. The
    transpose of the cast sums their gradients over the ranks, which is the right gradient.
    """
    varying = [axes_of(array) for array in arrays]
    every = frozenset[str]().union(*varying)
    cast = []
    for array, axes in zip(arrays, varying, strict=True):
        missing = tuple(sorted(every - axes))
        cast.append(jax.lax.pcast(array, missing, to="varying") if missing else array)
    return tuple(cast)


def axes_of(array: Array) -> frozenset[str]:
    """The mesh axes that an array varies over, as its type says."""
    aval: Any = jax.typeof(array)
    if hasattr(aval, "manual_axis_type"):
        return aval.manual_axis_type.varying
    return aval.vma  # before JAX 0.10
