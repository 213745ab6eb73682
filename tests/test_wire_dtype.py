"""A float8 wire: bits against the reference and against NumPy, sizes, what is refused."""

from __future__ import annotations

import dataclasses
import re

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support
from hypothesis import strategies as st
from sample_inputs import make_inputs, make_rows
from support import P, make_config

import jax_sm_free as smf
from jax_sm_free import reference
from jax_sm_free.reference import float8

pytestmark = pytest.mark.long

FLOAT8 = jnp.float8_e4m3fn
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
CONFIG = make_config(
    hidden=256, dtype=jnp.bfloat16, wire_dtype=FLOAT8, num_experts=2 * support.SOME_RANKS
)


def over_the_wire(x):
    """The formula of `Config`, with NumPy's arithmetic and ml_dtypes' float8; x: [..., hidden]."""
    arrived = np.empty_like(x)
    for first in range(0, x.shape[-1], 128):
        group = x[..., first : first + 128].astype(np.float32)
        amax = np.maximum(np.abs(group).max(-1, keepdims=True), np.float32(1e-4))
        scale = amax / np.float32(448)
        with np.errstate(invalid="ignore"):
            value = (group / scale).astype(ml_dtypes.float8_e4m3fn)
            back = (value.astype(np.float32) * scale).astype(x.dtype)
        back = np.where(np.isfinite(amax), back, np.array(np.nan, x.dtype))
        arrived[..., first : first + 128] = back
    return arrived


def by_experts(api, *args):
    return api.buffer.dispatch(*args)


def by_tokens(api, *args):
    return api.buffer.dispatch(*args, output="tokens")


def with_hook(api, *args):
    hook = api.buffer.dispatch(*args, return_recv_hook=True)
    waited, hook = api.overlap(hook, jnp.sin, args[0].astype(jnp.float32))
    return hook(), waited


through_reference = jax.jit(jax.vmap(float8.through_float8))


def check_rows(config, program, x, *inputs):
    """Rows are NumPy's over the wire, all else as without; and the reference quantises as NumPy."""
    arrived = over_the_wire(x)
    ours, _ = support.runners(config, program)
    exact, _ = support.runners(dataclasses.replace(config, wire_dtype=None), program)
    got = ours(x, *inputs)
    support.assert_same_bits(got, exact(arrived, *inputs))
    support.assert_same_bits(through_reference(x), arrived)
    return got


# ------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", [by_experts, by_tokens])
def test_rows_arrive_quantised_bit_by_bit(dtype, program):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    x, *routing = make_inputs(config, seed=1)
    recv = check_rows(config, program, x, *routing)
    support.check_same(config, program, x, *routing)
    assert recv.x.dtype == dtype
    rows = np.asarray(recv.x)[0]
    sent = {row.tobytes() for row in x.reshape(-1, config.hidden)}
    changed = [row.any() and row.tobytes() not in sent for row in rows]
    assert sum(changed) == np.any(rows != 0, axis=1).sum() > 0


@pytest.mark.one_process
@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 5, 7, 16, 127, 128, 129, 136, 640, 2048])
@pytest.mark.parametrize("program", [by_experts, by_tokens])
def test_any_hidden(hidden, program):
    """Also rows that are narrower in bfloat16 than with their scales, and scales out of line."""
    config = dataclasses.replace(CONFIG, hidden=hidden, expert_alignment=4)
    check_rows(config, program, *make_inputs(config, seed=hidden))


def test_the_size_of_a_real_model():
    config = dataclasses.replace(CONFIG, hidden=7168, max_tokens=33, top_k=8, num_experts=32)
    check_rows(config, by_experts, *make_inputs(config, seed=2))


@pytest.mark.parametrize("how", sample_inputs.ROUTINGS)
def test_peculiar_routing(how):
    check_rows(CONFIG, by_experts, *make_inputs(CONFIG, seed=3, how=how))


@pytest.mark.parametrize("num_tokens", [support.NO_TOKENS, 1, 5])
def test_fewer_tokens(num_tokens):
    for program in (sample_programs.round_trip, sample_programs.round_trip_tokens):
        y = make_rows(CONFIG, sample_programs.num_rows(CONFIG, program), 4)
        check_rows(CONFIG, program, *make_inputs(CONFIG, num_tokens, seed=4), y)


@pytest.mark.one_process
@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("capacity", [0, 3, 16])
def test_what_is_dropped_and_what_is_padding(alignment, capacity):
    config = dataclasses.replace(
        CONFIG, max_tokens=16, recv_capacity=capacity, expert_alignment=alignment
    )
    inputs = make_inputs(config, seed=5, how="all_to_one_rank")
    recv = check_rows(config, by_experts, *inputs)
    support.check_same(config, by_experts, *inputs)
    assert np.asarray(recv.dropped).sum() > 0
    used = np.asarray(recv.weights) != 0
    assert not np.asarray(recv.x)[~used & (np.asarray(recv.x) == 0).all(-1)].any()


