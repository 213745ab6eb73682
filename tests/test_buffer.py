"""Making a buffer, and its life."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import faulty_runs
import jax
import jax.numpy as jnp
import pytest
import support
from sample_inputs import make_inputs
from support import make_config

import jax_sm_free as smf
from jax_sm_free import reference

CONFIG = make_config(num_experts=2 * support.SOME_RANKS)


def layer(buffer, x, topk_idx, weights):
    recv = buffer.dispatch(x, topk_idx, weights)
    return buffer.combine(recv.x, recv.layout, weights=recv.weights)


# --------------------------------------------------------------------------- making a buffer


@pytest.mark.parametrize("module", [smf, reference])
@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"num_experts": 9}, ValueError, r"num_experts \(9\) must be divisible by ep_size \(\d\)"),
        ({"top_k": 33}, ValueError, r"top_k must be in \[1, 32\], got 33"),
        ({"top_k": 0}, ValueError, r"top_k must be in \[1, 32\], got 0"),
        ({"hidden": 0}, ValueError, r"hidden must be at least 1, got 0"),
        ({"max_tokens": 2.0}, TypeError, r"max_tokens must be an integer at least 1, got 2.0"),
        ({"recv_capacity": -1}, ValueError, r"recv_capacity must be at least 0, got -1"),
        ({"num_slots": 65}, ValueError, r"num_slots must be in \[1, 64\], got 65"),
        ({"expert_alignment": 0}, ValueError, r"expert_alignment must be at least 1, got 0"),
        ({"expert_capacity": 0}, ValueError, r"expert_capacity must be at least 1, got 0"),
        (
            {"expert_capacity": 3, "recv_capacity": 5},
            ValueError,
            r"recv_capacity must be None or \d+ \(num_local_experts \* expert_capacity\).* got 5",
        ),
        (
            {"expert_capacity": 3, "expert_alignment": 2},
            ValueError,
            r"expert_alignment must be 1 with an expert_capacity, got 2",
        ),
        ({"dtype": jnp.int8}, TypeError, r"one of bfloat16, float16, float32, got int8"),
        ({"dtype": "nonsense"}, TypeError, r"one of bfloat16, float16, float32, got 'nonsense'"),
        ({"dtype": None}, TypeError, r"one of bfloat16, float16, float32, got None"),
        ({"hidden": 2**31}, ValueError, r"hidden must fit int32, got 2147483648"),
        ({"timeout_s": 0}, ValueError, r"timeout_s must be .*, got 0"),
        ({"timeout_s": "a"}, TypeError, r"timeout_s must be a number .*, got 'a'"),
        ({"timeout_s": True}, TypeError, r"timeout_s must be a number .*, got True"),
        ({"timeout_s": float("inf")}, ValueError, r"timeout_s must be .*, got inf"),
        ({"max_tokens": 2**31 - 1}, ValueError, r"must fit int32, got \d+"),
    ],
)
def test_sizes_are_checked(module, sizes, error, words):
    if support.SOME_RANKS == 1 and "num_experts" in sizes:
        pytest.skip("every number is divisible by 1")
    defaults = {"hidden": 7, "num_experts": 8, "top_k": 3, "max_tokens": 6}
    with pytest.raises(error, match=words):
        module.Buffer(support.mesh_of(support.SOME_RANKS), "ep", **(defaults | sizes))


@pytest.mark.parametrize("module", [smf, reference])
@pytest.mark.parametrize("axis", ["model", (), ("ep", "ep"), ("ep", "model")])
def test_axes_are_checked(module, axis):
    with pytest.raises(ValueError, match=r"axes of the mesh \['ep'\], each once, got "):
        support.open_buffer(CONFIG, axis=axis, module=module)


def test_the_mesh_and_the_transport_are_checked():
    with pytest.raises(TypeError, match=r"mesh to be a jax.sharding.Mesh, got list"):
        support.open_buffer(CONFIG, mesh=jax.devices())
    sizes = {"hidden": 7, "num_experts": 8, "top_k": 3, "max_tokens": 6}
    with pytest.raises(ValueError, match=r"transport .*got 'pigeon'"):
        smf.Buffer(support.mesh_of(1), "ep", transport="pigeon", **sizes)


# ------------------------------------------------------------------------------------- its life


def compiled(buffer):
    return support.on_ranks(functools.partial(layer, buffer), buffer.mesh)


def expected_output(config, inputs):
    theirs = support.apis(config)[1].buffer
    return support.on_ranks(functools.partial(layer, theirs), support.mesh_of(config.ep_size))(
        *inputs
    )


def test_a_buffer_used_after_close():
    """Tracing is refused, and a program that was compiled before ends with an error, not a hang."""
    inputs = make_inputs(CONFIG)
    buffer = support.open_buffer(CONFIG)
    run = compiled(buffer)
    jax.block_until_ready(run(*inputs))
    buffer.close()
    buffer.close()
    assert "closed" in repr(buffer)
    support.assert_matches(
        faulty_runs.error_of(run, *inputs), r"buffer \d+ to be open, seen it is closed"
    )
    with pytest.raises(RuntimeError, match="dispatch_send: expected an open buffer, got one that"):
        compiled(buffer)(*inputs)
    for use in (buffer.check, lambda: buffer.message_bytes(jax.devices()[0])):
        with pytest.raises(RuntimeError, match="expected an open buffer, got one that is closed"):
            use()
    with pytest.raises(RuntimeError, match="with: expected an open buffer"), buffer:
        pass


def test_message_bytes_takes_a_device():
    with (
        support.open_buffer(CONFIG) as buffer,
        pytest.raises(TypeError, match=r"message_bytes: expected a jax\.Device, got 0"),
    ):
        buffer.message_bytes(0)


def test_a_buffer_closes_at_the_end_of_its_block():
    with contextlib.suppress(KeyError), support.open_buffer(CONFIG) as buffer:
        assert "open" in repr(buffer)
        raise KeyError
    assert "closed" in repr(buffer)


@pytest.mark.parametrize("close_first", [True, False])
def test_a_new_buffer_of_other_size_after_the_first(close_first):
    other = dataclasses.replace(CONFIG, hidden=3, top_k=1, max_tokens=2, recv_capacity=5)
    first = support.open_buffer(CONFIG)
    inputs = make_inputs(CONFIG, seed=2)
    run = compiled(first)
    jax.block_until_ready(run(*inputs))
    if close_first:
        first.close()
    with support.open_buffer(other) as second:
        small = make_inputs(other, seed=3)
        got = jax.block_until_ready(compiled(second)(*small))
        support.assert_same_bits(got, expected_output(other, small))
        if not close_first:
            support.assert_same_bits(run(*inputs), expected_output(CONFIG, inputs))
            first.close()


def test_equal_buffers_do_not_share_programs():
    """A program compiled for a closed buffer is not run for its successor of the same sizes."""
    inputs = make_inputs(CONFIG, seed=4)
    want = expected_output(CONFIG, inputs)
    for _ in range(3):
        with support.open_buffer(CONFIG) as buffer:
            support.assert_same_bits(jax.device_get(compiled(buffer)(*inputs)), want)


def test_check_says_nothing_where_nothing_happened():
    with support.open_buffer(CONFIG) as buffer:
        buffer.check()
        jax.block_until_ready(compiled(buffer)(*make_inputs(CONFIG)))
        buffer.check()


def test_a_program_of_either_api_reads_the_same():
    """The reference takes the library's place, public method by public method."""

    def public(cls):
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(reference.Buffer) <= public(smf.Buffer)
    assert public(smf.Buffer) - public(reference.Buffer) == {"is_closed", "message_bytes", "stats"}
