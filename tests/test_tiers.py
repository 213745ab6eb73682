"""Two tiers: the rows of a dispatch are those of one tier, and a combine sums by nodes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import ROUTINGS, make_inputs, make_rows
from sample_programs import after, num_rows, round_trip, round_trip_tokens
from support import P, assert_same_bits, make_config

import jax_sm_free as smf
from jax_sm_free import reference

pytestmark = pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two devices")

NUM_RANKS = support.MAX_RANKS
SIZES = {"num_experts": 2 * NUM_RANKS, "num_slots": 3}
# Each way to share the ranks among nodes: (num_nodes, node_stride).
PLACES = [
    (num_nodes, stride)
    for num_nodes in support.EP_SIZES[1:]
    for stride in support.EP_SIZES
    if NUM_RANKS % (num_nodes * stride) == 0
]
CONFIG = make_config(NUM_RANKS, num_nodes=min(2, NUM_RANKS), **SIZES)


def inputs_of(config, program=round_trip, seed=0, **kwargs):
    return *make_inputs(config, seed=seed, **kwargs), make_rows(
        config, num_rows(config, program), 1
    )


def without_nodes(recv):
    """What a dispatch returns, without the array that only two tiers have."""
    return dataclasses.replace(recv, layout=dataclasses.replace(recv.layout, node_topk=None))


def check(config, program, *inputs, tolerance=1e-5):
    """The results are those of the reference, and what was received is that of one tier."""
    recv, out = support.check_same(config, program, *inputs)
    flat = support.runners(dataclasses.replace(config, num_nodes=1), program)[0]
    recv_flat, out_flat = flat(*inputs)
    assert_same_bits(without_nodes(recv), recv_flat)
    support.assert_close(out, out_flat, tolerance)
    return recv, out


# ------------------------------------------------------------------------------ nodes and meshes


@pytest.mark.parametrize(("num_nodes", "stride"), PLACES)
def test_every_way_to_share_ranks_among_nodes(num_nodes, stride):
    config = make_config(NUM_RANKS, num_nodes=num_nodes, node_stride=stride, **SIZES)
    check(config, round_trip, *inputs_of(config))


# Shapes and axes of meshes, and the axes of a buffer.
MESHES = {
    "node_by_gpu": ({"node": 2, "gpu": -1}, ("node", "gpu")),
    "gpu_by_node": ({"node": 2, "gpu": -1}, ("gpu", "node")),
    "gpus_first": ({"gpu": -1, "node": 2}, ("gpu", "node")),
    "node_alone": ({"node": -1}, ("node",)),
    "one_node": ({"node": 1, "gpu": -1}, ("node", "gpu")),
    "not_neighbours": ({"node": 2, "dp": 2, "gpu": -1}, ("node", "gpu")),
    "between_others": ({"dp": 2, "node": 2, "tp": 1, "gpu": -1}, ("gpu", "node")),
    "node_in_the_middle": ({"a": 2, "node": 2, "b": -1}, ("a", "node", "b")),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes(name):
    shape, axes = MESHES[name]
    if np.prod([size for size in shape.values() if size > 0]) > NUM_RANKS:
        pytest.skip(f"needs more than {NUM_RANKS} devices")
    devices = np.array(jax.devices()[:NUM_RANKS]).reshape(*shape.values())
    mesh = jax.sharding.Mesh(devices, tuple(shape))
    ep_size = int(np.prod([mesh.shape[axis] for axis in axes]))
    behind = axes[axes.index("node") + 1 :]
    config = make_config(
        ep_size,
        num_experts=2 * ep_size,
        num_nodes=mesh.shape["node"],
        node_stride=int(np.prod([mesh.shape[axis] for axis in behind])),
    )
    groups = [inputs_of(config, seed=seed) for seed in range(NUM_RANKS // ep_size)]
    inputs = [np.concatenate(parts) for parts in zip(*groups, strict=True)]
    flat = dataclasses.replace(config, num_nodes=1)
    results = []
    for module, sizes, node_axis in (
        (smf, config, "node"),
        (reference, config, "node"),
        (smf, flat, None),
    ):
        buffer = support.open_buffer(sizes, mesh, axes, module, node_axis)
        program = functools.partial(round_trip, support.Api(buffer, module))
        results.append(jax.device_get(support.on_ranks(program, mesh)(*inputs)))
        buffer.close()
    assert_same_bits(results[0], results[1])
    assert_same_bits(without_nodes(results[0][0]), results[2][0])


# ------------------------------------------------------------------------- sizes, tokens, routings


CHANGES = {
    "bfloat16": {"dtype": jnp.bfloat16, "hidden": 9},
    "float16": {"dtype": jnp.float16},
    "cut": {"recv_capacity": 11, "expert_alignment": 2},
    "aligned": {"expert_alignment": 4},
    "expert_capacity": {"expert_capacity": 3},
    "float8": {"wire_dtype": jnp.float8_e4m3fn, "hidden": 200, "dtype": jnp.bfloat16},
    "few_columns": {"wire_dtype": jnp.float8_e4m3fn, "hidden": 3, "dtype": jnp.bfloat16},
    "one_expert": {"top_k": 1, "num_experts": NUM_RANKS},
    "many_experts": {"top_k": 8, "num_experts": 8 * NUM_RANKS, "hidden": 1},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("program", [round_trip, round_trip_tokens])
def test_sizes(name, program):
    config = dataclasses.replace(CONFIG, **({"recv_capacity": None} | CHANGES[name]))
    check(config, program, *inputs_of(config, program), tolerance=1e-2)


@pytest.mark.parametrize("num_tokens", [support.NO_TOKENS, 1, 3, CONFIG.max_tokens])
@pytest.mark.parametrize("program", [round_trip, round_trip_tokens])
def test_numbers_of_tokens(num_tokens, program):
    check(CONFIG, program, *inputs_of(CONFIG, program, num_tokens=num_tokens))


@pytest.mark.parametrize("how", ROUTINGS)
def test_routings(how):
    check(CONFIG, round_trip, *inputs_of(CONFIG, how=how))


def node_of(ranks):
    return ranks // CONFIG.node_stride % CONFIG.num_nodes


RANKS = np.arange(NUM_RANKS)[:, None, None]
# Which indices of experts become -1, by the node of the token's rank and that of the expert's.
LEFT_OUT = {
    "a_silent_node": lambda of_token, of_expert: of_token == 0,
    "an_empty_node": lambda of_token, of_expert: of_expert == 1,
    "only_to_other_nodes": lambda of_token, of_expert: of_token == of_expert,
    "only_to_the_own_node": lambda of_token, of_expert: of_token != of_expert,
    "only_from_node_to_node": lambda of_token, of_expert: (of_token != 0) | (of_expert != 1),
}


@pytest.mark.parametrize("how", LEFT_OUT)
def test_routings_between_nodes(how):
    x, topk_idx, weights, y = inputs_of(CONFIG)
    of_expert = node_of(topk_idx // CONFIG.num_local_experts)
    topk_idx = np.where(LEFT_OUT[how](node_of(RANKS), of_expert), -1, topk_idx)
    check(CONFIG, round_trip, x, topk_idx, weights, y)


def test_a_denormal_sum_of_a_node_has_no_sign():
    """Sums start at +0, also those over nodes, so that a node's -0 changes nothing."""
    config = dataclasses.replace(CONFIG, dtype=jnp.float16)
    x, topk_idx, weights, y = inputs_of(config)
    _, out = support.check_same(config, round_trip, x, topk_idx, weights, np.full_like(y, -6e-8))
    assert not np.signbit(np.asarray(out))[np.asarray(out) == 0].any()