def test_native_and_hook_mode_agree():
    inputs = make_inputs(CONFIG, seed=6)
    want = support.check_same(CONFIG, by_experts, *inputs)
    ours, _ = support.runners(CONFIG, with_hook)
    got, _ = ours(*inputs)
    support.assert_same_bits(got, want)


@pytest.mark.parametrize("program", [sample_programs.round_trip, sample_programs.round_trip_tokens])
def test_combine_is_not_quantised(program):
    """Rows of a combine travel in the buffer's dtype, and sums are those without wire_dtype."""
    config = dataclasses.replace(CONFIG, expert_alignment=2)
    inputs = make_inputs(config, seed=7)
    y = make_rows(config, sample_programs.num_rows(config, program), 8)
    _, got = support.check_same(config, program, *inputs, y)
    exact, _ = support.runners(dataclasses.replace(config, wire_dtype=None), program)
    support.assert_same_bits(got, exact(*inputs, y)[1])


# ----------------------------------------------------------------------------------------- numbers


def travel(rows, dtype):
    """Rows of one rank, [T, hidden], that all go to one expert."""
    rows = np.asarray(rows).astype(dtype)
    config = make_config(
        1, hidden=rows.shape[1], max_tokens=rows.shape[0], top_k=1, num_experts=1, dtype=dtype
    )
    config = dataclasses.replace(config, wire_dtype=FLOAT8)
    topk_idx = np.zeros((1, rows.shape[0], 1), np.int32)
    weights = np.ones(topk_idx.shape, np.float32)
    recv = check_rows(config, by_experts, rows[None], topk_idx, weights)
    return np.asarray(recv.x)[0]


def float8_codes():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return codes[np.isfinite(codes)]


@pytest.mark.one_process
def test_every_float8_arrives_as_it_left():
    """Rows with a 448 have scale 1."""
    rows = np.append(np.full((2, 1), 448), float8_codes().reshape(2, 127), axis=1)
    np.testing.assert_array_equal(travel(rows, jnp.float32), rows)


@pytest.mark.one_process
def test_between_two_float8_the_nearest_arrives():
    """All ties, and the float32 on either side of each, as ml_dtypes rounds them."""
    codes = np.unique(float8_codes())
    ties = (codes[1:] + codes[:-1]) / 2
    values = np.concatenate([ties, np.nextafter(ties, 500), np.nextafter(ties, -500)])
    values = np.append(values, np.zeros(-len(values) % 127)).astype(np.float32).reshape(-1, 127)
    rows = np.append(np.full((len(values), 1), 448, np.float32), values, axis=1)
    got = travel(rows, jnp.float32)
    np.testing.assert_array_equal(got, rows.astype(FLOAT8).astype(np.float32))


@pytest.mark.one_process
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_huge_and_zero_rows(dtype):
    largest = float(jnp.finfo(dtype).max)
    sizes = [0, 1e-40, 1e-20, 1e-7, 9.9e-5, 1e-4, 1.1e-4, 1, 448, largest / 3, largest]
    rng = np.random.default_rng(9)
    rows = rng.uniform(-1, 1, (len(sizes), 200)) * np.array(sizes)[:, None]
    rows[:, 0], rows[:, 199] = sizes, -np.array(sizes)
    rows[3, 1:5] = [0.0, -0.0, 1e-45, -1e-45]
    got = travel(rows, dtype).astype(np.float32)
    assert np.isfinite(got).all()
    assert not got[0].any()
    np.testing.assert_allclose(got[-3:, 0], np.array(sizes[-3:], dtype).astype(np.float32), 1e-2)


@pytest.mark.one_process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_nan_or_an_infinity_makes_its_group_nan(dtype, bad):
    """The quiet NaN without a sign, in 128 columns of this row and nowhere else."""
    rows = np.random.default_rng(10).normal(size=(3, 300)).astype(np.float32)
    rows[1, 200] = bad
    rows[2, 299] = bad
    got = travel(rows, dtype)
    want = np.zeros((3, 300), bool)
    want[1, 128:256] = want[2, 256:] = True
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), want)
    quiet = np.array(np.nan, dtype).tobytes()
    assert {value.tobytes() for value in got[want]} == {quiet}


