"""Loss and gradients of the model over all ranks, and one step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, P, lax
from jax.sharding import Mesh, NamedSharding

from moe_lm.model import AXES, ExpertParam

IMBALANCE_WEIGHT = 0.02


class Metrics(NamedTuple):
    """Bits per byte of the text; i32 [layers, experts] rows of each expert; rows dropped."""

    bits: Array
    counts: Array
    dropped: Array


def param_specs(params: nnx.State) -> Any:
    """How the parameters lie: the experts' by expert, all others on every rank."""
    return jax.tree.map(
        lambda param: P(AXES) if isinstance(param, ExpertParam) else P(),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def place(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Puts the parameters on their devices."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params))
    return jax.device_put(params, shardings)


def make_loss(graphdef: Any, params: nnx.State, mesh: Mesh) -> Callable[..., Any]:
    """loss(params, batch) -> (loss, Metrics) with batch i32 [B, S + 1], spread over the ranks."""

    def per_rank(params: nnx.State, batch: Array) -> tuple[Array, Metrics]:
        logits, stats = nnx.merge(graphdef, params)(batch[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
        loss = lax.pmean(nats + IMBALANCE_WEIGHT * stats.imbalance.mean(), AXES)
        bits = lax.pmean(nats, AXES) / math.log(2)
        return loss, Metrics(bits, stats.counts, lax.psum(stats.dropped.sum(), AXES))

    return jax.shard_map(
        per_rank,
        mesh=mesh,
        in_specs=(param_specs(params), P(AXES)),
        out_specs=(P(), Metrics(P(), P(None, AXES), P())),
    )


def make_step(loss: Callable[..., Any], optimizer: optax.GradientTransformation) -> Any:
    """Jitted step(params, state, batch) -> (params, state, Metrics)."""

    def step(params: nnx.State, state: Any, batch: Array) -> tuple[nnx.State, Any, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def largest_difference(got: Any, want: Any) -> float:
    """The largest difference of two trees, relative to the largest value of each array."""

    def one(a: Array, b: Array) -> float:
        return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, got, want)))
