"""A small byte-level transformer whose feed-forward layers are mixtures of experts.

The model runs per rank, inside `jax.shard_map`: each rank has its own sequences, all parameters
but the experts', and the experts that it owns.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

# The experts are spread over both axes of the mesh. With one node, the buffer has one tier.
NODE_AXIS = "node"
AXES = (NODE_AXIS, "device")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; `capacity` is the capacity_factor of its buffer."""

    vocabulary: int = 256
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    expert_hidden: int = 128
    capacity: float = 1.5
    remat: bool = True


class Backend(NamedTuple):
    """Who moves the tokens: `jax_sm_free` or `jax_sm_free.reference`, and a buffer of it."""

    ops: Any
    buffer: Any


def make_backend(ops: Any, mesh: Any, config: ModelConfig, max_tokens: int) -> Backend:
    """A buffer for `max_tokens` tokens of each rank."""
    buffer = ops.Buffer(
        mesh,
        AXES,
        node_axis=NODE_AXIS,
        hidden=config.hidden,
        num_experts=config.experts,
        top_k=config.top_k,
        max_tokens=max_tokens,
        capacity_factor=config.capacity,
        dtype=jnp.float32,
    )
    return Backend(ops, buffer)


class LayerStats(NamedTuple):
    """What a layer's router did: rows of this rank's experts, rows dropped, imbalance."""

    counts: Array
    dropped: Array
    imbalance: Array


class ExpertParam(nnx.Param):
    """A parameter whose first axis is the expert: each rank has its own part."""


class Mlp(nnx.Module):
    """The shared expert, which every token goes to."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(config.hidden, config.expert_hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.expert_hidden, config.hidden, use_bias=False, rngs=rngs)

    def begin(self, x: Array) -> Array:
        """The first product, which runs while rows travel between nodes."""
        return jax.nn.gelu(self.up(x))

    def end(self, h: Array) -> Array:
        """The second product, which runs while rows travel within a node."""
        return self.down(h)


class Experts(nnx.Module):
    """The experts of this rank, on rows grouped by expert."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        shape = (config.experts, config.hidden, config.expert_hidden)
        self.up = ExpertParam(init(rngs.params(), shape))
        self.down = ExpertParam(init(rngs.params(), (shape[0], shape[2], shape[1])))

    def __call__(self, x: Array, group_sizes: Array) -> Array:
        h = jax.nn.gelu(jax.lax.ragged_dot(x, self.up[...], group_sizes))
        return jax.lax.ragged_dot(h, self.down[...], group_sizes)


class MoeLayer(nnx.Module):
    """Router, shared expert, and the experts of all ranks."""

    def __init__(self, config: ModelConfig, backend: Backend, rngs: nnx.Rngs) -> None:
        self.config = config
        self.ops, self.buffer = backend
        self.router = nnx.Linear(config.hidden, config.experts, use_bias=False, rngs=rngs)
        self.shared = Mlp(config, rngs)
        self.experts = Experts(config, rngs)

    def __call__(self, x: Array) -> tuple[Array, LayerStats]:
        """X: [T, hidden]."""
        probabilities = jax.nn.softmax(self.router(x))
        weights, topk_idx = jax.lax.top_k(probabilities, self.config.top_k)
        weights = weights / weights.sum(-1, keepdims=True)

        sent = self.buffer.dispatch_send(x, topk_idx, weights)
        h, sent = self.ops.overlap(sent, Mlp.begin, self.shared, x)
        sent = self.buffer.dispatch_forward(sent)
        shared, sent = self.ops.overlap(sent, Mlp.end, self.shared, h)
        recv = self.buffer.dispatch_recv(sent)
        y = self.experts(recv.x, recv.group_sizes)
        sent = self.buffer.combine_send(y, recv.layout, weights=recv.weights)
        imbalance, sent = self.ops.overlap(sent, _imbalance, probabilities, topk_idx)
        out = shared + self.buffer.combine_recv(sent)
        return out, LayerStats(recv.counts, recv.dropped, imbalance)


def _imbalance(probabilities: Array, topk_idx: Array) -> Array:
    """1 when all experts get the same, num_experts when one gets all.

    The auxiliary loss of the Switch Transformer (arXiv:2101.03961, equation 4).
    """
    num_experts = probabilities.shape[-1]
    share = jnp.bincount(topk_idx.reshape(-1), length=num_experts) / topk_idx.size
    return num_experts * (share * probabilities.mean(0)).sum()


class Attention(nnx.Module):
    """Causal self-attention with rotary positions (arXiv:2104.09864)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        self.qkv = nnx.Linear(config.hidden, 3 * config.hidden, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(config.hidden, config.hidden, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """X: [B, S, hidden]."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3 * self.heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=2)
        out = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        return self.out(out.reshape(x.shape))


def _rotate(x: Array) -> Array:
    """Rotates pairs of columns by angles that grow with the position; x: [B, S, heads, D]."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """Attention and a mixture of experts, each on a normalised residual stream."""

    def __init__(self, config: ModelConfig, backend: Backend, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.moe_norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.moe = MoeLayer(config, backend, rngs)

    def __call__(self, x: Array) -> tuple[Array, LayerStats]:
        """X: [B, S, hidden]."""
        x = x + self.attention(self.attention_norm(x))
        out, stats = self.moe(self.moe_norm(x).reshape(-1, x.shape[-1]))
        return x + out.reshape(x.shape), stats


class MoeLm(nnx.Module):
    """The whole model; its parameters as made are those of all ranks."""

    def __init__(self, config: ModelConfig, backend: Backend, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocabulary, config.hidden, rngs=rngs)
        self.embed_before = nnx.Embed(config.vocabulary, config.hidden, rngs=rngs)
        self.blocks = nnx.List(Block(config, backend, rngs) for _ in range(config.layers))
        self.norm = nnx.RMSNorm(config.hidden, rngs=rngs)

    def __call__(self, tokens: Array) -> tuple[Array, LayerStats]:
        """Tokens: i32 [B, S]. Returns logits [B, S, vocabulary] and stats stacked by layer."""
        # A byte says little: each position sees its own and the one before from the start.
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        x = self.embed(tokens) + self.embed_before(before)
        call = jax.checkpoint(Block.__call__) if self.config.remat else Block.__call__
        stats = []
        for block in self.blocks:
            x, one = call(block, x)
            stats.append(one)
        return self.embed.attend(self.norm(x)), jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *stats
        )
