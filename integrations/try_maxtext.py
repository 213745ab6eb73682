"""MaxText's `RoutedMoE` over jax_sm_free, beside its own exchanges: check, time or train.

Needs requirements/integrations/maxtext.txt.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparing  # first: it chooses the devices

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")

import jax
import jax.numpy as jnp
import maxtext.configs
import maxtext_exchange
from flax import linen, nnx
from jax import Array
from maxtext.configs import pyconfig
from maxtext.layers import initializers, moe
from maxtext.utils import maxtext_utils

import jax_sm_free as smf

OWN = moe.RoutedMoE.sparse_matmul
BASE = str(Path(maxtext.configs.__file__).with_name("base.yml"))
SIZES = {
    "run_name": "try",
    "model_name": "default",
    "decoder_block": "mixtral",
    "base_emb_dim": 32,
    "base_mlp_dim": 64,
    "base_moe_mlp_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 8,
    "base_num_decoder_layers": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 256,
    "per_device_batch_size": 1,
    "max_target_length": 16,
    "dtype": "float32",
    "weight_dtype": "float32",
    "float32_weight_sum": True,
    "attention": "dot_product",
    "megablox": False,
    "sparse_matmul": True,
    "load_balance_loss_weight": 0.01,
    "ici_fsdp_parallelism": 1,
    "ici_expert_parallelism": 8,
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "log_config": False,
}
# MaxText's ring on CPU; it wants a buffer below the worst case.
RING = {
    "use_ring_of_experts": True,
    "use_ragged_sort": True,
    "ragged_gather_fallback": True,
    "ragged_gather_reduce_fallback": True,
}
DENSE = {"sparse_matmul": False}


def configure(**options: Any) -> Any:
    """A configuration as MaxText's command line would make it."""
    told = [f"{key}={value}" for key, value in (SIZES | options).items()]
    return pyconfig.initialize(["try_maxtext", BASE, *told])