def values_and_scales(api, values, scales, topk_idx, weights):
    rows = values, scales
    by_expert = api.buffer.dispatch(rows, topk_idx, weights)
    return by_expert, api.buffer.dispatch(rows, topk_idx, weights, output="tokens")


@pytest.mark.parametrize("dtype", [np.int8, jnp.float8_e4m3fn])
def test_values_and_scales(dtype):
    x, topk_idx, weights = make_inputs(CONFIG, seed=2)
    values, scales = (10 * x).astype(dtype), x[..., :2].astype(np.float32)
    recvs = support.check_same(CONFIG, values_and_scales, values, scales, topk_idx, weights)
    flat = support.runners(dataclasses.replace(CONFIG, num_nodes=1), values_and_scales)[0]
    recvs = tuple(map(without_nodes, recvs))
    assert_same_bits(recvs, flat(values, scales, topk_idx, weights))


# ------------------------------------------------------------------------------------- forwards


def forwarded(api, x, topk_idx, weights, y):
    """`round_trip` with all of its ops, and compute on both sides of the forwards."""
    buffer = api.buffer
    results = []

    def beside(pending):
        result, pending = api.overlap(pending, jnp.sin, x)
        results.append(result)
        return pending

    sent = beside(buffer.dispatch_send(x, topk_idx, weights))
    recv = buffer.dispatch_recv(beside(buffer.dispatch_forward(sent)))
    sent = beside(buffer.combine_send(y, recv.layout, recv.weights))
    out = buffer.combine_recv(beside(buffer.combine_forward(sent)))
    return (recv, out), results


