"""`jax.vmap` of the custom calls: one call for each place of the mapped axis.

The calls of a mapped send come before those of its mapped recv, so that all these exchanges are in
flight at once. The calls stand in the order of the axis, which is the same on all ranks. Each call
has its place on the axis in its name, by which `inspection` tells the calls apart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching

from jax_sm_free.bounds import MAX_NUM_SLOTS
from jax_sm_free.varying import vary_alike

# The name of a call has this text and a number for each mapped axis of more than one place.
PLACE = "smf_place_"


def _named(place: int) -> Any:
    return jax.named_scope(f"{PLACE}{place}")


def define(name: str, primitive: core.Primitive) -> None:
    """Gives the primitive of one FFI target its rule for `jax.vmap`.

    The rule uses two parameters of the primitive. `num_slots` is that of the buffer, and `mapped`
    has the sizes of the axes that are mapped already, inner ones first.
    """

    def call_each(
        operands: Sequence[Any],
        dims: Sequence[int | None],
        *,
        num_slots: int,
        mapped: tuple[int, ...],
        **params: Any,
    ) -> Any:
        (size,) = {
            operand.shape[dim]
            for operand, dim in zip(operands, dims, strict=True)
            if dim is not None
        }
        mapped = (*mapped, size)
        _check_slots(name, num_slots, mapped)
        calls = []
        for place in range(size):
            here = [
                operand
                if dim is None
                else jax.lax.index_in_dim(operand, place, dim, keepdims=False)
                for operand, dim in zip(operands, dims, strict=True)
            ]
            here = _varying_alike(here)
            with _named(place) if size > 1 else contextlib.nullcontext():
                calls.append(primitive.bind(*here, num_slots=num_slots, mapped=mapped, **params))
        results = [jnp.stack(of_all) for of_all in zip(*calls, strict=True)]
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = call_each


def _varying_alike(operands: Sequence[Any]) -> list[Any]:
    """Makes all operands vary over the same mesh axes, but for the scalar one.

    With an `spmd_axis_name`, operands that are not mapped vary over fewer mesh axes than those that
    are mapped. The one scalar operand is the position in the mesh, which varies over all axes.
    """
    cast = iter(vary_alike(*(operand for operand in operands if operand.ndim)))
    return [next(cast) if operand.ndim else operand for operand in operands]


def _check_slots(name: str, num_slots: int, mapped: tuple[int, ...]) -> None:
    num_places = math.prod(mapped)
    if 1 <= num_places <= num_slots:
        return
    sizes = " x ".join(map(str, reversed(mapped)))
    advice = "make the mapped axis part of the token axis"
    if 1 <= num_places <= MAX_NUM_SLOTS:
        advice += f", or open the buffer with num_slots={num_places}, which takes more memory"
    raise ValueError(
        f"{name}: expected jax.vmap over 1 to {num_slots} places (num_slots), got {sizes}: each "
        f"place is an exchange of its own, and {num_places} of them would be in flight at once; "
        f"{advice}"
    )
