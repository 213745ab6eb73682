"""Meshes of several axes: which of them shard_map has to be manual in, and what may be split."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import support
from sample_inputs import make_inputs
from support import P, make_config
from trained_layers import loss_of, overlapped_layer

import jax_sm_free as smf
from jax_sm_free import reference

pytestmark = pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")

EP_SIZE = 2
CONFIG = make_config(EP_SIZE)
NUM_COLUMNS = CONFIG.hidden


def mesh_of(**axes):
    shape = tuple(axes.values())
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), tuple(axes))


def flat_inputs(config=CONFIG):
    """x, topk_idx, weights with the ranks' rows one behind the other."""
    return tuple(a.reshape(-1, a.shape[-1]) for a in make_inputs(config, seed=1))


def gradients_of(buffer, module, mesh, wrap=lambda f: f, **kwargs):
    layer = wrap(functools.partial(overlapped_layer, support.Api(buffer, module)))
    specs = {"in_specs": (*3 * [P("ep")], P()), "out_specs": P("ep")}
    mapped = jax.shard_map(layer, mesh=mesh, **specs, **kwargs)

    def loss(x, weights, matrix, topk_idx):
        return loss_of(mapped(x, topk_idx, weights, matrix))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def check_gradients(mesh, **kwargs):
    """Against the reference, on a mesh of the expert axis alone."""
    x, topk_idx, weights = flat_inputs()
    matrix = np.random.default_rng(2).normal(size=2 * [NUM_COLUMNS]).astype(np.float32)
    args = x, weights, matrix, topk_idx
    alone = mesh_of(ep=EP_SIZE)
    other = support.open_buffer(CONFIG, alone, module=reference)
    with support.open_buffer(CONFIG, mesh) as buffer:
        got = jax.device_get(gradients_of(buffer, smf, mesh, **kwargs)(*args))
        buffer.check()
    support.assert_close(got, gradients_of(other, reference, alone)(*args), 1e-4)


@pytest.mark.parametrize("check_vma", [False, True])
def test_axes_of_one_device_may_be_left_out(check_vma):
    mesh = mesh_of(dp=1, ep=EP_SIZE, tp=1)
    check_gradients(mesh, axis_names={"ep"}, check_vma=check_vma)


def test_a_mesh_of_one_device():
    config = make_config(1, num_experts=4)
    mesh = mesh_of(ep=1, tp=1)
    inputs = flat_inputs(config)

    def rows(buffer):
        per_rank = lambda *args: buffer.dispatch(*args).x  # noqa: E731
        mapped = jax.shard_map(
            per_rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), axis_names={"ep"}
        )
        return jax.device_get(jax.jit(mapped)(*inputs))

    other = support.open_buffer(config, mesh, module=reference)
    with support.open_buffer(config, mesh) as buffer:
        support.assert_same_bits(rows(buffer), rows(other))


def test_larger_axes_that_are_left_out_are_named():
    mesh = mesh_of(dp=1, ep=EP_SIZE, tp=2)
    with (
        support.open_buffer(CONFIG, mesh) as buffer,
        pytest.raises(
            ValueError,
            match=r"^dispatch_send: expected shard_map to be manual in every axis of the mesh .*"
            r"leaves out 'tp', .*jax.shard_map\(f, axis_names={'tp'}, ",
        ),
    ):
        gradients_of(buffer, smf, mesh, axis_names={"ep"})(
            *(flat_inputs()[number] for number in (0, 2)), np.eye(NUM_COLUMNS), flat_inputs()[1]
        )


@pytest.mark.skipif(
    jax.__version__.startswith("0.9."), reason="JAX 0.9 compiles no axis_index in such a shard_map"
)
def test_a_shard_map_of_its_own_over_the_other_axes():
    """What the error says: each rank along the other axis exchanges the same rows."""

    def over_tp(layer):
        return jax.shard_map(layer, axis_names={"tp"}, in_specs=P(), out_specs=P(), check_vma=False)

    mesh = mesh_of(ep=EP_SIZE, tp=2)
    check_gradients(mesh, axis_names={"ep"}, wrap=over_tp, check_vma=False)


# ------------------------------------------------------------------------- layouts of other buffers

WIDE = make_config(hidden=10, num_slots=3, dtype=jnp.bfloat16)
NARROW = make_config(hidden=3)


def routed_by_another(wide, narrow, output, x, topk_idx, weights, y):
    """Rows that are dispatched wide, and combined narrow."""

    def out(x, weights, y):
        recv = wide.dispatch(x, topk_idx, weights, output=output)
        rows = recv.x[:, : NARROW.hidden].astype(jnp.float32)
        by_row = recv.weights if output == "experts" else recv.topk_weights.sum(1)
        return narrow.combine(rows * y, recv.layout, weights=by_row)

    result, pullback = jax.vjp(out, x, weights, y)
    return result, pullback(result)


@pytest.mark.parametrize("output", ["experts", "tokens"])
def test_a_layout_is_good_for_buffers_of_equal_routing(output):
    x, topk_idx, weights = make_inputs(WIDE)
    rows = NARROW.recv_capacity if output == "experts" else NARROW.max_recv_tokens
    y = sample_inputs.make_rows(NARROW, rows, seed=3)
    buffers = zip(support.apis(WIDE), support.apis(NARROW), strict=True)
    got, want = (
        support.on_ranks(
            functools.partial(routed_by_another, wide.buffer, narrow.buffer, output),
            support.mesh_of(WIDE.ep_size),
        )(x, topk_idx, weights, y)
        for wide, narrow in buffers
    )
    support.assert_same_bits(got[0], want[0])
    support.assert_close(got[1], want[1], 0.02)  # gradients of bfloat16