def forwarded_hooks(api, x, topk_idx, weights, y):
    buffer = api.buffer
    hook = buffer.dispatch(x, topk_idx, weights, return_recv_hook=True)
    recv = buffer.dispatch_forward(api.overlap(hook, jnp.sin, x)[1])()
    hook = buffer.combine(y, recv.layout, recv.weights, return_recv_hook=True)
    return (recv, api.overlap(buffer.combine_forward(hook), jnp.sin, x)[1]()), None


def whole(api, x, topk_idx, weights, y):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    return (recv, api.buffer.combine(y, recv.layout, weights=recv.weights)), None


@pytest.mark.parametrize("program", [forwarded, forwarded_hooks])
@pytest.mark.parametrize("num_nodes", [1, CONFIG.num_nodes])
def test_a_forward_of_ones_own_changes_nothing(program, num_nodes):
    config = dataclasses.replace(CONFIG, num_nodes=num_nodes, node_stride=None)
    inputs = inputs_of(config)
    got, _ = support.check_same(config, program, *inputs)
    want, _ = support.runners(config, whole)[0](*inputs)
    assert_same_bits(got, want)


def several_in_flight(api, x, topk_idx, weights, y):
    """Three exchanges of each kind: sent, forwarded and received each in an order of its own."""
    buffer = api.buffer
    sent = []
    for shift in range(3):
        x, one = after(x, buffer.dispatch_send(x + shift, jnp.roll(topk_idx, shift, 0), weights))
        sent.append(one)
    for i in (2, 0, 1):
        sent[i] = buffer.dispatch_forward(sent[i])
        x, sent[i] = after(x, sent[i])
    recvs = {i: buffer.dispatch_recv(sent[i]) for i in (1, 2, 0)}
    sent = [buffer.combine_send(y + i, recvs[i].layout, recvs[i].weights) for i in range(3)]
    sent = {i: buffer.combine_forward(sent[i]) for i in (1, 0)} | {2: sent[2]}
    return recvs, {i: buffer.combine_recv(sent[i]) for i in (0, 2, 1)}


def test_several_exchanges_in_flight():
    support.check_same(CONFIG, several_in_flight, *inputs_of(CONFIG))


def test_many_runs_of_one_program():
    """Slots are used again, and each run gives its own results."""
    ours, theirs = support.runners(CONFIG, round_trip)
    for seed in range(8):
        inputs = inputs_of(CONFIG, seed=seed)
        assert_same_bits(ours(*inputs), theirs(*inputs))


def mapped(api, x, topk_idx, weights, y):
    def place(shift):
        return forwarded(api, x + shift, topk_idx, weights, y * shift)[0]

    return jax.vmap(place)(jnp.arange(1.0, 4.0))


def test_vmap():
    got = support.check_same(CONFIG, mapped, *inputs_of(CONFIG))
    x, topk_idx, weights, y = inputs_of(CONFIG)
    want = support.runners(CONFIG, round_trip)[0](x + 2, topk_idx, weights, y * 2)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[:, 1], got), want)


@pytest.mark.parametrize("check_vma", [False, True])
def test_sent_values_cross_shard_maps(check_vma):
    """A send, a forward and a recv, each in a shard_map of its own."""
    mesh = support.mesh_for(CONFIG)
    buffer = support.apis(CONFIG)[0].buffer
    specs, everywhere = buffer.sent_specs, P(mesh.axis_names)

    def over(fn, in_specs, out_specs):
        return jax.shard_map(
            fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )

    @jax.jit
    def program(*inputs):
        x, topk_idx, weights, y = (a.reshape(-1, a.shape[-1]) for a in inputs)
        sent = over(buffer.dispatch_send, everywhere, specs)(x, topk_idx, weights)
        sent = over(buffer.dispatch_forward, (specs,), specs)(sent)

        def experts(sent, y):
            recv = buffer.dispatch_recv(sent)
            return recv.x, buffer.combine_send(y, recv.layout, recv.weights)

        rows, sent = over(experts, (specs, everywhere), (everywhere, specs))(sent, y)
        sent = over(buffer.combine_forward, (specs,), specs)(sent)
        return rows, over(buffer.combine_recv, (specs,), everywhere)(sent)

    inputs = inputs_of(CONFIG)
    recv, out = support.runners(CONFIG, round_trip)[0](*inputs)
    rows, got = support.whole(program(*inputs))
    assert_same_bits(np.asarray(rows).reshape(recv.x.shape), np.asarray(recv.x))
    assert_same_bits(np.asarray(got).reshape(out.shape), np.asarray(out))
