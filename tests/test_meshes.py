"""Meshes of several axes, and of devices in another order: each group exchanges for itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import make_inputs
from support import P, make_config
from trained_layers import alone, gradients, loss_of, plain_layer

import jax_sm_free as smf
from jax_sm_free import reference

needs_four = pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")


def wide_mesh(names, shape):
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)


def rows_and_gradients(api, *values):
    recv = api.buffer.dispatch(*values[:3])
    return recv, gradients(alone, plain_layer, api, *values)


def rows_and_sums(api, *values):
    recv = api.buffer.dispatch(*values[:3])
    return recv, api.buffer.combine(recv.x, recv.layout, weights=recv.weights)


def check_on_mesh(mesh, axis, ep_size, program=rows_and_sums, **kwargs):
    config = make_config(ep_size, num_experts=2 * ep_size)
    groups = [make_inputs(config, seed=seed) for seed in range(mesh.size // ep_size)]
    x, topk_idx, weights = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    matrix = np.random.default_rng(3).normal(size=(mesh.size, 7, 7)).astype(np.float32)
    values = x, topk_idx, weights, matrix
    other = support.open_buffer(config, mesh, axis, reference)
    with support.open_buffer(config, mesh, axis) as buffer:
        ours = functools.partial(program, support.Api(buffer, smf))
        theirs = functools.partial(program, support.Api(other, reference))
        got = jax.device_get(support.on_ranks(ours, mesh, **kwargs)(*values))
        want = support.on_ranks(theirs, mesh, **kwargs)(*values)
        buffer.check()
    support.assert_same_bits(got[0], jax.device_get(want[0]))
    support.assert_close(got[1], want[1], 1e-4)


@needs_four
@pytest.mark.parametrize(
    ("names", "axis", "program"),
    [
        (("dp", "ep"), "ep", rows_and_gradients),
        (("ep", "dp"), "ep", rows_and_sums),
        (("node", "gpu"), ("node", "gpu"), rows_and_gradients),
        (("node", "gpu"), ("gpu", "node"), rows_and_sums),
    ],
)
def test_mesh_of_two_axes(names, axis, program):
    """Several groups at once, each for itself; and one group over two axes, in either order."""
    shape = (2, support.MAX_RANKS // 2)
    ep_size = support.MAX_RANKS if isinstance(axis, tuple) else shape[names.index(axis)]
    check_on_mesh(wide_mesh(names, shape), axis, ep_size, program)


@needs_four
def test_what_is_the_same_in_all_groups():
    """It stays so in shard_map's types: neither inputs nor results are spread over the groups."""
    mesh = wide_mesh(("dp", "ep"), (2, support.MAX_RANKS // 2))
    config = make_config(mesh.shape["ep"], num_experts=2 * mesh.shape["ep"])
    x, topk_idx, weights = (a.reshape(-1, a.shape[-1]) for a in make_inputs(config))

    def gradients(api, x, weights):
        mapped = jax.shard_map(
            functools.partial(plain_layer, api),
            mesh=mesh,
            in_specs=(*3 * [P("ep")], P()),
            out_specs=P("ep"),
        )
        loss = lambda x, w: loss_of(mapped(x, topk_idx, w, jnp.eye(7)))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(x, weights)

    with support.open_buffer(config, mesh) as buffer:
        apis = (
            support.Api(buffer, smf),
            support.Api(support.open_buffer(config, mesh, module=reference), reference),
        )
        got, want = (
            support.whole(jax.jit(functools.partial(gradients, api))(x, weights)) for api in apis
        )
        support.assert_close(got, want, 1e-4)


@pytest.mark.skipif(support.MAX_RANKS < 8, reason="needs eight devices")
def test_two_expert_axes_beside_another():
    mesh = wide_mesh(("node", "dp", "gpu"), (2, 2, 2))
    check_on_mesh(mesh, ("node", "gpu"), 4, check_vma=False)


def test_mesh_whose_devices_are_not_in_order():
    devices = np.array(jax.devices()[: support.MAX_RANKS])[::-1]
    check_on_mesh(jax.sharding.Mesh(devices, ("ep",)), "ep", support.MAX_RANKS)
