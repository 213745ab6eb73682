"""Inputs of a layer for each place of an axis that `jax.vmap` maps over, and a loop over it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import sample_inputs
import support
from support import make_config

NUM_PLACES = 3
CONFIG = make_config(num_experts=2 * support.SOME_RANKS, num_slots=NUM_PLACES)


def inputs_of(config, num_places=NUM_PLACES, rows=None):
    """x, topk_idx, topk_weights, y, each [ep_size, num_places, ...]."""
    rows = config.recv_capacity if rows is None else rows
    places = [
        (
            *sample_inputs.make_inputs(config, seed=seed),
            sample_inputs.make_rows(config, rows, 10 + seed),
        )
        for seed in range(num_places)
    ]
    return tuple(np.stack(parts, axis=1) for parts in zip(*places, strict=True))


def in_a_loop(fn, in_axes, out_axes):
    """A loop over the mapped axis: what jax.vmap with the same arguments must give."""

    def looped(*args):
        axes = (in_axes,) * len(args) if isinstance(in_axes, int) else in_axes
        mapped = [a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None]
        outs = [
            fn(
                *(
                    a if axis is None else jax.lax.index_in_dim(a, place, axis, keepdims=False)
                    for a, axis in zip(args, axes, strict=True)
                )
            )
            for place in range(mapped[0])
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, out_axes), *outs)

    return looped


def overlapped(api, x, topk_idx, weights, y):
    """Nothing but copies and products, so that no rounding depends on how XLA compiles it."""
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    doubled, sent = api.overlap(sent, lambda x: 2 * x, x)
    recv = api.buffer.dispatch_recv(sent)
    sent = api.buffer.combine_send(recv.x * y, recv.layout, recv.weights)
    doubled, sent = api.overlap(sent, lambda x: -x, doubled)
    return api.buffer.combine_recv(sent), doubled
