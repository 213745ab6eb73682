"""A send in one shard_map and its recv in another, with ordinary sharded code between the two.

The same layer in a single shard_map is what each result is compared with, bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.sharding import AxisType, Mesh, NamedSharding
from support import P

import jax_sm_free as smf
from jax_sm_free import reference

T, H, K = 6, 8, 2
MESHES = {
    "one_axis": ((support.SOME_RANKS,), ("ep",)),
    "two_groups": ((2, support.MAX_RANKS // 2), ("dp", "ep")),
    "expert_axis_first": ((support.MAX_RANKS // 2, 2), ("ep", "tp")),
}
some_meshes = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(np.prod(shape) > support.MAX_RANKS, reason="ranks")
        )
        for name, (shape, _) in MESHES.items()
    ],
)


def make_mesh(name: str, explicit: bool = False) -> Mesh:
    shape, names = MESHES[name]
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def open_buffer(mesh: Mesh, module: Any = smf, **sizes: Any) -> Any:
    defaults = {
        "hidden": H,
        "num_experts": 2 * mesh.shape["ep"],
        "top_k": K,
        "max_tokens": T,
        "num_slots": 4,
        "dtype": jnp.float32,
        "timeout_s": 60.0,
    }
    return module.Buffer(mesh, "ep", **(defaults | sizes))


# Parts of a layer with shared experts. The router and the shared experts get x as arguments of
# their own, `seen` and `beside`: a gradient that is a sum could be added up in another order.


def quantised(x: Any) -> Any:
    x = jax.lax.stop_gradient(x)
    scales = jnp.abs(x).max(1, keepdims=True)
    return (x / scales).astype(jnp.float8_e4m3fn), scales


def send(buffer: Any, x: Any, seen: Any, router: Any, *, pairs: bool = False) -> Any:
    weights, topk_idx = jax.lax.top_k(jax.nn.softmax(seen @ router), K)
    return buffer.dispatch_send(quantised(x) if pairs else x, topk_idx, weights)


def turn_round(buffer: Any, sent: Any, scale: Any, *, weighted: bool = True) -> Any:
    """Receives a dispatch, runs experts and sends their combine."""
    recv = buffer.dispatch_recv(sent)
    x = recv.x[0].astype(jnp.float32) * recv.x[1] if isinstance(recv.x, tuple) else recv.x
    y = jnp.sin(x) * scale[0]
    if not weighted:
        y *= recv.weights[:, None]
    return buffer.combine_send(y, recv.layout, recv.weights if weighted else None)


def shared(x: Any) -> Any:
    return jnp.tanh(x)


def together(module: Any, buffer: Any, parts: Any, mapped: Any) -> Any:
    """The layer in one shard_map."""

    def layer(x: Any, seen: Any, beside: Any, router: Any, scale: Any) -> Any:
        sent = parts[0](buffer, x, seen, router)
        first, sent = module.overlap(sent, shared, beside)
        sent = parts[1](buffer, sent, scale)
        second, sent = module.overlap(sent, shared, first)
        return second + buffer.combine_recv(sent)

    rows = buffer.sent_specs
    return mapped(layer, in_specs=(rows, rows, rows, P(), P("ep")), out_specs=rows)


def apart(module: Any, buffer: Any, parts: Any, mapped: Any) -> Any:
    """The layer in three, and the shared experts outside of all."""
    rows = buffer.sent_specs
    begin = mapped(
        functools.partial(parts[0], buffer),
        in_specs=(rows, rows, P()),
        out_specs=buffer.sent_specs,
    )
    middle = mapped(
        functools.partial(parts[1], buffer),
        in_specs=(buffer.sent_specs, P("ep")),
        out_specs=buffer.sent_specs,
    )
    end = mapped(buffer.combine_recv, in_specs=buffer.sent_specs, out_specs=rows)

    def layer(x: Any, seen: Any, beside: Any, router: Any, scale: Any) -> Any:
        sent = begin(x, seen, router)
        first, sent = module.overlap(sent, shared, beside)
        sent = middle(sent, scale)
        second, sent = module.overlap(sent, shared, first)
        return second + end(sent)

    return layer


def arguments(mesh: Mesh, buffer: Any) -> tuple[Any, ...]:
    rng = np.random.default_rng(5)
    shapes = ((mesh.size * T, H), (H, buffer.config.num_experts), (mesh.shape["ep"], H))
    specs = (P(mesh.axis_names), P(), P("ep"))
    x, *weights = (
        jax.device_put(rng.normal(size=shape).astype(np.float32), NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    )
    return x, x, x, *weights


def check_alike(
    mesh: Mesh,
    buffer: Any,
    parts: Any = (send, turn_round),
    module: Any = smf,
    **kwargs: Any,
) -> None:
    """Values and gradients of the layer apart are those of the layer together."""
    mapped = functools.partial(jax.shard_map, mesh=mesh, **kwargs)
    args = arguments(mesh, buffer)

    def run(make: Any) -> Any:
        layer = make(module, buffer, parts, mapped)
        loss = lambda *args: (lambda out: (jnp.square(out).mean(), out))(layer(*args))  # noqa: E731
        step = jax.jit(jax.value_and_grad(loss, range(len(args)), has_aux=True))
        with jax.set_mesh(mesh):
            return jax.block_until_ready(step(*args))

    (_, out), grads = got = run(apart)
    support.assert_same_bits(got, run(together))
    # Rows of pairs have no gradient, all else has one.
    assert all(np.asarray(leaf).any() for leaf in (out, *grads[1:]))


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("check_vma", [True, False])
@some_meshes
@pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two groups")
def test_a_layer_in_three_shard_maps(name: str, check_vma: bool, explicit: bool) -> None:
    mesh = make_mesh(name, explicit)
    with open_buffer(mesh) as buffer:
        check_alike(mesh, buffer, check_vma=check_vma)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({}, (functools.partial(send, pairs=True), turn_round)),
        ({"wire_dtype": jnp.float8_e4m3fn}, (send, turn_round)),
        ({}, (send, functools.partial(turn_round, weighted=False))),
        ({"recv_capacity": 9}, (send, turn_round)),
        ({"expert_capacity": 5}, (send, turn_round)),
    ],
    ids=["pairs", "float8_wire", "plain_sum", "cut", "groups_of_one_size"],
)
def test_all_that_is_sent_may_cross(sizes: Any, parts: Any, check_vma: bool) -> None:
    mesh = make_mesh("one_axis")
    with open_buffer(mesh, **sizes) as buffer:
        check_alike(mesh, buffer, parts, check_vma=check_vma)


@pytest.mark.parametrize("spec", [P("dp"), P(None, "ep")], ids=["fsdp", "tensor_parallel"])
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs two groups of two ranks")
def test_shared_experts_with_sharded_weights(spec: P) -> None:
    """XLA adds the collectives of ordinary sharded code between the send and the recv."""
    mesh = make_mesh("two_groups")
    sharded = NamedSharding(mesh, spec)
    matrix = np.random.default_rng(6).normal(size=(H, H)).astype(np.float32)
    with open_buffer(mesh) as buffer:
        mapped = functools.partial(jax.shard_map, mesh=mesh)
        x, _, _, router, scale = arguments(mesh, buffer)

        def layer(matrix: Any, x: Any) -> Any:
            rows, specs = buffer.sent_specs, buffer.sent_specs
            begin = mapped(
                functools.partial(send, buffer), in_specs=(rows, rows, P()), out_specs=specs
            )
            sent = begin(x, x, router)
            beside, sent = smf.overlap(sent, lambda x, w: jnp.tanh(x @ w), x, matrix)
            end = mapped(
                lambda sent, scale: buffer.combine_recv(turn_round(buffer, sent, scale)),
                in_specs=(specs, P("ep")),
                out_specs=rows,
            )
            return beside * end(sent, scale)

        step = jax.jit(jax.value_and_grad(lambda w, x: jnp.square(layer(w, x)).sum(), (0, 1)))
        got = step(jax.device_put(matrix, sharded), x)
        support.assert_close(jax.device_get(got), jax.device_get(step(matrix, x)))


def test_a_program_runs_on_the_reference() -> None:
    mesh = make_mesh("one_axis")
    check_alike(mesh, open_buffer(mesh, reference), module=reference)


def test_a_layout_may_cross_and_rows_too() -> None:
    """The experts outside of any shard_map."""
    mesh = make_mesh("one_axis")
    with open_buffer(mesh) as buffer:
        rows = buffer.sent_specs
        mapped = functools.partial(jax.shard_map, mesh=mesh)

        def begin(x: Any, router: Any) -> Any:
            recv = buffer.dispatch_recv(send(buffer, x, x, router))
            return recv.x, recv.weights, recv.layout, recv.dropped[None]

        def end(y: Any, weights: Any, layout: Any) -> Any:
            return buffer.combine(y, layout, weights=weights)

        def layer(x: Any, router: Any) -> Any:
            recv_x, weights, layout, dropped = mapped(begin, in_specs=(rows, P()), out_specs=rows)(
                x, router
            )
            out = mapped(end, in_specs=rows, out_specs=rows)(jnp.sin(recv_x), weights, layout)
            return out, dropped

        def at_once(x: Any, router: Any) -> Any:
            recv_x, weights, layout, dropped = begin(x, router)
            return end(jnp.sin(recv_x), weights, layout), dropped

        args = arguments(mesh, buffer)[2:4]
        want = jax.jit(mapped(at_once, in_specs=(rows, P()), out_specs=rows))(*args)
        support.assert_same_bits(jax.jit(layer)(*args), want)
