"""jax.vmap around a shard_map: the stages of a pipeline, bit for bit as in a loop over them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P, make_config
from trained_layers import loss_of, overlapped_layer
from vmap_places import in_a_loop, inputs_of, overlapped

import jax_sm_free as smf


def on_ep(fn, mesh, check_vma):
    """Over the axis of ranks alone: the same on all ranks along the other axis."""
    specs = {"in_specs": P("ep"), "out_specs": P("ep")}
    return jax.shard_map(fn, mesh=mesh, check_vma=check_vma, **specs)


def stacked(results):
    return jax.tree.map(lambda leaf: leaf[None], results)


def stages_of(num_stages=2):
    """A mesh of stages and ranks, and a configuration for its ranks."""
    devices = np.array(jax.devices()[: support.MAX_RANKS]).reshape(num_stages, -1)
    config = make_config(devices.shape[1], num_experts=support.MAX_RANKS)
    return jax.sharding.Mesh(devices, ("stage", "ep")), config


with_types = pytest.mark.skipif(
    jax.__version__.startswith("0.9."), reason="JAX 0.9 refuses any product there"
)


@pytest.mark.parametrize(
    ("spmd_axis_name", "check_vma"),
    [pytest.param("stage", True, marks=with_types), ("stage", False), (None, True)],
)
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
def test_around_a_shard_map(spmd_axis_name, check_vma):
    """Stages of a pipeline: of two, each rank has one with spmd_axis_name, and both without."""
    mesh, config = stages_of()
    x, topk_idx, weights, y = (np.moveaxis(a, 1, 0) for a in inputs_of(config, 2))

    def gradients(over, api, x, topk_idx, weights, y):
        layer = functools.partial(overlapped, api)
        mapped = on_ep(lambda *args: stacked(layer(*(a[0] for a in args))), mesh, check_vma)
        stages = over(mapped, 0, 0)
        out, pullback = jax.vjp(lambda x, w, y: stages(x, topk_idx, w, y), x, weights, y)
        return out, pullback(out)

    vmap = functools.partial(jax.vmap, spmd_axis_name=spmd_axis_name)
    with support.open_buffer(config, mesh) as buffer:
        api = support.Api(buffer, smf)
        got, want = (
            support.whole(jax.jit(functools.partial(gradients, over, api))(x, topk_idx, weights, y))
            for over in (vmap, in_a_loop)
        )
        jax.block_until_ready(got)
        jax.block_until_ready(want)
        buffer.check()
    # Equal values: the gradient of the loop adds zeros, which turns -0.0 into 0.0.
    jax.tree.map(np.testing.assert_array_equal, got, want)


@with_types
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
def test_around_a_shard_map_of_what_is_the_same_at_all_places():
    """Rows and experts are; the gradient to the experts is the sum over the stages."""
    mesh, config = stages_of()
    x, topk_idx, weights, _ = (np.moveaxis(a, 1, 0) for a in inputs_of(config, 2))
    matrix = np.random.default_rng(2).normal(size=(mesh.shape["ep"], 7, 7)).astype(np.float32)

    def gradients(over, api, weights, matrix):
        layer = functools.partial(overlapped_layer, api)
        mapped = on_ep(lambda *args: stacked(layer(*(a[0] for a in args))), mesh, check_vma=True)
        stages = over(mapped, (None, None, 0, None), 0)
        loss = lambda *args: loss_of(stages(x[0], topk_idx[0], *args))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(weights, matrix)

    vmap = functools.partial(jax.vmap, spmd_axis_name="stage")
    with support.open_buffer(config, mesh) as buffer:
        api = support.Api(buffer, smf)
        got, want = (
            support.whole(jax.jit(functools.partial(gradients, over, api))(weights, matrix))
            for over in (vmap, in_a_loop)
        )
        support.assert_close(got, want, 1e-4)
        buffer.check()


@with_types
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
@pytest.mark.filterwarnings("ignore:grouped_matmul:UserWarning")
def test_around_a_shard_map_with_grouped_products():
    """Stages with experts of their own: group_sizes go through the products' rule for gradients."""
    mesh, config = stages_of()
    x, topk_idx, weights, _ = (np.moveaxis(a, 1, 0) for a in inputs_of(config, 2))
    shape = (2, config.num_experts, config.hidden, config.hidden)
    matrices = np.random.default_rng(2).normal(size=shape).astype(np.float32)

    def gradients(over, buffer, x, weights, matrices):
        def layer(x, topk_idx, weights, matrices):
            def experts(recv):
                return jnp.sin(smf.grouped_matmul(recv.x, matrices, recv))

            return smf.moe(x[0], topk_idx[0], weights[0], experts, buffer)[None]

        stages = over(on_ep(layer, mesh, check_vma=True), 0, 0)
        loss = lambda x, *rest: loss_of(stages(x, topk_idx, *rest))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 2))(x, weights, matrices)

    vmap = functools.partial(jax.vmap, spmd_axis_name="stage")
    with support.open_buffer(config, mesh) as buffer:
        got, want = (
            support.whole(jax.jit(functools.partial(gradients, over, buffer))(x, weights, matrices))
            for over in (vmap, in_a_loop)
        )
        support.assert_close(got, want, 1e-4)
        buffer.check()
