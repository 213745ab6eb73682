"""jax_sm_free as the exchange of MaxText's `RoutedMoE`.

Copy this file into your project, and call `install` once before the model is traced. It takes the
place of `sparse_matmul`, so configure the model with `sparse_matmul=True`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from maxtext.common.common_types import DecoderBlockType
from maxtext.layers import moe
from maxtext.utils.sharding import remove_mesh_axes_from_partition_spec

import jax_sm_free as smf


def routed_experts(
    self: moe.RoutedMoE,
    x: Array,
    logits: Array,
    pre_bias_logits: Array | None,
    w0: Array,
    w1: Array,
    wo: Array,
    b0: Array | None,
    b1: Array | None,
    bo: Array | None,
    input_ids: Array | None = None,
    forced_routed_experts: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """Returns what `RoutedMoE.sparse_matmul` does: rows, and what the router's balance is."""
    _check(self)
    axes = self._logical_to_mesh_axes
    tokens = axes(("activation_batch", "activation_norm_length", None))
    rows = axes(("activation_batch", "activation_norm_length", "activation_embed"))
    # The weights of a rank's experts, gathered over the ranks that share them ("fsdp").
    up, down = (
        remove_mesh_axes_from_partition_spec(axes(names), ("fsdp",))
        for names in (("exp", None, "mlp_no_fsdp"), ("exp", "mlp_no_fsdp", None))
    )
    up_bias, down_bias = axes(("exp", "activation_mlp")), axes(("exp", "activation_embed"))

    put = self._maybe_shard_with_pspec
    logits = put(logits, tokens)
    topk_weights, topk_idx = self.get_topk(
        logits, pre_bias_logits, self.rngs, input_ids, forced_routed_experts
    )
    balance = _balance(self, topk_idx, logits, pre_bias_logits)
    if forced_routed_experts is not None:
        topk_idx = jnp.where(moe.valid_expert_mask(topk_idx, self.num_experts), topk_idx, -1)

    args = [(x, rows), (topk_idx, tokens), (topk_weights, tokens), (w0, up), (w1, up), (wo, down)]
    if self.config.mlp_bias:
        args += [(b0, up_bias), (b1, up_bias), (bo, down_bias)]
    arrays, specs = zip(*args, strict=True)
    on_ranks = jax.shard_map(
        lambda *args: exchange(self, *args),
        mesh=self.mesh,
        in_specs=specs,
        out_specs=rows,
        check_vma=self.config.check_vma,
    )
    return on_ranks(*map(put, arrays, specs)), *balance


def exchange(
    self: moe.RoutedMoE, x: Array, topk_idx: Array, topk_weights: Array, *weights: Array
) -> Array:
    """The experts' part of a layer, on one rank.

    With tensor parallelism x has some of the columns, and these alone travel: each of a token's
    ranks along "tensor" is in an exchange of its own.
    """
    w0, w1, wo, *biases = weights
    tensor = self._tensor_parallelism_name if self.get_tensor_parallelism_size() > 1 else None
    factor = self.get_ragged_buffer_factor()
    buffer = smf.buffer_for(
        self._expert_parallelism_name,
        self.mesh,
        hidden=x.shape[-1],
        num_experts=self.num_experts,
        top_k=topk_idx.shape[-1],
        max_tokens=x.shape[0] * x.shape[1],
        capacity_factor=factor if factor > 0 else None,
        dtype=x.dtype,
    )

    def experts(recv: smf.Received) -> Array:
        rows = jax.lax.all_gather(recv.x, tensor, axis=1, tiled=True) if tensor else recv.x
        h0, h1 = (smf.grouped_matmul(rows, w, recv) for w in (w0, w1))
        if biases:
            h0, h1 = h0 + biases[0][recv.expert], h1 + biases[1][recv.expert]
        h0, h1 = checkpoint_name(h0, "moe_mlpwi_0"), checkpoint_name(h1, "moe_mlpwi_1")
        y = smf.grouped_matmul(self.apply_ffn_activation(h0, h1), wo, recv)
        if tensor:
            y = jax.lax.psum_scatter(y, tensor, scatter_dimension=1, tiled=True)
        if biases:
            y = y + biases[2][recv.expert]
        return checkpoint_name(y, "moe_mlpwo")

    return smf.moe(x, topk_idx, topk_weights, experts, buffer)


def _balance(self: moe.RoutedMoE, topk_idx: Array, logits: Array, pre_bias_logits: Any) -> Any:
    """The auxiliary loss and the update of the router's bias; None for what is switched off."""
    config, loss, update = self.config, None, None
    scores = logits if pre_bias_logits is None else pre_bias_logits
    if config.load_balance_loss_weight > 0 and not self.is_hash_routing:
        if moe.uses_megatron_seq_aux_loss(config):
            loss = self.megatron_seq_aux_loss(scores)
        else:
            probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
            loss = self.load_balance_loss(topk_idx, probabilities.astype(self.dtype))
    if self.should_update_load_balance():
        update = moe.calculate_expert_counts(topk_idx, self.num_experts)
        if config.gradient_accumulation_steps == 1:  # else MaxText takes the sign of the sum
            rate = config.routed_bias_update_rate
            update = moe.load_balance_updates_from_counts(update, self.num_experts, rate)
    return loss, update


def _check(self: moe.RoutedMoE) -> None:
    config = self.config
    if self.quant is not None:
        raise NotImplementedError(f"expected no quantization, got {config.quantization!r}")
    if config.decoder_block == DecoderBlockType.LLAMA4:
        raise NotImplementedError("expected weights of the experts' results, got Llama 4's")
    if config.moe_dropless_fallback is not None:
        raise NotImplementedError(
            f"expected no moe_dropless_fallback, got {config.moe_dropless_fallback!r}"
        )


def install() -> None:
    """Makes `sparse_matmul` of every `RoutedMoE` exchange over jax_sm_free."""
    moe.RoutedMoE.sparse_matmul = routed_experts
