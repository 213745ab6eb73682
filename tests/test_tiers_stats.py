"""`Buffer.stats` in two tiers: a token crosses to each node once, and ranks carry for others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support
from sample_inputs import ROUTINGS, layer_inputs
from support import make_config
from test_stats import assert_counts, counted, dispatch, rows_between, train

pytestmark = pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four ranks")

NUM_RANKS = support.MAX_RANKS
# (num_nodes, node_stride): nodes of several ranks, in the order of ranks and in turn.
PLACES = [
    (num_nodes, stride)
    for num_nodes in support.EP_SIZES[1:-1]
    for stride in (1, NUM_RANKS // num_nodes)
]


def config_of(num_nodes, stride):
    return make_config(
        NUM_RANKS, num_experts=2 * NUM_RANKS, top_k=4, num_nodes=num_nodes, node_stride=stride
    )


def node_of(config, ranks):
    return ranks // config.node_stride % config.num_nodes


def place_of(config, ranks):
    """The place of a rank within its node."""
    return np.asarray([np.sum(node_of(config, np.arange(r)) == node_of(config, r)) for r in ranks])


def crossings(config, topk_idx):
    """Tokens of each rank with an expert on each node: [ep_size, num_nodes]."""
    owners = np.where(topk_idx < 0, -1, topk_idx // config.num_local_experts)
    nodes = np.where(owners < 0, -1, node_of(config, owners))
    return np.stack([(nodes == node).any(2).sum(1) for node in range(config.num_nodes)], 1)


def carried(config, topk_idx):
    """Rows that each rank carries to each in a dispatch: [ep_size, ep_size]."""
    flat, to_node = rows_between(config, topk_idx), crossings(config, topk_idx)
    ranks = np.arange(config.ep_size)
    nodes, places = node_of(config, ranks), place_of(config, ranks)
    rows = np.zeros_like(flat)
    for src in ranks:
        for dst in ranks:
            if nodes[src] != nodes[dst]:
                rows[src, dst] = to_node[src, nodes[dst]] * (places[src] == places[dst])
            else:  # its own, and those of its rail peers
                rows[src, dst] = flat[places == places[src], dst].sum()
    return rows


def between_nodes(config, sent):
    """The part of [ep_size, ep_size] that crosses nodes."""
    nodes = node_of(config, np.arange(config.ep_size))
    return sent[nodes[:, None] != nodes].sum()


@pytest.mark.parametrize(("num_nodes", "stride"), PLACES)
@pytest.mark.parametrize("how", ["uniform", "all_to_one_rank", "one_rank_sends_nothing"])
def test_bytes_of_a_dispatch(how, num_nodes, stride):
    assert how in ROUTINGS
    config = config_of(num_nodes, stride)
    inputs = layer_inputs(config)
    topk_idx = inputs[1]
    ROUTINGS[how](topk_idx, config)
    buffer = support.apis(config)[0].buffer
    stats, _ = counted(buffer, dispatch, *inputs)
    row_bytes = config.hidden * 4
    sent = carried(config, topk_idx) * row_bytes
    assert_counts(stats, buffer, (1, 0, 0, 0), sent, sent.T)

    nodes = node_of(config, np.arange(config.ep_size))
    pairs = crossings(config, topk_idx)[nodes[:, None] != np.arange(num_nodes)].sum()
    assert between_nodes(config, sent) == pairs * row_bytes
    flat_buffer = support.apis(dataclasses.replace(config, num_nodes=1))[0].buffer
    flat_stats, _ = counted(flat_buffer, dispatch, *inputs)
    flat = rows_between(config, topk_idx) * row_bytes
    assert_counts(flat_stats, flat_buffer, (1, 0, 0, 0), flat, flat.T)
    if how == "uniform":
        assert between_nodes(config, sent) < between_nodes(config, flat)


@pytest.mark.parametrize(("num_nodes", "stride"), PLACES)
def test_bytes_of_a_layer_and_its_gradients(num_nodes, stride):
    """A combine brings each row of a rail back on the same rail, and so do the gradients."""
    config = config_of(num_nodes, stride)
    inputs = layer_inputs(config)
    buffer = support.apis(config)[0].buffer
    stats, _ = counted(buffer, train, *inputs)
    there = carried(config, inputs[1])
    sent = (there + there.T) * 2 * config.hidden * 4
    assert_counts(stats, buffer, (1, 1, 1, 1), sent, sent.T)


@pytest.mark.parametrize(("num_nodes", "stride"), PLACES)
def test_ranks_wait_for_those_that_carry(num_nodes, stride):
    config = config_of(num_nodes, stride)
    buffer = support.apis(config)[0].buffer
    stats, _ = counted(buffer, train, *layer_inputs(config))
    ranks = np.arange(config.ep_size)
    nodes, places = node_of(config, ranks), place_of(config, ranks)
    for rank in stats.ranks:
        carries = (nodes == nodes[rank.rank]) | (places == places[rank.rank])
        assert not np.asarray(rank.waited_s)[~carries].any()
