"""Modules of flax.nnx, flax.linen and Equinox over jax_sm_free: check.

Needs requirements/integrations/modules.txt.
"""

import copy
import functools
import inspect
import pickle
from typing import Any

import comparing  # first: it chooses the devices
import equinox as eqx
import equinox_module
import jax
import jax.numpy as jnp
import linen_module
import nano_moe_port
import nnx_module
import optax
from flax import linen, nnx
from jax import Array, P
from jax.sharding import AxisType, Mesh, NamedSharding
from moe_layer import MoeConfig
from nano_moe.config import NanoMoEConfig
from nano_moe.layers import MoELayer

import jax_sm_free as smf

CONFIG = MoeConfig(hidden=32, width=48, num_experts=16, top_k=2, capacity_factor=8.0)


def dense(x: Array, weights: dict[str, Array]) -> Array:
    """All experts on all tokens, without a mesh."""
    chances = jax.nn.softmax(x @ weights["router"])
    best, _ = jax.lax.top_k(chances, CONFIG.top_k)
    chosen = jnp.where(chances >= best[..., -1:], chances, 0)
    h = jnp.einsum("bth,ehw->btew", x, weights["gate"])
    h = jax.nn.silu(h) * jnp.einsum("bth,ehw->btew", x, weights["up"])
    y = jnp.einsum("btew,ewh->bteh", h, weights["down"])
    return jnp.einsum("bteh,bte->bth", y, chosen / chosen.sum(-1, keepdims=True))


def loss_of(y: Array) -> Array:
    """Something that has a gradient."""
    return (y**2).mean()


def inputs(axis_type: AxisType) -> tuple[Mesh, Array]:
    """A mesh of eight ranks and x [8, 16, hidden] on it."""
    mesh = jax.make_mesh((8,), (CONFIG.axis,), axis_types=(axis_type,))
    x = jax.random.normal(jax.random.key(1), (8, 16, CONFIG.hidden))
    return mesh, jax.device_put(x, NamedSharding(mesh, P(CONFIG.axis)))


def check() -> None:
    """The three modules agree with the dense layer; what users do with modules works."""
    checks = comparing.Checks()
    mesh, x = inputs(AxisType.Explicit)
    with jax.set_mesh(mesh):
        check_nnx(checks, x)
        check_holding(checks, x)
        check_equinox(checks, x)
    mesh, x = inputs(AxisType.Auto)  # `linen.with_partitioning` takes no explicit axes
    with jax.set_mesh(mesh):
        check_linen(checks, x)
    check_nano_moe(checks)
    checks.end()


def compare(
    checks: comparing.Checks, what: str, x: Array, weights: Any, y: Any, grads: Any
) -> None:
    """A result and its gradients against those of the dense layer."""
    x, weights, y, grads = jax.device_get((x, weights, y, grads))
    with jax.set_mesh(jax.make_mesh((1,), ("one",))):
        want, slope = jax.value_and_grad(lambda w: loss_of(dense(jnp.asarray(x), w)))(weights)
        want_y = dense(jnp.asarray(x), weights)
    checks.near(
        what,
        1e-5,
        out=comparing.error(y, want_y),
        loss=comparing.error(loss_of(y), want),
        **{f"d{name}": comparing.error(grads[name], slope[name]) for name in slope},
    )


def check_nnx(checks: comparing.Checks, x: Array) -> None:
    """nnx.jit, value_and_grad, an optimizer's step, split and merge."""
    module = nnx_module.Moe(CONFIG, rngs=nnx.Rngs(0))
    y = nnx.jit(lambda module, x: module(x))(module, x)
    loss, grads = nnx.jit(nnx.value_and_grad(lambda m: loss_of(m(x))))(module)
    weights = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    compare(checks, "flax.nnx", x, weights, y, nnx.to_pure_dict(grads))
    checks.equal("flax.nnx, dropped", int(module.dropped[...]), 0)
    checks.equal(
        "flax.nnx, an expert's weights are on its rank",
        module.up[...].sharding.spec[0],
        CONFIG.axis,
    )

    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module: nnx_module.Moe, optimizer: nnx.Optimizer) -> Array:
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(x)))(module)
        optimizer.update(module, grads)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(5)]
    checks.near("flax.nnx, first loss", 1e-6, loss=abs(losses[0] - float(loss)))
    checks.equal(
        "flax.nnx, losses of five steps fall", losses == sorted(losses, reverse=True), True
    )

    graph, state = nnx.split(module)
    again = nnx.merge(graph, state)(x)
    checks.near("flax.nnx, split and merge", 0.0, out=comparing.error(again, module(x)))


