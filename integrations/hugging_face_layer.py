"""Mixture-of-experts layers of nine families of Hugging Face models, over jax_sm_free.

`FAMILIES` says how each stores its weights and how its router chooses; `load` takes the weights of
one layer from a checkpoint; `layer` is the layer. docs/hugging_face.md has all of it as a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_sm_free as smf


def silu_glu(gate: Array, up: Array) -> Array:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up


def clamped_glu(gate: Array, up: Array) -> Array:
    """GPT-OSS's: both sides clamped at 7, a steeper sigmoid, and up + 1."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family stores a layer and what its router does.

    Attributes:
      block: the name of the layer within "model.layers.N.".
      router: the name of the router within the block; its weight is [experts, hidden].
      matrices: names of gate, up and down; each expert has its own, as [out, in].
      fused: "" or, where all experts are in one `gate_up_proj` [experts, in, out], where in it the
        columns of gate and up lie: "halves" or "interleaved". `down_proj` is [experts, in, out].
      scores: of the logits of all experts, before the choice.
      weights: of the scores of the chosen experts.
      activation: of gate and up.
      shared: the name of the shared expert within the block, or "".
      scales_input: whether a weight multiplies what goes into an expert, not what comes out.
    """

    block: str = "mlp"
    router: str = "gate"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: str = ""
    scores: Callable[[Array], Array] = jax.nn.softmax
    weights: Callable[[Array], Array] = lambda scores: scores
    activation: Callable[[Array, Array], Array] = silu_glu
    shared: str = ""
    scales_input: bool = False


def as_they_are(logits: Array) -> Array:
    """The logits."""
    return logits


FAMILIES = {
    "mixtral": Family(block="block_sparse_moe", matrices=("w1", "w3", "w2")),
    "qwen2_moe": Family(shared="shared_expert"),
    "qwen3_moe": Family(),
    "olmoe": Family(),
    "deepseek_v3": Family(scores=jax.nn.sigmoid, shared="shared_experts"),
    "glm4_moe": Family(scores=jax.nn.sigmoid, shared="shared_experts"),
    "longcat_flash": Family(router="router.classifier"),
    "gpt_oss": Family(
        router="router",
        fused="interleaved",
        scores=as_they_are,
        weights=jax.nn.softmax,
        activation=clamped_glu,
    ),
    "llama4": Family(
        block="feed_forward",
        router="router",
        fused="halves",
        scores=as_they_are,
        weights=jax.nn.sigmoid,
        shared="shared_expert",
        scales_input=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a model's configuration says of its router.

    Attributes:
      top_k: num_experts_per_tok (LongCat: moe_topk).
      renormalise: norm_topk_prob; Mixtral does so always.
      scale: routed_scaling_factor.
      num_groups, top_groups: n_group, topk_group; the choice is among the experts of `top_groups`.
    """

    top_k: int
    renormalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


