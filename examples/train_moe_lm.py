"""Trains a byte-level mixture-of-experts language model on eight CPU devices.

The experts are spread over the devices, which also share the batch. At the end one step is done
again with `jax_sm_free.reference` in place of `jax_sm_free`: loss and gradients must agree. The
exit status is not zero if they do not, or if the loss missed its target.

    python examples/train_moe_lm.py              # one tier: each device sends to each other one
    python examples/train_moe_lm.py --nodes=2    # two tiers: two nodes of four devices

Several processes train together if the environment says so (docs/multihost.md).
"""

from __future__ import annotations

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
import optax
import tqdm
from absl import app, flags, logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from moe_lm import data, plot
from moe_lm import step as step_lib
from moe_lm.model import AXES, ModelConfig, MoeLm, make_backend

import jax_sm_free as smf
from jax_sm_free import reference

_NODES = flags.DEFINE_integer("nodes", 1, "Nodes that share the devices evenly.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Sequences in a batch, over all devices.")
_LENGTH = flags.DEFINE_integer("length", 128, "Bytes in a sequence.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Transformer blocks.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden", 128, "Width of the model.")
_EXPERTS = flags.DEFINE_integer("experts", 16, "Experts of a layer, over all devices.")
_TOP_K = flags.DEFINE_integer("top_k", 2, "Experts of a token.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 5e-3, "Highest learning rate.")
_REMAT = flags.DEFINE_boolean("remat", True, "Compute each block again in the backward pass.")
_TARGET = flags.DEFINE_float("target", 0.6, "Final loss over unigram entropy, at most.")
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters and batches.")
_OUT = flags.DEFINE_string("out", "out", "Directory of the picture.")
_CLUSTER = flags.DEFINE_boolean("cluster", False, "Processes of Slurm, Open MPI or Kubernetes.")

# Backward passes sum in different orders; float32 has 24 bits, and gradients are sums of thousands.
_ROUNDING = 1e-4
_AVERAGED_STEPS = 10


def _join_processes() -> None:
    """Meets the other processes, if the environment or a cluster tells of them."""
    if _CLUSTER.value:
        jax.distributed.initialize()
    elif "JAX_NUM_PROCESSES" in os.environ:
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        place = (int(os.environ[name]) for name in names)
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], *place)


def _make_mesh() -> Mesh:
    """All devices, by node. JAX lists the devices of a process, and so of a host, one by one."""
    devices = np.array(jax.devices())
    if devices.size % _NODES.value:
        raise app.UsageError(f"--nodes={_NODES.value} does not divide {devices.size} devices")
    return Mesh(devices.reshape(_NODES.value, -1), AXES)


def _model_config() -> ModelConfig:
    return ModelConfig(
        vocabulary=data.VOCABULARY,
        layers=_LAYERS.value,
        hidden=_HIDDEN.value,
        experts=_EXPERTS.value,
        top_k=_TOP_K.value,
        remat=_REMAT.value,
    )


def _optimizer() -> optax.GradientTransformation:
    steps = _STEPS.value
    rate = optax.warmup_cosine_decay_schedule(
        0.0, _LEARNING_RATE.value, min(20, steps // 2), steps, 0.1 * _LEARNING_RATE.value
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01)
    )


def _make_loss(ops, mesh: Mesh):
    """The model on one implementation of the ops: (parameters, loss function)."""
    config = _model_config()
    max_tokens = _BATCH.value // mesh.size * _LENGTH.value
    backend = make_backend(ops, mesh, config, max_tokens)
    graphdef, params = nnx.split(MoeLm(config, backend, nnx.Rngs(_SEED.value)))
    return step_lib.place(params, mesh), step_lib.make_loss(graphdef, params, mesh)


def _train(params, loss, batches):
    """Returns the parameters, and metrics with a first axis of steps."""
    optimizer = _optimizer()
    state = jax.jit(optimizer.init)(params)
    step = step_lib.make_step(loss, optimizer)
    history = []
    quiet = jax.process_index() > 0
    with tqdm.trange(_STEPS.value, desc="training", unit="step", disable=quiet) as progress:
        for _ in progress:
            params, state, metrics = step(params, state, next(batches))
            history.append(multihost_utils.process_allgather(metrics, tiled=True))
            progress.set_postfix(bits=f"{history[-1].bits:.3f}", refresh=False)
    return params, jax.tree.map(lambda *steps: np.stack(steps), *history)


def _report(history: step_lib.Metrics, entropy: float) -> bool:
    """Prints how the training went; whether the loss reached its target."""
    first = jax.tree.map(lambda steps: steps[:_AVERAGED_STEPS].mean(0), history)
    last = jax.tree.map(lambda steps: steps[-_AVERAGED_STEPS:].mean(0), history)
    reached = last.bits <= _TARGET.value * entropy
    print(
        f"loss {last.bits:.3f} bits per byte (first step {history.bits[0]:.3f}), entropy of single "
        f"bytes {entropy:.3f}: {last.bits / entropy:.0%}, target {_TARGET.value:.0%}: "
        f"{'reached' if reached else 'MISSED'}\n"
        f"expert rows over recv_capacity, dropped: {first.dropped / first.counts.sum():.1%} in the "
        f"first {_AVERAGED_STEPS} steps, {last.dropped / last.counts.sum():.1%} in the last"
    )
    return bool(reached)


def _compare(params, batch, losses) -> bool:
    """Prints how far loss and gradients of one step differ; whether that is only rounding."""
    (got, got_grads), (want, want_grads) = (
        jax.jit(jax.value_and_grad(lambda p, b, f=f: f(p, b)[0]))(params, batch) for f in losses
    )
    loss = step_lib.largest_difference(got, want)
    grads = step_lib.largest_difference(got_grads, want_grads)
    agree = max(loss, grads) <= _ROUNDING
    print(
        f"against jax_sm_free.reference, same parameters and batch: loss {float(got):.6f} and "
        f"{float(want):.6f}, largest relative difference {loss:.1e}; gradients {grads:.1e}: "
        f"{'the same but for rounding' if agree else 'DIFFERENT'}"
    )
    return agree


def main(argv) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    _join_processes()
    mesh = _make_mesh()
    if _BATCH.value % mesh.size:
        raise app.UsageError(f"--batch={_BATCH.value} is not divisible by {mesh.size} devices")
    text = data.load_bytes()
    entropy = data.unigram_entropy(text)
    nodes, devices = mesh.devices.shape
    print(f"{text.size / 1e6:.1f} MB of Python source, {nodes} node(s) of {devices} devices")
    batches = data.batches(text, _BATCH.value, _LENGTH.value, _SEED.value)
    params, loss = _make_loss(smf, mesh)
    params, history = _train(params, loss, batches)
    reached = _report(history, entropy)
    if jax.process_index() == 0:
        picture = pathlib.Path(_OUT.value) / "train_moe_lm.png"
        plot.save(picture, history.bits, history.counts, entropy)
        print(f"picture: {picture}")
    _, reference_loss = _make_loss(reference, mesh)
    agree = _compare(params, next(batches), (loss, reference_loss))
    return 0 if reached and agree else 1


if __name__ == "__main__":
    app.run(main)