class Program:
    """A layer with random weights, under its mesh and its axis rules."""

    def __init__(
        self,
        method: Callable[..., Any],
        policy: Any = None,
        forced: bool = False,
        **options: Any,
    ) -> None:
        self.method = method
        self.config = config = configure(**options)
        self.mesh = maxtext_utils.get_mesh_from_config(config)
        with self._around():
            layer = moe.RoutedMoE(
                config,
                config.num_experts,
                config.num_experts_per_tok,
                self.mesh,
                initializers.nd_dense_init(1.0, "fan_in", "truncated_normal"),
                ("embed", None),
                nnx.Rngs(params=0),
                intermediate_dim=config.moe_mlp_dim,
                weight_dtype=config.weight_dtype,
                dtype=config.dtype,
            )
        for bias in (layer.wi_0_bias, layer.wi_1_bias, layer.wo_bias, layer.gate.bias):
            if bias is not None:
                bias[...] = jax.random.normal(jax.random.key(2), bias.shape, bias.dtype)
        graph, self.params, rest = nnx.split(layer, nnx.Param, ...)
        shape = self.mesh.size, config.max_target_length
        routes = None
        if forced:  # some of them to no expert
            wide = (*shape, config.num_experts_per_tok)
            routes = jax.random.randint(jax.random.key(3), wide, -1, config.num_experts)

        def apply(params: Any, x: Array) -> Any:
            y, loss, update = nnx.merge(graph, params, rest)(x, forced_routed_experts=routes)
            return y, (loss, update)

        if policy is not None:
            apply = jax.checkpoint(apply, policy=policy)

        def loss(params: Any, x: Array, cotangent: Array) -> Any:
            y, balance = apply(params, x)
            by_cotangent = y.astype(jnp.float32) * cotangent.astype(jnp.float32)
            return by_cotangent.sum() + (0 if balance[0] is None else balance[0]), (y, balance)

        self.forward = jax.jit(apply)
        self.gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        keys = jax.random.split(jax.random.key(1))
        self.x, self.cotangent = (
            jax.random.normal(key, (*shape, config.emb_dim), config.dtype) for key in keys
        )

    def _around(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        moe.RoutedMoE.sparse_matmul = self.method
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(linen.logical_axis_rules(self.config.logical_axis_rules))
        return stack

    def run(self, *, gradients: bool = True) -> Any:
        """((gradients of the weights, of x), (y, what balances)), or the latter alone."""
        with self._around():
            if gradients:
                return self.gradients(self.params, self.x, self.cotangent)
            return self.forward(self.params, self.x)

    def compile(self) -> Any:
        """The compiled program with gradients."""
        with self._around():
            return self.gradients.lower(self.params, self.x, self.cotangent).compile()


OURS = maxtext_exchange.routed_experts
MESHES: dict[str, dict[str, Any]] = {
    "expert=8": {},
    "expert=4 fsdp=2": {"ici_expert_parallelism": 4, "ici_fsdp_parallelism": 2},
    "expert=4 tensor=2": {"ici_expert_parallelism": 4, "ici_tensor_parallelism": 2},
    "expert=2 data=2 context=2": {
        "ici_expert_parallelism": 2,
        "ici_data_parallelism": 2,
        "ici_context_parallelism": 2,
        "load_balance_loss_weight": 0.0,
    },
    "expert=8, explicit axes": {"shard_mode": "explicit"},
    "expert=4 fsdp=2, explicit axes": {
        "shard_mode": "explicit",
        "ici_expert_parallelism": 4,
        "ici_fsdp_parallelism": 2,
    },
    "expert=8, mlp_bias": {"mlp_bias": True},
    "expert=4 tensor=2, mlp_bias": {
        "mlp_bias": True,
        "ici_expert_parallelism": 4,
        "ici_tensor_parallelism": 2,
    },
}

ROUTERS: dict[str, dict[str, Any]] = {
    "forced routing": {"forced": True},
    "DeepSeek-V3's router": {
        "model_name": "deepseek3-tiny",
        "decoder_block": "deepseek",
        "override_model_config": True,
        "routed_bias_update_rate": 0.001,
        "n_routing_groups": 4,
        "topk_routing_group": 2,
        # MaxText's dense path takes it of the scores with the bias, its others, and ours, without.
        "load_balance_loss_weight": 0.0,
    },
}


def check() -> None:
    """The result and all gradients are those of MaxText's dense path and of its ring."""
    checks = comparing.Checks()
    for dtype, bound in (("float32", 3e-6), ("bfloat16", 3e-2)):
        for mesh, options in MESHES.items():
            ours = Program(OURS, dtype=dtype, **options).run()
            dense = Program(OWN, dtype=dtype, **options, **DENSE).run()
            _compare(checks, f"{dtype} {mesh}, dense", bound, ours, dense)
    for router, options in ROUTERS.items():
        ours, dense = (Program(m, **options, **o).run() for m, o in ((OURS, {}), (OWN, DENSE)))
        _compare(checks, f"float32 {router}, dense", 3e-6, ours, dense)
    check_ring(checks)
    check_remat(checks)
    checks.end()


def check_ring(checks: comparing.Checks) -> None:
    """The same against the ring, with a buffer of which it needs less; it has bfloat16 alone."""
    ring = Program(OWN, dtype="bfloat16", **RING, ragged_buffer_factor=3.9).run()
    ours = Program(OURS, dtype="bfloat16").run()
    _compare(checks, "bfloat16 expert=8, ring", 3e-2, ours, ring)


def _compare(checks: comparing.Checks, what: str, bound: float, got: Any, want: Any) -> None:
    (params, x), (y, balance) = got
    (want_params, want_x), (want_y, want_balance) = want
    checks.near(
        what,
        bound,
        out=comparing.error(y, want_y),
        dx=comparing.error(x, want_x),
        dweights=comparing.error(params, want_params),
        balance=comparing.error(balance, want_balance),
    )


def check_remat(checks: comparing.Checks) -> None:
    """Policies of `jax.checkpoint` give the same gradients; one saves the dispatch."""
    want = Program(OURS).run()
    names = ("moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo")
    named = jax.checkpoint_policies.save_only_these_names
    for what, policy, dispatches in (
        ("full", jax.checkpoint_policies.nothing_saveable, 2),
        ("MaxText's names", named(*names), 2),
        ("MaxText's names and ours", named(*names, smf.DISPATCHED), 1),
    ):
        program = Program(OURS, policy)
        _compare(checks, f"remat, {what}", 3e-6, program.run(), want)
        counts = smf.inspect(program.compile()).counts
        checks.equal(f"remat, {what}: dispatches", counts["dispatch_send"], dispatches)


def time() -> None:
    """Forward, and with gradients; 8 ranks, 256 tokens of each, 32 experts, top-4, bfloat16."""
    sizes = {
        "dtype": "bfloat16",
        "base_emb_dim": 256,
        "base_mlp_dim": 256,
        "base_moe_mlp_dim": 256,
        "num_experts": 32,
        "max_target_length": 256,
        "load_balance_loss_weight": 0.0,
        "ragged_buffer_factor": 1.25,
    }
    programs = {}
    for name, program in {
        "ring": Program(OWN, **sizes, **RING),
        "jax_sm_free": Program(OURS, **sizes),
    }.items():
        programs[f"{name}, forward"] = functools.partial(program.run, gradients=False)
        programs[f"{name}, with gradients"] = program.run
    comparing.take_times(programs)


def train() -> None:
    """Four steps of MaxText's own trainer, and four with a pipeline; prints their logs."""
    from absl import logging
    from maxtext.trainers.pre_train import train as trainer

    logging.set_verbosity(logging.INFO)
    options = SIZES | {
        "base_output_directory": tempfile.mkdtemp(),
        "dataset_type": "synthetic",
        "steps": 4,
        "scan_layers": True,
        "per_device_batch_size": 2,
        "load_balance_loss_weight": 0.0,
        "learning_rate": 1e-2,
        "enable_goodput_recording": False,
        "monitor_goodput": False,
        "sharding_tolerance": 1.0,
    }
    # Stages are mapped: each has its layers under jax.vmap(spmd_axis_name="stage").
    pipeline = {
        "ici_pipeline_parallelism": 2,
        "ici_expert_parallelism": 4,
        "base_num_decoder_layers": 4,
        "num_layers_per_pipeline_stage": 2,
        "num_pipeline_microbatches": 4,
    }
    moe.RoutedMoE.sparse_matmul = OURS
    for shape, layout in {"experts alone": {}, "a pipeline": pipeline}.items():
        for name, more in {"jax_sm_free": {}, "MaxText's dense path": DENSE}.items():
            print(f"-- {shape}, {name}", flush=True)
            told = [f"{key}={value}" for key, value in (options | layout | more).items()]
            trainer.main(["train", BASE, *told])


if __name__ == "__main__":
    comparing.main(check=check, time=time, train=train)
