"""jax_sm_free as one of the expert-parallel exchanges of levanter's `moe_mlp`.

Copy this file into your project, and call `install` once before the model is traced.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from levanter.grug import grug_moe
from levanter.grug._moe import common

import jax_sm_free as smf

# What levanter's remat policy saves, and what a dispatch of ours received.
REMAT_SAVE_NAMES = (*grug_moe.MOE_REMAT_SAVE_NAMES, smf.DISPATCHED)


def exchange(
    x: Array,
    topk_idx: Array,
    topk_weights: Array,
    valid: Array,
    w13: Array,
    w2: Array,
    *,
    activation_fn: Callable[[Array], Array],
    num_experts: int,
    capacity_factor: float,
    token_sharding_axes: tuple[str, ...],
) -> tuple[Array, common.CapacityDrops]:
    """The experts' part of a layer, on one rank, inside the `shard_map` that `moe_mlp` makes."""
    buffer = smf.buffer_for(
        "expert",
        hidden=x.shape[1],
        num_experts=num_experts,
        top_k=topk_idx.shape[1],
        max_tokens=x.shape[0],
        capacity_factor=capacity_factor,
        dtype=x.dtype,
    )

    def experts(recv: smf.Received) -> tuple[Array, Array]:
        h = smf.grouped_matmul(recv.x, w13, recv)
        gate, up = jnp.split(checkpoint_name(h, common._CHECKPOINT_EXPERT_HIDDEN), 2, axis=-1)
        y = smf.grouped_matmul(activation_fn(gate) * up, w2, recv)
        return checkpoint_name(y, common._CHECKPOINT_DISPATCH_OUTPUT), recv.dropped

    topk_idx = jnp.where(valid[:, None], topk_idx, -1)
    out, dropped = smf.moe(x, topk_idx, topk_weights, experts, buffer, has_aux=True)
    dropped = jax.lax.psum(dropped, token_sharding_axes)
    return out, common.CapacityDrops(jnp.zeros_like(dropped), receiver_dropped=dropped)


def install() -> None:
    """Makes `implementation="deepep"` mean jax_sm_free: levanter's list of names is closed."""
    grug_moe._moe_mlp_ep_deepep_local = exchange
