"""`moe`, a layer in one call: the same numbers as the ops one by one, in the same places."""

from __future__ import annotations

import functools

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import support
from support import P

import jax_sm_free as smf

RANKS, T, H, F, E, K = support.SOME_RANKS, 6, 8, 12, 8, 3
SHAPES = {
    "router": (H, E),
    "up": (E, H, F),
    "bias": (E, F),
    "down": (E, F, H),
    "shared_up": (H, F),
    "shared_down": (F, H),
}
OF_RANK = {"up", "bias", "down"}


@functools.cache
def buffer():
    return smf.Buffer(
        support.mesh_of(RANKS),
        "ep",
        hidden=H,
        num_experts=E,
        top_k=K,
        max_tokens=T,
        dtype=jnp.float32,
    )


def make_params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def make_x(*leading):
    return np.random.default_rng(1).normal(size=(RANKS, *leading, H)).astype(np.float32)


def route(params, x):
    return jax.lax.top_k(jax.nn.softmax(x @ params["router"]), K)


def mlp(params, recv):
    h = jax.lax.ragged_dot(recv.x, params["up"], recv.group_sizes) + params["bias"][recv.expert]
    return jax.lax.ragged_dot(jax.nn.silu(h), params["down"], recv.group_sizes)


def shared_up(params, x):
    return jax.nn.gelu(x @ params["shared_up"])


def shared_expert(params, x):
    return shared_up(params, x) @ params["shared_down"]


def op_by_op(params, x):
    weights, idx = route(params, x)
    recv = buffer().dispatch(x, idx, weights)
    out = buffer().combine(mlp(params, recv), recv.layout, weights=recv.weights)
    return out + shared_expert(params, x)


def at_once(params, x, *, in_two=False):
    weights, idx = route(params, x)
    beside_combine = (
        functools.partial(shared_up, params),
        lambda h: h @ params["shared_down"],
    )
    shared = beside_combine if in_two else functools.partial(shared_expert, params)
    return smf.moe(x, idx, weights, functools.partial(mlp, params), buffer(), shared=shared)


def on_ranks(layer, **kwargs):
    """[RANKS, ..., H] -> the same, each rank with its experts."""
    specs = {name: P("ep") if name in OF_RANK else P() for name in SHAPES}

    def of_rank(params, x):
        return layer(params, x[0])[None]

    return jax.shard_map(
        of_rank, mesh=buffer().mesh, in_specs=(specs, P("ep")), out_specs=P("ep"), **kwargs
    )


def with_gradients(layer, **kwargs):
    def loss(params, x):
        out = on_ranks(layer, **kwargs)(params, x)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("in_two", [True, False])
def test_a_layer_at_once_is_the_layer_op_by_op(in_two, check_vma):
    args = make_params(), make_x(T)
    got = with_gradients(functools.partial(at_once, in_two=in_two), check_vma=check_vma)(*args)
    want = with_gradients(op_by_op, check_vma=check_vma)(*args)
    support.assert_close(got, want)


@pytest.mark.parametrize("leading", [(2, 3), (1, 2, 3), (5,), ()])
def test_leading_dimensions_are_tokens(leading):
    params, x = make_params(), make_x(*leading)
    flat = x.reshape(RANKS, -1, H)
    got = jax.jit(on_ranks(at_once))(params, x)
    want = jax.jit(on_ranks(op_by_op))(params, flat)
    support.assert_close(got, np.asarray(want).reshape(x.shape))


def test_weights_and_indices_of_other_dtypes():
    """float16 and bfloat16 weights and 8-bit indices; the gradient has the weights' dtype."""
    params, x = make_params(), make_x(T)

    def layer(dtype, params, x):
        weights, idx = route(params, x)
        weights = weights.astype(jnp.bfloat16).astype(dtype)
        experts = functools.partial(mlp, params)
        return smf.moe(x, idx.astype(jnp.int8), weights, experts, buffer())

    got, want = (
        with_gradients(functools.partial(layer, d))(params, x) for d in (jnp.bfloat16, jnp.float32)
    )
    support.assert_close(got[0], want[0])
    support.assert_close(got[1][1], want[1][1], tolerance=2e-2)  # through a bfloat16 gradient


