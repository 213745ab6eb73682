"""A mixture-of-experts layer: router, experts, and a dense expert beside each exchange."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, P
from jax.sharding import Mesh, NamedSharding

from benchmarks.cases import Case, Load
from benchmarks.contestants import AXIS, make_mlp
from benchmarks.programs import Step, after
from benchmarks.pure_jax import Grouped, spread

# More than any score, which are probabilities: the bias alone decides who is chosen.
_CHOSEN = 2.0


@dataclasses.dataclass(frozen=True)
class Widths:
    """Hidden columns of an expert that few tokens go to, and of one that all go to."""

    expert: int = 512
    shared: int = 2048


def make_params(case: Case, mesh: Mesh, widths: Widths) -> dict[str, Any]:
    """Parameters, split over the ranks by their first axis; dense ones are each rank's own."""
    sharding = NamedSharding(mesh, P(AXIS))
    hidden, ranks = case.hidden, case.ep_size
    shapes = {
        "router": (hidden, case.num_experts),
        "shared_up": (hidden, widths.shared),
        "shared_down": (widths.shared, hidden),
        "more_up": (hidden, widths.shared),
        "more_down": (widths.shared, hidden),
    }

    def make() -> dict[str, Array]:
        keys = jax.random.split(jax.random.key(2), len(shapes))
        return {
            name: (jax.random.normal(key, (ranks * rows, cols)) * rows**-0.5).astype(case.dtype)
            for key, (name, (rows, cols)) in zip(keys, shapes.items(), strict=True)
        }

    params = jax.jit(make, out_shardings=sharding)()
    up, down = make_mlp(case, mesh, widths.expert)
    return {**params, "up": up, "down": down}


def make_bias(case: Case, topk_idx: np.ndarray, mesh: Mesh) -> Array:
    """f32 [ep_size * tokens, num_experts] that makes the router choose `topk_idx`."""
    bias = np.zeros((topk_idx.shape[0], case.num_experts), np.float32)
    np.put_along_axis(bias, topk_idx, _CHOSEN, axis=1)
    return jax.device_put(bias, NamedSharding(mesh, P(AXIS)))


def layer(one: Any, case: Case, load: Load, params: dict[str, Any], x: Array, bias: Array) -> Array:
    """Per rank: x [T, hidden] to [T, hidden]."""
    scores = jax.nn.softmax((x @ params["router"]).astype(jnp.float32))
    topk_idx = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, case.top_k)[1]
    weights = jnp.take_along_axis(scores, topk_idx, axis=1)
    shared, grouped = one.dispatch_beside(
        _mlp, (x, params["shared_up"], params["shared_down"]), x, topk_idx, weights
    )
    of_groups = experts if one.expert_capacity is None else _batch
    y = of_groups(grouped, params["up"], params["down"], load.expert_capacity)
    more, out = one.combine_beside(
        _mlp, (x, params["more_up"], params["more_down"]), y, grouped.handle, grouped.weights
    )
    return x + shared + out + more


def forward(one: Any, case: Case, load: Load) -> Step:
    return lambda carry, params, x, bias: layer(one, case, load, params, after(x, carry), bias)


def forward_and_backward(one: Any, case: Case, load: Load) -> Step:
    """Gradients of a loss for the parameters and for x."""

    def loss(params: Any, x: Array, bias: Array) -> Array:
        return jnp.square(layer(one, case, load, params, x, bias).astype(jnp.float32)).mean()

    grads = jax.grad(loss, (0, 1))
    return lambda carry, params, x, bias: grads(params, after(x, carry), bias)


def _mlp(x: Array, up: Array, down: Array) -> Array:
    return jax.nn.gelu(x @ up) @ down


def experts(
    grouped: Grouped, up: Array, down: Array, capacity: int, weights: Array | None = None
) -> Array:
    """All experts as one batch of `capacity` rows each, from groups that have the rows they need.

    With weights, each row is multiplied by its weight, where an expert is narrow.

    Not `ragged_dot`: XLA:GPU makes of it a dense product over [rows, experts, hidden], 33 GB for
    the headline's sizes, beside which no exchange would count.
    """
    num_rows, num_groups = grouped.x.shape[0], up.shape[0]
    end = jnp.cumsum(grouped.group_sizes)
    begin = end - grouped.group_sizes
    place = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.where(place < grouped.group_sizes[:, None], begin[:, None] + place, num_rows)
    row = row.reshape(-1)  # Of each place in the batch.

    rows = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.searchsorted(end, rows, side="right", method="compare_all").astype(jnp.int32)
    nowhere = num_groups * capacity
    within = rows - begin.at[group].get(mode="clip")
    batch_place = jnp.where(
        (group < num_groups) & (within < capacity), group * capacity + within, nowhere
    )

    batch = spread(grouped.x, row, batch_place[:, None])
    if weights is not None:
        weights = spread(weights[:, None], row, batch_place[:, None])
    y = _batch(grouped._replace(x=batch), up, down, capacity, weights)
    return spread(y, batch_place, row[:, None])


def _batch(
    grouped: Grouped, up: Array, down: Array, capacity: int, weights: Array | None = None
) -> Array:
    """The same from groups of `capacity` rows."""
    batch = grouped.x.reshape(up.shape[0], capacity, -1)
    h = jax.nn.gelu(batch @ up)
    if weights is not None:
        h = (h * weights.reshape(up.shape[0], capacity, 1)).astype(h.dtype)
    return (h @ down).reshape(grouped.x.shape)
