"""Buffers with a node_axis: their arguments, names, copies, and what their forwards refuse."""

from __future__ import annotations

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import make_inputs
from support import make_config

import jax_sm_free as smf
from jax_sm_free import identity, reference

pytestmark = pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two devices")

NUM_RANKS = support.MAX_RANKS
CONFIG = make_config(NUM_RANKS, num_nodes=min(2, NUM_RANKS), num_experts=2 * NUM_RANKS)
FLAT = dataclasses.replace(CONFIG, num_nodes=1)
SIZES = {
    "hidden": 7,
    "num_experts": 2 * NUM_RANKS,
    "top_k": 3,
    "max_tokens": 6,
    "capacity_factor": 1.5,
    "dtype": jnp.float32,
}
AXES = ("node", "gpu")
modules = pytest.mark.parametrize("module", [smf, reference])


def mesh(num_nodes=2):
    devices = np.array(jax.devices()[:NUM_RANKS]).reshape(num_nodes, -1)
    return jax.sharding.Mesh(devices, AXES)


# ------------------------------------------------------------------------------------- the sizes


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"num_nodes": 3}, ValueError, r"ep_size \(8\) must be divisible by num_nodes \(3\)"),
        (
            {"num_nodes": 2, "node_stride": 3},
            ValueError,
            r"ep_size \(8\) must be divisible by num_nodes \* node_stride \(2 \* 3\)",
        ),
        ({"num_nodes": 4, "node_stride": 8}, ValueError, r"node_stride \(4 \* 8\)"),
        ({"num_nodes": 0}, ValueError, "num_nodes must be at least 1, got 0"),
        ({"num_nodes": 2.0}, TypeError, "num_nodes must be an integer at least 1, got 2.0"),
        ({"node_stride": 0}, ValueError, "node_stride must be at least 1, got 0"),
    ],
)
def test_sizes_are_checked(sizes, error, words):
    with pytest.raises(error, match=words):
        make_config(8, **sizes)


def test_sizes_that_follow():
    config = make_config(8, num_nodes=2)
    assert (config.node_stride, config.node_size) == (4, 4)
    assert config == make_config(8, num_nodes=2, node_stride=4)
    assert make_config(8, num_nodes=2, node_stride=1).node_size == 4
    flat = dataclasses.replace(config, num_nodes=1)
    assert flat == make_config(8), "with one node the stride says nothing"
    assert dataclasses.replace(flat, ep_size=4, recv_capacity=None) == make_config(4)


# ----------------------------------------------------------------------------------- the node_axis


@modules
@pytest.mark.parametrize(
    ("node_axis", "error", "words"),
    [
        ("host", ValueError, r"one of the buffer's axes \['node', 'gpu'\], got 'host'"),
        (AXES, TypeError, r"the name of an axis or None, got \('node', 'gpu'\)"),
        (0, TypeError, "the name of an axis or None, got 0"),
    ],
)
def test_the_node_axis_is_checked(module, node_axis, error, words):
    with pytest.raises(error, match=f"expected node_axis to be {words}"):
        module.Buffer(mesh(), AXES, node_axis=node_axis, **SIZES)
    with pytest.raises(error, match=f"expected node_axis to be {words}"):
        module.Buffer.from_config(mesh(), AXES, CONFIG, node_axis=node_axis)
    with pytest.raises(error, match=f"expected node_axis to be {words}"):
        smf.buffer_for(AXES, mesh(), node_axis=node_axis, **SIZES)


@modules
def test_an_axis_of_the_mesh_alone_is_no_node_axis(module):
    words = r"one of the buffer's axes \['gpu'\], got 'node'"
    with pytest.raises(ValueError, match=words):
        module.Buffer(mesh(), "gpu", node_axis="node", **SIZES)


