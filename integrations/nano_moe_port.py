"""The mixture-of-experts layer of nano-moe-jax with its experts spread over a mesh."""

import jax
from flax import linen as nn
from jax import Array, P
from nano_moe.config import NanoMoEConfig
from nano_moe.layers import Router

import jax_sm_free as smf


class MoELayer(nn.Module):
    """`nano_moe.layers.MoELayer`, which computes every expert on every token, made to exchange."""

    config: NanoMoEConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> tuple[Array, Array]:
        cfg, (_, length, hidden) = self.config, x.shape
        gates, indices, aux_loss = Router(n_experts=cfg.n_experts, top_k=cfg.top_k)(x)
        # --- the port
        he, zeros = nn.initializers.he_normal(batch_axis=0), nn.initializers.zeros
        w1 = self.param("w1", he, (cfg.n_experts, hidden, cfg.d_ff))
        b1 = self.param("b1", zeros, (cfg.n_experts, cfg.d_ff))
        w2 = self.param("w2", he, (cfg.n_experts, cfg.d_ff, hidden))
        b2 = self.param("b2", zeros, (cfg.n_experts, hidden))

        def on_rank(x, indices, gates, w1, b1, w2, b2):
            sizes = {"hidden": hidden, "num_experts": cfg.n_experts, "top_k": cfg.top_k}
            tokens = x.shape[0] * length
            buffer = smf.buffer_for("ep", **sizes, max_tokens=tokens, dtype=x.dtype)

            def experts(recv):
                h = nn.gelu(smf.grouped_matmul(recv.x, w1, recv) + b1[recv.expert])
                return smf.grouped_matmul(h, w2, recv) + b2[recv.expert]

            return smf.moe(x, indices, gates, experts, buffer)

        mapped = jax.shard_map(on_rank, in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
        output = mapped(x, indices, gates, w1, b1, w2, b2)
        # --- from here as it was
        output = nn.Dropout(rate=cfg.dropout_rate)(output, deterministic=deterministic)
        return output, aux_loss
