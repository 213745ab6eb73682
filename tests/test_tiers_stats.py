"""`Buffer.stats` of two tiers: bytes by the ranks that carry them, and few over node boundaries."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from test_stats import assert_counts, counted, dispatch, rows_between, train

NUM_RANKS = support.MAX_RANKS
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(NUM_RANKS < 4, reason="needs four devices"),
]


def config_of(num_nodes, node_stride=None):
    return support.make_config(
        NUM_RANKS,
        num_nodes=num_nodes,
        node_stride=node_stride,
        num_experts=2 * NUM_RANKS,
        top_k=5,
        recv_capacity=40 * NUM_RANKS,
    )


# Nodes of all devices but one axis: 2 nodes x 4 and 4 nodes x 2 of eight devices.
CONFIGS = [
    config_of(num_nodes, stride)
    for num_nodes in sorted({2, NUM_RANKS // 2})
    for stride in sorted({1, NUM_RANKS // num_nodes})
]
of_configs = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.num_nodes}_nodes_stride_{config.node_stride}"
)


def node_of(config, rank):
    return rank // config.node_stride % config.num_nodes


def other_node(config):
    """Whether two ranks are on different nodes: [ep_size, ep_size]."""
    nodes = node_of(config, np.arange(config.ep_size))
    return nodes[:, None] != nodes


def tokens_for_nodes(config, topk_idx):
    """Tokens of each rank that have an expert on each node: [ep_size, num_nodes]."""
    nodes = node_of(config, topk_idx // config.num_local_experts)
    nodes = np.where(topk_idx < 0, -1, nodes)
    return np.stack([(nodes == node).any(2).sum(1) for node in range(config.num_nodes)], 1)


def rows_carried(config, topk_idx):
    """Rows that each rank hands to each other in a dispatch of two tiers: [ep_size, ep_size]."""
    flat, by_node = rows_between(config, topk_idx), tokens_for_nodes(config, topk_idx)
    stride, num_nodes = config.node_stride, config.num_nodes
    rows = np.zeros_like(flat)
    for rank in range(config.ep_size):
        first = rank - node_of(config, rank) * stride
        rail = [first + node * stride for node in range(num_nodes)]
        for peer in range(config.ep_size):
            if node_of(config, peer) == node_of(config, rank):
                rows[rank, peer] = flat[rail, peer].sum()  # its own, and those that it forwards
            elif peer in rail:
                rows[rank, peer] = by_node[rank, node_of(config, peer)]
    return rows


def layer_inputs(config):
    inputs = sample_inputs.make_inputs(config)
    return *inputs, sample_inputs.make_rows(config, config.recv_capacity, 0)


@of_configs
def test_a_dispatch_sends_a_token_once_to_each_other_node(config):
    inputs = layer_inputs(config)
    row_bytes = 4 * config.hidden
    buffer = support.apis(config)[0].buffer
    flat = support.apis(dataclasses.replace(config, num_nodes=1, node_stride=None))[0].buffer
    stats, _ = counted(buffer, dispatch, *inputs)
    flat_stats, _ = counted(flat, dispatch, *inputs)
    is_other_node, by_node = other_node(config), tokens_for_nodes(config, inputs[1])
    for rank, flat_rank in zip(stats.ranks, flat_stats.ranks, strict=True):
        remote = is_other_node[rank.rank]
        own = node_of(config, rank.rank)
        pairs = by_node[rank.rank].sum() - by_node[rank.rank, own]
        sent = np.asarray(rank.bytes_sent)[remote].sum()
        assert sent == pairs * row_bytes
        assert sent < np.asarray(flat_rank.bytes_sent)[remote].sum()


# Programs, and how many exchanges of each kind they have.
PROGRAMS = {
    dispatch: (1, 0, 0, 0),
    sample_programs.layer: (1, 1, 0, 0),
    train: (1, 1, 1, 1),
}


@of_configs
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_bytes_are_counted_by_the_rank_that_carries_them(config, program):
    inputs = layer_inputs(config)
    buffer = support.apis(config)[0].buffer
    stats, _ = counted(buffer, program, *inputs)
    there = rows_carried(config, inputs[1]) * 4 * config.hidden
    dispatches, combines, dispatches_back, combines_back = PROGRAMS[program]
    # A dispatch and the gradient of a combine go there, the other two come back.
    sent = there * (dispatches + combines_back) + there.T * (combines + dispatches_back)
    assert_counts(stats, buffer, PROGRAMS[program], sent, sent.T)