@modules
def test_a_config_is_for_the_nodes_of_the_axis(module):
    stride = CONFIG.node_stride
    want, got = (
        f"num_nodes={num_nodes} and node_stride={stride}"
        for num_nodes, stride in ((1, NUM_RANKS), (2, stride))
    )
    with pytest.raises(ValueError, match=f"{want}, because node_axis is None, got {got}"):
        module.Buffer.from_config(mesh(), AXES, CONFIG)
    with pytest.raises(ValueError, match=f"{got}, because node_axis is 'node', got {want}"):
        module.Buffer.from_config(mesh(), AXES, FLAT, node_axis="node")


@modules
def test_the_sizes_come_from_the_mesh(module):
    for axes, node_axis, stride in (
        (AXES, "node", NUM_RANKS // 2),
        (AXES[::-1], "node", 1),
        (AXES, None, NUM_RANKS),
    ):
        with module.Buffer(mesh(), axes, node_axis=node_axis, **SIZES) as buffer:
            assert buffer.node_axis == node_axis
            assert buffer.config.num_nodes == (1 if node_axis is None else 2)
            assert buffer.config.node_stride == stride
            with module.Buffer.from_config(
                mesh(), axes, buffer.config, node_axis=node_axis
            ) as other:
                assert other.config == buffer.config


@modules
def test_one_node_is_one_tier(module):
    with module.Buffer(mesh(1), AXES, node_axis="node", **SIZES) as buffer:
        assert buffer.config == module.Buffer(mesh(1), AXES, **SIZES).config
        assert buffer.node_axis == "node"


# ------------------------------------------------------------------------------ names and copies


def test_the_name_of_one_tier_is_as_it_was():
    """Saved programs have it in them."""
    flat = dataclasses.replace(FLAT, ep_size=2, num_experts=4, recv_capacity=9)
    line = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("ep",))
    assert identity.describe(None, line, ("ep",), "in_process", flat) == (
        "axes ep of mesh (ep=2), transport in_process, ep_size=2, num_experts=4, top_k=3, "
        "max_tokens=6, recv_capacity=9, num_slots=2, expert_alignment=1, row_bytes=28, "
        "expert_capacity=0, float8_wire=False, dtype=float32"
    )