class Holding(nnx.Module):
    """A module that keeps its buffer, instead of asking for it in each call."""

    def __init__(self) -> None:
        sizes = {"hidden": CONFIG.hidden, "num_experts": 16, "top_k": 2, "max_tokens": 16}
        self.buffer = smf.buffer_for(CONFIG.axis, **sizes, capacity_factor=8.0, dtype=jnp.float32)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: Array) -> Array:
        """Each token to two experts, which square it."""
        rows = x.reshape(-1, CONFIG.hidden)

        def on_rank(rows: Array, scale: Array) -> Array:
            weights, topk_idx = jax.lax.top_k(jax.nn.softmax(rows[:, :16]), 2)
            return smf.moe(rows, topk_idx, scale * weights, lambda r: r.x**2, self.buffer)

        spec = P(CONFIG.axis)
        mapped = jax.shard_map(on_rank, in_specs=(spec, P()), out_specs=spec)
        return mapped(rows, self.scale[...]).reshape(x.shape)


def check_holding(checks: comparing.Checks, x: Array) -> None:
    """A module with a buffer is copied and pickled; the copy uses the same buffer."""
    module = Holding()
    want = nnx.jit(lambda module, x: module(x))(module, x)
    for what, other in {
        "deepcopy": copy.deepcopy(module),
        "nnx.clone": nnx.clone(module),
        "pickle": pickle.loads(pickle.dumps(module)),
    }.items():
        checks.equal(f"flax.nnx, {what} keeps the buffer", other.buffer is module.buffer, True)
        got = nnx.jit(lambda module, x: module(x))(other, x)
        checks.near(f"flax.nnx, {what}", 0.0, out=comparing.error(got, want))


def check_linen(checks: comparing.Checks, x: Array) -> None:
    """init, apply and gradients of flax.linen."""
    module = linen_module.Moe(CONFIG)
    variables = linen.unbox(jax.jit(module.init)(jax.random.key(0), x))
    weights = variables["params"]
    y, sown = jax.jit(lambda w: module.apply({"params": w}, x, mutable="intermediates"))(weights)
    grads = jax.jit(jax.grad(lambda w: loss_of(module.apply({"params": w}, x))))(weights)
    compare(checks, "flax.linen", x, weights, y, grads)
    checks.equal("flax.linen, dropped", int(sown["intermediates"]["dropped"][0]), 0)


def check_equinox(checks: comparing.Checks, x: Array) -> None:
    """filter_jit and filter_grad of Equinox."""
    module = equinox_module.Moe(CONFIG, key=jax.random.key(0))
    y, dropped = eqx.filter_jit(module)(x)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: loss_of(m(x)[0])))(module)
    compare(checks, "Equinox", x, module.weights, y, grads.weights)
    checks.equal("Equinox, dropped", int(dropped), 0)


def check_nano_moe(checks: comparing.Checks) -> None:
    """The port of nano-moe-jax gives what its own layer gives, on four ranks."""
    config = NanoMoEConfig(dropout_rate=0.0)
    x = jax.random.normal(jax.random.key(1), (8, 16, config.d_model))
    own = MoELayer(config)
    params = own.init(jax.random.key(0), x)["params"]
    experts = [params[f"expert_{i}"] for i in range(config.n_experts)]
    ported = {"Router_0": params["Router_0"]}
    for i in (1, 2):
        dense = [expert[f"Dense_{i - 1}"] for expert in experts]
        ported[f"w{i}"] = jnp.stack([one["kernel"] for one in dense])
        ported[f"b{i}"] = jnp.stack([one["bias"] for one in dense])

    def loss(layer: linen.Module, params: Any, x: Array) -> Any:
        y, balance = layer.apply({"params": params}, x)
        return loss_of(y) + balance, y

    def run(layer: linen.Module, params: Any) -> Any:
        program = jax.value_and_grad(functools.partial(loss, layer), (0, 1), has_aux=True)
        return jax.device_get(jax.jit(program)(params, x))

    (want_loss, want), (_, want_dx) = run(own, params)
    mesh = jax.make_mesh((4,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        (got_loss, got), (_, got_dx) = run(nano_moe_port.MoELayer(config), ported)
    checks.near(
        "nano-moe-jax",
        1e-5,
        out=comparing.error(got, want),
        loss=comparing.error(got_loss, want_loss),
        dx=comparing.error(got_dx, want_dx),
    )
    source = inspect.getsource(nano_moe_port.MoELayer)
    ours = source.split("# --- the port\n")[1].split("# --- from here")[0]
    lines = sum(1 for line in ours.splitlines() if line.strip())
    checks.equal("nano-moe-jax, lines of the port, at most 15", lines <= 15, True)


if __name__ == "__main__":
    comparing.main(check=check)