def test_experts_may_apply_the_weights_themselves():
    """The last product is linear: its rows may be multiplied before it."""

    def layer(params, x):
        weights, idx = route(params, x)

        def experts(recv):
            h = jax.lax.ragged_dot(recv.x, params["up"], recv.group_sizes)
            h = jax.nn.silu(h + params["bias"][recv.expert]) * recv.weights[:, None]
            return jax.lax.ragged_dot(h, params["down"], recv.group_sizes)

        return smf.moe(x, idx, weights, experts, buffer(), apply_weights=False)

    def as_always(params, x):
        weights, idx = route(params, x)
        return smf.moe(x, idx, weights, functools.partial(mlp, params), buffer())

    args = make_params(), make_x(T)
    got, want = (with_gradients(one)(*args) for one in (layer, as_always))
    support.assert_close(got, want, tolerance=1e-4)  # the loss is a sum that cancels


WIDE = (jnp.int64, 2**32), (jnp.int64, -(2**32)), (jnp.uint32, 2**31), (jnp.uint32, 2**32 - 1)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("dtype", "number"), WIDE)
def test_an_index_beyond_int32_is_a_fault(dtype, number):
    """Cast to int32, these would name expert 0, or none, in silence."""
    mesh, spec = support.mesh_of(1), P("ep")
    sizes = {"hidden": H, "num_experts": 2, "top_k": 1, "max_tokens": 3, "dtype": jnp.float32}
    with jax.enable_x64(True), smf.Buffer(mesh, "ep", **sizes) as one:
        experts = jax.shard_map(
            lambda *args: smf.moe(*args, lambda recv: 3 * recv.x, one),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
        x, weights = jnp.ones((3, H), jnp.float32), jnp.ones((3, 1), jnp.float32)
        idx = jnp.array([[0], [1], [0]], dtype)
        np.testing.assert_array_equal(jax.jit(experts)(x, idx, weights), 3 * x)
        seen = 2 if number > 0 else -2
        error = faulty_runs.error_of(jax.jit(experts), x, idx.at[1, 0].set(number), weights)
        assert f"expected topk_idx in [-1, 2), seen {seen} at token 1" in error


def test_experts_may_return_more():
    def layer(params, x):
        weights, idx = route(params, x)

        def experts(recv):
            return mlp(params, recv), (recv.counts, recv.dropped[None])

        out, (counts, dropped) = smf.moe(x, idx, weights, experts, buffer(), has_aux=True)
        return out, counts, dropped

    specs = {name: P("ep") if name in OF_RANK else P() for name in SHAPES}
    run = jax.shard_map(layer, mesh=buffer().mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))
    out, counts, dropped = jax.jit(run)(make_params(), make_x(T).reshape(-1, H))
    assert out.shape == (RANKS * T, H)
    assert counts.sum() == RANKS * T * K
    assert not dropped.any()


@pytest.mark.parametrize("in_two", [True, False])
def test_what_shared_closes_over_is_held_beside_the_exchange(in_two):
    """Each product with a shared weight stands behind a barrier that its weight goes through."""
    params, x = make_params(), make_x(T)
    text = str(jax.make_jaxpr(on_ranks(functools.partial(at_once, in_two=in_two)))(params, x))
    held = [line for line in text.splitlines() if "smf_hold" in line]
    shapes = [f"f32[{H},{F}]", f"f32[{F},{H}]"]
    # One barrier before each function, for its argument and weights, and one behind it.
    assert len(held) == (4 if in_two else 2)
    starts = held[::2]
    for shape in shapes:
        assert sum(shape in line for line in starts) == 1, text


