"""Experts of padding, for a number of experts that the ranks cannot share evenly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sm_free.bounds import check_int
from jax_sm_free.config import round_up


def padded_num_experts(num_experts: int, ep_size: int) -> int:
    """The smallest multiple of `ep_size` that is not below `num_experts`. Not collective.

    Open the buffer with this number, and let the router go on choosing among the `num_experts` real
    experts. The experts behind them are padding: they belong to the last ranks, and no token names
    them. `pad_experts` gives the weights of the experts the same number. `recv.group_sizes` and
    `recv.counts` then have an entry for each expert of padding, which is that of any expert without
    rows: 0, or the `expert_capacity` as a group size.

    Args:
      num_experts: experts of the model, at least 1.
      ep_size: ranks that share them, at least 1.

    Raises:
      TypeError, ValueError: for an argument that is no integer, or is below 1.
    """
    return round_up(check_int("num_experts", num_experts, 1), check_int("ep_size", ep_size, 1))


def pad_experts(weights: Any, ep_size: int) -> Any:
    """Adds weights of zero for the experts that `padded_num_experts` adds. Not collective.

    Call it outside of `jax.shard_map`, on weights that have all experts. Gradients go to the real
    experts.

    Args:
      weights: a pytree of arrays [num_experts, ...].
      ep_size: ranks that share them.

    Returns:
      The pytree, of arrays [padded_num_experts(num_experts, ep_size), ...].

    Raises:
      ValueError: for an array without a first axis, or with no experts.
    """

    def pad(array: Any) -> Any:
        if not hasattr(array, "shape") or not array.shape:
            raise ValueError(
                f"pad_experts: expected a pytree of arrays [num_experts, ...], got {array!r} in it"
            )
        num_experts, *rest = array.shape
        missing = padded_num_experts(num_experts, ep_size) - num_experts
        zero = np.zeros(array.dtype.itemsize, np.uint8).view(array.dtype)[0]
        return jnp.concatenate([array, jnp.full((missing, *rest), zero, array.dtype)])

    return jax.tree.map(pad, weights)
