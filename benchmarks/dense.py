"""The layer without an exchange of rows: experts take all tokens, and a token's gates choose.

What small models do, where products over all tokens cost less than to send each token its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.cases import Case


def _gates(topk_idx: Array, topk_weights: Array, num_experts: int) -> Array:
    """f32 [T, num_experts]: the weight of each expert, 0 where a token does not name it."""
    chosen = jax.nn.one_hot(topk_idx, num_experts, dtype=topk_weights.dtype)
    return jnp.einsum("tk,tke->te", topk_weights, chosen)


def _experts(x: Array, gates: Array, up: Array, down: Array) -> Array:
    """All of these experts on all of these tokens, each by its gate."""
    h = jax.nn.gelu(jnp.einsum("th,ehf->etf", x, up))
    return jnp.einsum("etf,efh,te->th", h, down, gates)


def _and_back(layer: Callable[..., Array]) -> Callable[..., Any]:
    def loss(x: Array, topk_weights: Array, params: Any, topk_idx: Array) -> Array:
        out = layer(x, topk_idx, topk_weights, *params)
        return jnp.square(out.astype(jnp.float32)).sum()

    def grads(x: Array, topk_idx: Array, topk_weights: Array, *params: Array) -> Any:
        return jax.grad(loss, (0, 1, 2))(x, topk_weights, params, topk_idx)

    return grads


def gathered_and_back(case: Case, axis: str) -> Callable[..., Any]:
    """Per rank, as `contestants.layer_and_back`: its own experts on the tokens of all ranks."""

    def layer(x: Array, topk_idx: Array, topk_weights: Array, up: Array, down: Array) -> Array:
        gates = _gates(topk_idx, topk_weights, case.num_experts)
        x, gates = (lax.all_gather(array, axis, tiled=True) for array in (x, gates))
        first = lax.axis_index(axis) * case.local_experts
        own = lax.dynamic_slice_in_dim(gates, first, case.local_experts, 1)
        return lax.psum_scatter(_experts(x, own, up, down), axis, tiled=True)

    return _and_back(layer)


def replicated_and_back(case: Case, axis: str) -> Callable[..., Any]:
    """The same where every rank has the weights of all experts: these on its own tokens.

    Gradients for the weights are each rank's own experts' again.
    """

    def layer(x: Array, topk_idx: Array, topk_weights: Array, up: Array, down: Array) -> Array:
        return _experts(x, _gates(topk_idx, topk_weights, case.num_experts), up, down)

    def grads(x: Array, topk_idx: Array, topk_weights: Array, *params: Array) -> Any:
        to_x, to_weights, to_params = _and_back(layer)(x, topk_idx, topk_weights, *params)
        own = (lax.psum_scatter(grad, axis, tiled=True) for grad in to_params)
        return to_x, to_weights, tuple(own)

    return grads