def test_arguments_are_checked():
    def run(x, idx, weights, of=None, shared=None, experts=lambda r: r.x, has_aux=False):
        def layer(x, idx, weights):
            of_all = of or buffer()
            return smf.moe(x, idx, weights, experts, of_all, shared=shared, has_aux=has_aux)

        spec = P("ep")
        jax.eval_shape(
            jax.shard_map(layer, mesh=buffer().mesh, in_specs=spec, out_specs=spec), x, idx, weights
        )

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((RANKS * shape[0], *shape[1:]), dtype)

    x, idx, weights = array(T, H), array(T, K, dtype=jnp.int32), array(T, K)
    run(x, idx, weights)
    for args, error, words in (
        ((array(T, H + 1), idx, weights), ValueError, r"x \[\.\.\., 8\], got float32\[6, 9\]"),
        ((array(T, H, dtype=jnp.bfloat16), idx, weights), TypeError, r"x float32.* got bfloat16"),
        ((array(T + 1, H), idx, weights), ValueError, r"topk_idx \[7, 3\], got int32\[6, 3\]"),
        ((x, weights, weights), TypeError, r"topk_idx of an integer dtype, got float32\[6, 3\]"),
        ((x, idx, idx), TypeError, r"topk_weights of a float dtype, got int32\[6, 3\]"),
        ((x, idx, array(T, K + 1)), ValueError, r"topk_weights \[6, 3\], got float32\[6, 4\]"),
        ((x, idx, weights, "ep"), TypeError, r"buffer to be a Buffer, got str"),
        (
            (x, idx, weights, None, jnp.sum),
            ValueError,
            r"shared to return \[6, 8\], got float32\[\]",
        ),
    ):
        with pytest.raises(error, match=words):
            run(*args)
    nothing, pair = (
        r"shared to return \[6, 8\], got NoneType",
        "a pair of two functions or None, got ",
    )
    for shared, error, words in (
        (lambda x: None, ValueError, nothing),
        (lambda x: (x, x), ValueError, r"shared to return \[6, 8\], got tuple"),
        ((jnp.sin, lambda x: None), ValueError, nothing),
        ([jnp.sin, jnp.sin], TypeError, pair + "list"),
        ((jnp.sin, jnp.sin, jnp.sin), TypeError, pair + "a tuple of 3"),
        ((jnp.sin, None), TypeError, pair + "a tuple of 2"),
    ):
        with pytest.raises(error, match=words):
            run(x, idx, weights, shared=shared)
    of_pair = r"experts to return a pair \(rows, aux\), as has_aux says, got "
    rows = (
        rf"moe: expected experts to return rows float32\[{buffer().config.recv_capacity}, 8\], got "
    )
    for experts, has_aux, error, words in (
        (lambda r: None, False, TypeError, rows + "NoneType"),
        (lambda r: (r.x, 1), False, TypeError, rows + "tuple"),
        (lambda r: r.x.astype(jnp.bfloat16), False, TypeError, rows + "bfloat16"),
        (lambda r: r.x[1:], False, ValueError, rows + "float32"),
        (lambda r: (r.x[1:], 1), True, ValueError, rows + "float32"),
        (lambda r: r.x, True, TypeError, of_pair + "float32"),
        (lambda r: (r.x, 1, 2), True, TypeError, of_pair + "3 of them"),
    ):
        with pytest.raises(error, match=words):
            run(x, idx, weights, experts=experts, has_aux=has_aux)
    with pytest.raises(TypeError, match="x to be an array, got list"):
        smf.moe([1.0], idx, weights, lambda r: r.x, buffer())


def test_each_row_knows_its_expert():
    config = support.make_config(expert_alignment=4, num_experts=2 * RANKS)

    def program(api, x, idx, weights):
        recv = api.buffer.dispatch(x, idx, weights)
        return recv.expert, recv.group_sizes

    for run in support.runners(config, program):
        expert, group_sizes = (np.asarray(a) for a in run(*sample_inputs.make_inputs(config)))
        for of_rank, sizes in zip(expert, group_sizes, strict=True):
            want = np.repeat(np.arange(2), sizes)
            np.testing.assert_array_equal(
                of_rank, np.pad(want, (0, len(of_rank) - len(want)), constant_values=1)
            )