def load(family: Family, checkpoint: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """One layer's weights, matrices as [in, out] and stacked by expert.

    Keys: router, gate, up, down; where the family has them router_bias, correction, gate_bias,
    up_bias, down_bias; shared_gate, shared_up, shared_down, shared_weight.
    """
    prefix = f"model.layers.{layer}.{family.block}."
    part = {k.removeprefix(prefix): v for k, v in checkpoint.items() if k.startswith(prefix)}
    weights = {"router": part[f"{family.router}.weight"].T}
    if family.fused:
        split = _halves if family.fused == "halves" else _interleaved
        weights["gate"], weights["up"] = split(part["experts.gate_up_proj"])
        weights["down"] = part["experts.down_proj"]
        if "experts.gate_up_proj_bias" in part:
            weights["router_bias"] = part[f"{family.router}.bias"]
            weights["gate_bias"], weights["up_bias"] = split(part["experts.gate_up_proj_bias"])
            weights["down_bias"] = part["experts.down_proj_bias"]
    else:
        num_experts = sum(f"experts.{e}.{family.matrices[2]}.weight" in part for e in range(10_000))
        for key, name in zip(("gate", "up", "down"), family.matrices, strict=True):
            stack = [part[f"experts.{e}.{name}.weight"].T for e in range(num_experts)]
            weights[key] = np.stack(stack)
    for name in part:
        if name.endswith("e_score_correction_bias"):
            weights["correction"] = part[name]
    if family.shared:
        for key in ("gate", "up", "down"):
            weights[f"shared_{key}"] = part[f"{family.shared}.{key}_proj.weight"].T
        if f"{family.shared}_gate.weight" in part:
            weights["shared_weight"] = part[f"{family.shared}_gate.weight"].T
    return weights


def _halves(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = columns.shape[-1] // 2
    return columns[..., :half], columns[..., half:]


def _interleaved(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return columns[..., ::2], columns[..., 1::2]


def choose(
    family: Family, routing: Routing, logits: Array, correction: Array
) -> tuple[Array, Array]:
    """Logits [T, experts], correction [experts] -> topk_idx i32, topk_weights f32 [T, top_k]."""
    scores = family.scores(logits.astype(jnp.float32))
    choice = jax.lax.stop_gradient(scores + correction)  # the weights are without the correction
    if routing.num_groups > 1:
        groups = choice.reshape(len(choice), routing.num_groups, -1)
        best_two = jax.lax.top_k(groups, 2)[0].sum(-1)
        floor = jax.lax.top_k(best_two, routing.top_groups)[0][:, -1:]
        choice = jnp.where((best_two >= floor)[..., None], groups, -jnp.inf).reshape(choice.shape)
    _, topk_idx = jax.lax.top_k(choice, routing.top_k)
    weights = family.weights(jnp.take_along_axis(scores, topk_idx, axis=-1))
    if routing.renormalise:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return topk_idx, weights * routing.scale


def layer(
    family: Family, routing: Routing, axis: str, x: Array, weights: dict[str, Array]
) -> Array:
    """X [T, hidden] of one rank -> the same. Runs inside `jax.shard_map`.

    Args:
      family: of `FAMILIES`.
      routing: from the model's configuration.
      axis: the axis of the mesh over which experts, and tokens, are sharded.
      x: the tokens.
      weights: as `load` returns them; of gate, up, down and their biases this rank's experts.
    """
    num_ranks = jax.lax.axis_size(axis)
    num_experts = num_ranks * weights["gate"].shape[0]
    logits = x.astype(jnp.float32) @ weights["router"].astype(jnp.float32)
    logits = logits + weights.get("router_bias", 0.0)
    correction = weights.get("correction", jnp.zeros(logits.shape[-1]))
    topk_idx, topk_weights = choose(family, routing, logits, correction)
    out = jnp.zeros_like(x)
    if logits.shape[-1] > num_experts:  # LongCat: the experts behind these return their input
        is_zero = topk_idx >= num_experts
        out = x * jnp.where(is_zero, topk_weights, 0).sum(-1, keepdims=True).astype(x.dtype)
        topk_idx = jnp.where(is_zero, -1, topk_idx)
    buffer = smf.buffer_for(
        axis,
        hidden=x.shape[-1],
        num_experts=num_experts,
        top_k=routing.top_k,
        max_tokens=x.shape[0],
        recv_capacity=num_ranks * x.shape[0] * routing.top_k,
        dtype=x.dtype,
    )

    def times(rows: Array, name: str, recv: smf.Received) -> Array:
        y = smf.grouped_matmul(rows, weights[name], recv)
        bias = weights.get(f"{name}_bias")
        return y if bias is None else y + bias[recv.expert]

    def experts(recv: smf.Received) -> Array:
        rows = recv.x
        if family.scales_input:
            rows = (rows * recv.weights[:, None]).astype(rows.dtype)
        h = family.activation(times(rows, "gate", recv), times(rows, "up", recv))
        return times(h, "down", recv)

    def shared(x: Array) -> Array:
        h = jax.nn.silu(x @ weights["shared_gate"]) * (x @ weights["shared_up"])
        y = h @ weights["shared_down"]
        if "shared_weight" in weights:
            y = jax.nn.sigmoid(x @ weights["shared_weight"]) * y
        return y

    of_all = shared if family.shared else None
    if not family.scales_input:
        return out + smf.moe(x, topk_idx, topk_weights, experts, buffer, shared=of_all)
    # The weights have been applied: combine sums without them.
    recv = buffer.dispatch(x, topk_idx, topk_weights)
    return buffer.combine(experts(recv), recv.layout) + shared(x)
