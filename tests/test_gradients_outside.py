"""Gradients taken outside of the shard_map: what the backward pass keeps crosses its border."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import sample_inputs
import support
from support import P
from test_programs import CONFIG, CUT
from trained_layers import LAYERS, loss_of

import jax_sm_free as smf


def gradients_of(api, layer, config, wrap=lambda f: f):
    mesh = support.mesh_of(config.ep_size)
    per_rank = wrap(functools.partial(layer, api))

    def of_one(*args):
        return per_rank(*(a[0] for a in args))[None]

    mapped = jax.shard_map(of_one, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))

    def loss(x, weights, matrix, topk_idx):
        return loss_of(mapped(x, topk_idx, weights, matrix))

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def inputs_of(config):
    x, topk_idx, weights = sample_inputs.make_inputs(config, seed=1)
    matrix = np.random.default_rng(2).normal(size=(config.ep_size, 7, 7)).astype(np.float32)
    return x, weights, matrix, topk_idx


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["kept", "remat"])
@pytest.mark.parametrize("config", [CONFIG, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_outside_of_the_shard_map(layer, config, wrap):
    """Among the layers are combines without weights, whose gradient needs no rows."""
    ours, theirs = (gradients_of(api, layer, config, wrap) for api in support.apis(config))
    inputs = inputs_of(config)
    support.assert_close(ours(*inputs), theirs(*inputs), 1e-4)


@support.needs_empty_inputs  # What a layer keeps of no rows crosses the border, too.
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[-1]], ids=["weighted", "plain"])
def test_gradients_where_all_rows_are_dropped(layer):
    """recv_capacity is 0: neither rows nor weights are kept."""
    config = support.make_config(num_experts=2 * support.SOME_RANKS, recv_capacity=0)
    api = support.Api(support.open_buffer(config), smf)
    got = gradients_of(api, layer, config)(*inputs_of(config))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(got))
