"""What is timed: ours and the peers behind one interface, as jitted functions of global arrays."""

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
from benchmarks.cases import Case, Inputs, Load
from benchmarks.pure_jax import Grouped, PureJax
from benchmarks.ragged import Ragged

AXIS = "ep"
SPLIT = P(AXIS)  # over the ranks, by the first axis
NODE_AXIS = "node"
EXPERT_HIDDEN = 64


@dataclasses.dataclass(frozen=True)
class Ours:
    """A `jax_sm_free.Buffer` with the interface of `PureJax`."""

    buffer: smf.Buffer

    @property
    def expert_capacity(self) -> int | None:
        """Rows of every expert's group, if all have as many."""
        return self.buffer.config.expert_capacity

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
        return _as_grouped(self.buffer.dispatch(x, topk_idx, topk_weights))

    def combine(self, y: Array, layout: Any, weights: Array) -> Array:
        return self.buffer.combine(y, layout, weights=weights)

    def dispatch_beside(self, fn: Callable[..., Any], args: tuple, *inputs: Array) -> tuple:
        """(fn(*args), dispatch(*inputs)), with fn between send and recv."""
        result, sent = smf.overlap(self.buffer.dispatch_send(*inputs), fn, *args)
        return result, _as_grouped(self.buffer.dispatch_recv(sent))

    def combine_beside(self, fn: Callable[..., Any], args: tuple, *inputs: Any) -> tuple:
        """(fn(*args), combine(*inputs)), with fn between send and recv."""
        result, sent = smf.overlap(self.buffer.combine_send(*inputs), fn, *args)
        return result, self.buffer.combine_recv(sent)


def _as_grouped(recv: smf.Received) -> Grouped:
    return Grouped(recv.x, recv.group_sizes, recv.weights, recv.dropped[None], handle=recv.layout)


def make_mesh(ep_size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:ep_size]), (AXIS,))


def make_mesh_of_nodes(devices: np.ndarray) -> Mesh:
    """Of [nodes, ranks of a node] devices."""
    return Mesh(devices, (NODE_AXIS, "gpu"))


def make_ours(
    case: Case,
    load: Load,
    mesh: Mesh,
    in_batches: bool = False,
    node_axis: str | None = None,
) -> Ours:
    """With `in_batches`, the groups of all experts have the rows of the fullest."""
    if in_batches:
        capacity = {"expert_capacity": load.expert_capacity}
    else:
        capacity = {"recv_capacity": load.recv_capacity}
    return Ours(
        smf.Buffer(
            mesh,
            mesh.axis_names,
            node_axis=node_axis,
            hidden=case.hidden,
            num_experts=case.num_experts,
            top_k=case.top_k,
            max_tokens=case.tokens,
            dtype=case.dtype,
            wire_dtype=case.wire_dtype,
            **capacity,
        )
    )


def make_peer(case: Case, load: Load) -> PureJax:
    return PureJax(AXIS, case.ep_size, case.num_experts, load.recv_capacity, load.pair_capacity)


def make_ragged(case: Case, load: Load, num_updates: int) -> Ragged:
    sizes = (case.ep_size, case.num_experts, load.recv_capacity, load.pair_capacity)
    return Ragged(AXIS, *sizes, num_updates=num_updates)


def put(inputs: Inputs, case: Case, mesh: Mesh) -> tuple[Array, Array, Array]:
    """The inputs on their devices, rows in the case's dtype."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    x, *rest = inputs
    return tuple(
        jax.device_put(part, sharding) for part in (np.asarray(x, jnp.dtype(case.dtype)), *rest)
    )


def on_ranks(
    fn: Callable[..., Any],
    mesh: Mesh,
    options: dict[str, Any] | None = None,
    in_specs: Any = None,
) -> Callable[..., Any]:
    """`fn` per rank, jitted; arrays are split by their first axis but for what `in_specs` says."""
    split = P(mesh.axis_names)
    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=in_specs or split, out_specs=split, check_vma=False
    )
    return jax.jit(mapped, compiler_options=options)


def make_mlp(case: Case, mesh: Mesh, width: int = EXPERT_HIDDEN) -> tuple[Array, Array]:
    """Weights of all experts, [num_experts, hidden, width] and [num_experts, width, hidden]."""
    sharding = NamedSharding(mesh, P(AXIS))
    shapes = (case.num_experts, case.hidden, width), (case.num_experts, width, case.hidden)

    def make() -> tuple[Array, ...]:
        keys = jax.random.split(jax.random.key(1))
        return tuple(
            (jax.random.normal(key, shape) * shape[1] ** -0.5).astype(case.dtype)
            for key, shape in zip(keys, shapes, strict=True)
        )

    return jax.jit(make, out_shardings=(sharding, sharding))()


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
