"""What is timed: ours and the peer behind one interface, as jitted functions of global arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, P
from jax.sharding import Mesh, NamedSharding

import jax_sm_free as smf
from benchmarks.cases import NUM_EXPERTS, TOP_K, Case, Inputs, Load
from benchmarks.pure_jax import Grouped, PureJax

AXIS = "ep"
EXPERT_HIDDEN = 64


@dataclasses.dataclass(frozen=True)
class Ours:
    """A `jax_sm_free.Buffer` with the interface of `PureJax`."""

    buffer: smf.Buffer

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
        recv = self.buffer.dispatch(x, topk_idx, topk_weights)
        return Grouped(
            recv.x, recv.group_sizes, recv.weights, recv.dropped[None], handle=recv.layout
        )

    def combine(self, y: Array, layout: Any, weights: Array) -> Array:
        return self.buffer.combine(y, layout, weights=weights)


def make_mesh(ep_size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:ep_size]), (AXIS,))


def make_ours(case: Case, load: Load, mesh: Mesh) -> Ours:
    return Ours(
        smf.Buffer(
            mesh,
            AXIS,
            hidden=case.hidden,
            num_experts=NUM_EXPERTS,
            top_k=TOP_K,
            max_tokens=case.tokens,
            recv_capacity=load.recv_capacity,
            dtype=case.dtype,
        )
    )


def make_peer(case: Case, load: Load) -> PureJax:
    return PureJax(AXIS, case.ep_size, NUM_EXPERTS, load.recv_capacity, load.pair_capacity)


def put(inputs: Inputs, case: Case, mesh: Mesh) -> tuple[Array, Array, Array]:
    """The inputs on their devices, rows in the case's dtype."""
    sharding = NamedSharding(mesh, P(AXIS))
    x, *rest = inputs
    return tuple(
        jax.device_put(part, sharding) for part in (np.asarray(x, jnp.dtype(case.dtype)), *rest)
    )


def on_ranks(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`fn` per rank, jitted; all arrays are split over the ranks by their first axis."""
    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    )


def make_mlp(case: Case, mesh: Mesh) -> tuple[Array, Array]:
    """Weights of all experts, [NUM_EXPERTS, ...]."""
    rng = np.random.default_rng(1)
    shape = (NUM_EXPERTS, case.hidden, EXPERT_HIDDEN)
    up, down = rng.standard_normal(shape), rng.standard_normal((shape[0], shape[2], shape[1]))
    sharding = NamedSharding(mesh, P(AXIS))
    return tuple(
        jax.device_put((w / w.shape[1] ** 0.5).astype(jnp.dtype(case.dtype)), sharding)
        for w in (up, down)
    )


def mlp(grouped: Grouped, up: Array, down: Array) -> Array:
    h = jax.nn.gelu(jax.lax.ragged_dot(grouped.x, up, grouped.group_sizes))
    return jax.lax.ragged_dot(h, down, grouped.group_sizes)


def dispatch_and_back(contestant: Any) -> Callable[..., Any]:
    """Per rank: dispatch, and its gradients for x and the weights, for cotangents `ct`."""

    def run(x: Array, topk_idx: Array, topk_weights: Array, ct: tuple[Array, Array]) -> Any:
        def dispatch(x: Array, topk_weights: Array) -> tuple[Array, Array]:
            grouped = contestant.dispatch(x, topk_idx, topk_weights)
            return grouped.x, grouped.weights

        out, pull_back = jax.vjp(dispatch, x, topk_weights)
        return out, pull_back(ct)

    return run


def combine_and_back(contestant: Any) -> Callable[..., Any]:
    """Per rank: combine, and its gradients for y and the weights, for a cotangent `ct`."""

    def run(y: Array, handle: Any, weights: Array, ct: Array) -> Any:
        out, pull_back = jax.vjp(lambda y, w: contestant.combine(y, handle, w), y, weights)
        return out, pull_back(ct)

    return run


def layer_and_back(contestant: Any) -> Callable[..., Any]:
    """Per rank: gradients of a layer for x, the weights, and the experts' parameters."""

    def loss(x: Array, topk_weights: Array, params: Any, topk_idx: Array) -> Array:
        grouped = contestant.dispatch(x, topk_idx, topk_weights)
        out = contestant.combine(mlp(grouped, *params), grouped.handle, grouped.weights)
        return jnp.square(out.astype(jnp.float32)).sum()

    def grads(x: Array, topk_idx: Array, topk_weights: Array, *params: Array) -> Any:
        return jax.grad(loss, (0, 1, 2))(x, topk_weights, params, topk_idx)

    return grads