@pytest.mark.one_process
@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(DTYPES),
    st.sampled_from(["bits", "normal", "scaled", "ties"]),
)
@support.random_examples(60)
def test_random_rows(seed, dtype, how):
    """The library, the reference and NumPy, on rows of one shape, which compile once a dtype."""
    shape = (64, 300)
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=shape)
    if how == "scaled":
        rows *= 10.0 ** rng.uniform(-12, 4, (shape[0], 1))
    if how == "ties":
        rows = np.round(rows * 64) / 2.0 ** rng.integers(0, 12, shape)
    rows = rows.astype(dtype)
    if how == "bits":
        bits = rng.integers(0, 256, (shape[0], shape[1] * rows.itemsize), dtype=np.uint8)
        rows = bits.view(dtype)
        rows = np.where(np.isfinite(rows.astype(np.float32)), rows, np.array(1, dtype))
    travel(rows, dtype)


@pytest.mark.one_process
@pytest.mark.parametrize("seed", range(3))
def test_the_reference_needs_no_exact_division(seed, monkeypatch):
    """It corrects a quotient that is a few units off, as XLA's is on GPUs."""
    x = make_rows(dataclasses.replace(CONFIG, dtype=jnp.float32), 64, 11)[0]
    noise = np.random.default_rng(seed).integers(-3, 4, x.size).astype(np.float32) * 2.0**-23
    sizes = []

    def roughly(a, b):
        sizes.append(a.size)
        return a / b * (1 + jnp.resize(noise, a.shape))

    monkeypatch.setattr(float8, "_roughly_divide", roughly)
    got = jax.jit(lambda x: float8.through_float8(x))(x)
    assert sizes == [x.size // 128, x.size]
    support.assert_same_bits(got, over_the_wire(x))


# ------------------------------------------------------------------------------ sizes and errors


@pytest.mark.one_process
def test_sizes():
    config = smf.Config(
        ep_size=8, hidden=7168, num_experts=256, top_k=8, max_tokens=4096, wire_dtype=FLOAT8
    )
    assert config.dispatched_row_bytes == 7168 + 4 * 56
    plain = dataclasses.replace(config, wire_dtype=None)
    assert plain.dispatched_row_bytes == plain.row_bytes == config.row_bytes == 2 * 7168
    assert smf.estimate_memory(config) == smf.estimate_memory(plain)
    assert smf.get_rdma_size_hint(config) == smf.get_rdma_size_hint(plain)


@pytest.mark.one_process
@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 5, 128, 129, 7168])
@pytest.mark.parametrize("dtype", DTYPES)
def test_message_bytes_are_those_of_the_native_layout(hidden, dtype):
    from jax_sm_free import _cpu

    config = dataclasses.replace(CONFIG, hidden=hidden, dtype=dtype)
    assert config.row_bytes >= max(config.dispatched_row_bytes, hidden * config.dtype.itemsize)
    assert _cpu.max_message_bytes(config.sizes()) == config.message_bytes


@pytest.mark.one_process
@pytest.mark.parametrize(
    ("wire_dtype", "name"),
    [
        (jnp.float8_e5m2, "float8_e5m2"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.int8, "int8"),
        ("fp8", "fp8"),
        (object(), "<object object"),
    ],
)
def test_other_wire_dtypes_are_refused(wire_dtype, name):
    words = "wire_dtype must be None (rows travel in dtype) or float8_e4m3fn, got " + name
    with pytest.raises(TypeError, match=re.escape(words)):
        dataclasses.replace(CONFIG, wire_dtype=wire_dtype)


@pytest.mark.one_process
@pytest.mark.parametrize("module", [smf, reference])
def test_pairs_are_refused(module):
    mesh = support.mesh_of(CONFIG.ep_size)
    rows = (CONFIG.ep_size * CONFIG.max_tokens, 128)
    pair = jax.ShapeDtypeStruct(rows, FLOAT8), jax.ShapeDtypeStruct((rows[0], 1), jnp.float32)
    topk = (rows[0], CONFIG.top_k)
    routing = jax.ShapeDtypeStruct(topk, jnp.int32), jax.ShapeDtypeStruct(topk, jnp.float32)
    words = (
        "dispatch_send: expected x bfloat16[T, 256], which a buffer with wire_dtype=float8_e4m3fn "
        "quantises itself, got a tuple of 2 parts"
    )
    with support.open_buffer(CONFIG, module=module) as buffer:
        send = jax.shard_map(
            lambda *args: buffer.dispatch(*args).x, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")
        )
        with pytest.raises(TypeError, match=re.escape(words)):
            jax.eval_shape(send, pair, *routing)


@pytest.mark.one_process
def test_rows_of_another_dtype_are_refused():
    x, topk_idx, weights = make_inputs(CONFIG, seed=16)
    ours, _ = support.runners(CONFIG, by_experts)
    with pytest.raises(TypeError, match=r"expected x bfloat16\[T, 256\], got float32\[6, 256\]"):
        ours(x.astype(np.float32), topk_idx, weights)