def test_the_name_of_two_tiers_has_the_nodes():
    for axes, stride in ((AXES, NUM_RANKS // 2), (AXES[::-1], 1)):
        with smf.Buffer(mesh(), axes, node_axis="node", **SIZES) as buffer:
            assert f"dtype=float32, num_nodes=2, node_stride={stride} #" in buffer.program_name


def test_buffers_are_found_by_their_node_axis():
    two, one = (smf.buffer_for(AXES, mesh(), node_axis=a, **SIZES) for a in ("node", None))
    with two, one:
        assert two is not one
        assert two is smf.buffer_for(AXES, mesh(), node_axis="node", **SIZES)
        assert (two.config.num_nodes, one.config.num_nodes) == (2, 1)


def test_a_pickled_buffer_is_opened_by_its_node_axis():
    first = smf.Buffer(mesh(), AXES, node_axis="node", **SIZES)
    pickled = pickle.dumps(first)
    assert pickle.loads(pickled) is first
    first.close()
    with pickle.loads(pickled) as second:
        assert (second.node_axis, second.config) == ("node", first.config)


# ------------------------------------------------------------------------------------- forwards


def traced(program, config=CONFIG, index=0):
    """Traces program(buffer, x, topk_idx, weights)."""
    buffer = support.apis(config)[index].buffer
    run = support.on_ranks(functools.partial(program, buffer), support.mesh_for(config))
    return run.lower(*make_inputs(config))


both = pytest.mark.parametrize("index", [0, 1], ids=["library", "reference"])
numbers_of_nodes = pytest.mark.parametrize("config", [CONFIG, FLAT], ids=["two", "one"])


@both
@numbers_of_nodes
def test_a_second_forward_is_refused(config, index):
    def dispatch(buffer, *args):
        sent = buffer.dispatch_forward(buffer.dispatch_send(*args))
        return buffer.dispatch_recv(buffer.dispatch_forward(sent)).x

    def dispatch_hook(buffer, *args):
        hook = buffer.dispatch_forward(buffer.dispatch(*args, return_recv_hook=True))
        return buffer.dispatch_forward(hook)().x

    def combine(buffer, *args):
        recv = buffer.dispatch(*args)
        sent = buffer.combine_forward(buffer.combine_send(recv.x, recv.layout))
        return buffer.combine_recv(buffer.combine_forward(sent))

    for program in (dispatch, dispatch_hook, combine):
        op = program.__name__.partition("_")[0] + "_forward"
        words = f"{op}: expected a sent value that has not been forwarded, got one that {op} "
        with pytest.raises(ValueError, match=words):
            traced(program, config, index)


@both
def test_a_hook_is_forwarded_once(index):
    def program(buffer, *args):
        hook = buffer.dispatch(*args, return_recv_hook=True)
        buffer.dispatch_forward(hook)
        return hook().x

    with pytest.raises(RuntimeError, match="hook to be used once, got a second use"):
        traced(program, index=index)


@numbers_of_nodes
def test_a_forward_is_of_its_own_kind(config):
    def dispatch(buffer, *args):
        return buffer.dispatch_forward(args[0])

    def combine(buffer, *args):
        return buffer.combine_forward(buffer.dispatch_send(*args))

    with pytest.raises(TypeError, match="dispatch_forward: expected what dispatch_send returned"):
        traced(dispatch, config)
    words = "combine_forward: expected what combine_send returned, got that of dispatch_send"
    with pytest.raises(TypeError, match=words):
        traced(combine, config)


def test_forwards_stand_in_shard_map():
    buffer = support.apis(CONFIG)[0].buffer
    for forward in (buffer.dispatch_forward, buffer.combine_forward):
        with pytest.raises(ValueError, match=r"_forward: expected to be called inside"):
            forward(None)


@modules
def test_a_layout_of_one_tier_is_not_for_two(module):
    """And the other way round."""
    mesh = support.mesh_for(CONFIG)
    with (
        support.open_buffer(CONFIG, module=module) as two,
        support.open_buffer(FLAT, mesh, mesh.axis_names, module) as one,
    ):

        def program(first, second, *args):
            recv = first.dispatch(*args)
            return second.combine(recv.x, recv.layout)

        words = r"expected layout.node_topk to be an array int32\[12, 3\], got NoneType"
        with pytest.raises(TypeError, match=words):
            support.on_ranks(functools.partial(program, one, two), mesh)(*make_inputs(CONFIG))
        words = r"layout of a buffer without a node_axis, got one with node_topk int32\[12, 3\]"
        with pytest.raises(ValueError, match=words):
            support.on_ranks(functools.partial(program, two, one), mesh)(*make_inputs(CONFIG))


@numbers_of_nodes
def test_how_often_the_calls_stand_in_a_program(config):
    """A recv forwards what nobody has forwarded, and one tier has no forwards."""

    def program(buffer, *args):
        sent = buffer.dispatch_forward(buffer.dispatch_send(*args))
        recv = buffer.dispatch_recv(sent)
        return buffer.combine(recv.x, recv.layout)

    counts = smf.inspect(traced(program, config).compile()).counts
    parts = ("send", "recv") if config.num_nodes == 1 else ("send", "forward", "recv")
    assert counts == {f"{op}_{part}": 1 for op in ("dispatch", "combine") for part in parts}


def test_a_program_can_be_exported():
    def program(buffer, *args):
        recv = buffer.dispatch(*args)
        return buffer.combine(recv.x, recv.layout)

    buffer = support.apis(CONFIG)[0].buffer
    run = support.on_ranks(functools.partial(program, buffer), support.mesh_for(CONFIG))
    mesh = buffer.mesh
    sharding = jax.sharding.NamedSharding(mesh, support.P(mesh.axis_names))
    inputs = [jax.device_put(array, sharding) for array in make_inputs(CONFIG)]
    exported = jax.export.export(run, disabled_checks=smf.export_checks())(*inputs)
    loaded = jax.export.deserialize(exported.serialize())
    support.assert_same_bits(jax.jit(loaded.call)(*inputs), run(*inputs))
