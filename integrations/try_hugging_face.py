"""Layers of Hugging Face's transformers, in torch, against `hugging_face_layer`: check.

A model of one layer with random weights is saved as `save_pretrained` saves it, and read from
there; so are its gradients. Needs requirements/integrations/hugging_face.txt.
"""

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import comparing  # first of those that import JAX: it chooses the devices
import hugging_face_layer as ours
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax import Array, P
from jax.sharding import AxisType
from safetensors.numpy import load_file

HIDDEN, WIDTH, EXPERTS, TOKENS = 32, 24, 16, 64
COMMON = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_experts_per_tok": 4,
    "num_local_experts": EXPERTS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8}
# The class of the model, its configuration, and what `Routing` makes of that.
MODELS: dict[str, tuple[str, dict[str, Any], ours.Routing]] = {
    "mixtral": ("Mixtral", {}, ours.Routing(4, renormalise=True)),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": EXPERTS, "shared_expert_intermediate_size": 24},
        ours.Routing(4),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 16},
        ours.Routing(4, renormalise=True),
    ),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}, ours.Routing(4)),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT
        | {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0},
        ours.Routing(4, renormalise=True, scale=2.5, num_groups=4, top_groups=2),
    ),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": EXPERTS, "first_k_dense_replace": 0, "head_dim": 16},
        ours.Routing(4, renormalise=True),
    ),
    "longcat_flash": (
        "LongcatFlash",
        LATENT
        | {
            "num_layers": 1,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 8,
            "moe_topk": 4,
            "expert_ffn_hidden_size": WIDTH,
            "ffn_hidden_size": WIDTH,
        },
        ours.Routing(4, scale=6.0),
    ),
    "gpt_oss": ("GptOss", {"head_dim": 16}, ours.Routing(4)),
    "llama4": (
        "Llama4",
        {"intermediate_size_mlp": WIDTH, "moe_layers": [0], "head_dim": 16},
        ours.Routing(4),
    ),
}


def build(name: str) -> tuple[Any, Any]:
    """A model of one layer with random weights, and its mixture-of-experts block."""
    prefix, options, _ = MODELS[name]
    config_class = "Llama4TextConfig" if name == "llama4" else f"{prefix}Config"
    common = dict(COMMON)
    if name in ("longcat_flash", "deepseek_v3", "glm4_moe"):
        del common["num_local_experts"]  # another name for n_routed_experts
    if name == "longcat_flash":
        for key in ("num_hidden_layers", "intermediate_size", "moe_intermediate_size"):
            del common[key]
        del common["num_experts_per_tok"]
    config = getattr(transformers, config_class)(**(common | options))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim:
                spread = 0.1 if tensor.ndim == 1 else HIDDEN**-0.5
                tensor.copy_(spread * torch.randn(tensor.shape))
    block = getattr(model.model.layers[0], "feed_forward" if name == "llama4" else "mlp")
    return model, block


def saved(model: Any) -> dict[str, np.ndarray]:
    """What `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(next(Path(folder).glob("*.safetensors")))


def with_torch(model: Any, block: Any, x: np.ndarray, cotangent: np.ndarray) -> Any:
    """The block's result, the gradient to x, and a checkpoint of the weights' gradients."""
    rows = torch.tensor(x[None], requires_grad=True)
    y = block(rows)
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    y.backward(torch.tensor(cotangent))
    with torch.no_grad():
        for parameter in model.parameters():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    return y.detach().numpy(), rows.grad.numpy()[0], saved(model)


def check() -> None:
    """Results and gradients of nine families."""
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    transformers.utils.logging.disable_progress_bar()
    checks = comparing.Checks()
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    small, cotangent = (rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32) for _ in range(2))
    for name, (_, _, routing) in MODELS.items():
        x = 10 * small if name == "gpt_oss" else small  # so that its clamps matter
        family = ours.FAMILIES[name]
        model, block = build(name)
        weights = ours.load(family, saved(model), layer=0)
        y, dx, gradients = with_torch(model, block, x, cotangent)
        want = ours.load(family, gradients, layer=0)
        of_experts = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        specs = {key: P("expert") if key in of_experts else P() for key in weights}
        mapped = jax.shard_map(
            functools.partial(ours.layer, family, routing, "expert"),
            mesh=mesh,
            in_specs=(P("expert"), specs),
            out_specs=P("expert"),
            check_vma=False,  # which the products for GPUs need
        )

        def loss(x: Array, weights: dict[str, Array], mapped: Any = mapped) -> Any:
            y = mapped(x, weights)
            return (y * cotangent).sum(), y

        with jax.set_mesh(mesh):
            (_, got), (got_dx, got_dw) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
                x, jax.tree.map(jnp.asarray, weights)
            )
        errors = {f"d{key}": comparing.error(got_dw[key], want[key]) for key in want}
        errors.pop("dcorrection", None)  # a buffer, without a gradient
        checks.near(
            name, 1e-5, out=comparing.error(got, y), dx=comparing.error(got_dx, dx), **errors
        )
    checks.end()


def names() -> None:
    """Prints what is saved of each block, of the experts the first."""
    for name in MODELS:
        for key, array in sorted(saved(build(name)[0]).items()):
            if f".{ours.FAMILIES[name].block}." in key and not re.search(r"experts\.[1-9]", key):
                print(name, key, array.shape)


if __name__ == "__main__":
    comparing.main(check=check, names=names)
