"""What ops and transformations of JAX refuse, when, and in which words."""

from __future__ import annotations

import functools
import re

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import make_inputs
from support import make_config

import jax_sm_free as smf

CONFIG = make_config(num_experts=2 * support.SOME_RANKS)
T, H, K = CONFIG.max_tokens, CONFIG.hidden, CONFIG.top_k
ROWS = CONFIG.recv_capacity


def traced(fn, *args, mesh=None):
    """Traces fn(*args), given as shapes of one rank, inside shard_map; runs nothing."""
    mesh = mesh or support.mesh_of(CONFIG.ep_size)
    size = mesh.size
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape), a.dtype), args)
    return jax.eval_shape(support.unjitted_on_ranks(fn, mesh), *shapes)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, IDX, WEIGHTS = shape(T, H), shape(T, K, dtype=jnp.int32), shape(T, K)
KEY = jax.eval_shape(lambda: jax.random.key(0)).dtype
Y, ROW_WEIGHTS = shape(ROWS, H), shape(ROWS)


@pytest.fixture(params=["library", "reference"])
def buffer(request):
    """Both have the same checks."""
    ours, theirs = support.apis(CONFIG)
    return (ours if request.param == "library" else theirs).buffer


# ----------------------------------------------------------------------------- operands of the ops


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((shape(T + 1, H), IDX, WEIGHTS), ValueError, "at most 6 tokens (max_tokens), got 7"),
        ((shape(T, H + 1), IDX, WEIGHTS), ValueError, "x float32[T, 7], got float32[6, 8]"),
        ((shape(T, H, 1), IDX, WEIGHTS), ValueError, "x float32[T, 7], got float32[6, 7, 1]"),
        ((shape(H), IDX, WEIGHTS), ValueError, "x float32[T, 7], got float32[7]"),
        (
            (shape(T, H, dtype=jnp.bfloat16), IDX, WEIGHTS),
            TypeError,
            "x float32[T, 7], got bfloat16[6, 7]",
        ),
        (
            (X, shape(T, K + 1, dtype=jnp.int32), WEIGHTS),
            ValueError,
            "topk_idx int32[6, 3], got int32[6, 4]",
        ),
        (
            (X, shape(T - 1, K, dtype=jnp.int32), WEIGHTS),
            ValueError,
            "topk_idx int32[6, 3], got int32[5, 3]",
        ),
        (
            (X, shape(T, K, dtype=jnp.uint32), WEIGHTS),
            TypeError,
            "topk_idx int32[6, 3], got uint32[6, 3]",
        ),
        ((X, IDX, shape(T)), ValueError, "topk_weights float32[6, 3], got float32[6]"),
        (
            (X, IDX, shape(T, K, dtype=jnp.bfloat16)),
            TypeError,
            "topk_weights float32[6, 3], got bfloat16[6, 3]",
        ),
        (((X,), IDX, WEIGHTS), TypeError, "an array or (values, scales), got 1 parts"),
        (((X, shape(T - 1, 2)), IDX, WEIGHTS), ValueError, "float32[6, 7] and float32[5, 2]"),
        (((X, shape(T, 0)), IDX, WEIGHTS), ValueError, "scales to have columns, got float32[6, 0]"),
        (((X, shape(T)), IDX, WEIGHTS), ValueError, "scales of two dimensions, got float32[6]"),
        (
            ((shape(T, 8, dtype=jnp.int4), shape(T, 1)), IDX, WEIGHTS),
            TypeError,
            "values of whole bytes each, got int4[6, 8]",
        ),
        (
            ((shape(T, 1), shape(T, 8, dtype=jnp.float4_e2m1fn)), IDX, WEIGHTS),
            TypeError,
            "scales of whole bytes each, got float4_e2m1fn[6, 8]",
        ),
        (
            ((shape(T, 1, dtype=KEY), shape(T, 1)), IDX, WEIGHTS),
            TypeError,
            "values of whole bytes each, got key<fry>[6, 1]",
        ),
        (
            ((X, shape(T, 1)), IDX, WEIGHTS),
            ValueError,
            "at most 28 bytes (hidden=7, float32), got 32",
        ),
    ],
)
def test_dispatch_operands_are_checked_at_trace_time(args, error, words, buffer):
    with pytest.raises(error, match=r"dispatch_send: .*" + re.escape(words)):
        traced(buffer.dispatch_send, *args)


def combine_after_dispatch(buffer, y, weights, x, topk_idx, topk_weights):
    layout = buffer.dispatch(x, topk_idx, topk_weights).layout
    return buffer.combine(y, layout, weights=weights)


@pytest.mark.parametrize(
    ("y", "weights", "error", "words"),
    [
        (
            shape(ROWS + 1, H),
            ROW_WEIGHTS,
            ValueError,
            f"y float32[{ROWS}, 7], got float32[{ROWS + 1}",
        ),
        (
            shape(ROWS, H + 1),
            ROW_WEIGHTS,
            ValueError,
            f"y float32[{ROWS}, 7], got float32[{ROWS}, 8]",
        ),
        (shape(ROWS, H, dtype=jnp.float16), ROW_WEIGHTS, TypeError, "got float16["),
        (Y, shape(ROWS, 1), ValueError, f"weights float32[{ROWS}], got float32[{ROWS}, 1]"),
        (
            Y,
            shape(ROWS, dtype=jnp.float16),
            TypeError,
            f"weights float32[{ROWS}], got float16[{ROWS}]",
        ),
    ],
)
def test_combine_operands_are_checked_at_trace_time(y, weights, error, words, buffer):
    program = functools.partial(combine_after_dispatch, buffer)
    with pytest.raises(error, match=r"combine_send: .*" + re.escape(words)):
        traced(program, y, weights, X, IDX, WEIGHTS)


def test_a_layout_of_another_configuration_is_refused(buffer):
    layout = smf.Layout(IDX, shape(9, K, dtype=jnp.int32), shape(4, dtype=jnp.int32), "experts")
    with pytest.raises(ValueError, match=r"layout.rows int32\[\d+, 3\], got int32\[9, 3\]"):
        traced(lambda y, layout: buffer.combine_send(y, layout), Y, layout)
    with pytest.raises(TypeError, match="the layout of a dispatch, got "):
        traced(lambda y: buffer.combine_send(y, y), Y)


def test_rows_in_the_other_form_are_refused(buffer):
    """Rows of the experts' form with a layout by tokens."""

    def program(y, *args):
        return buffer.combine(y, buffer.dispatch(*args, output="tokens").layout)

    expected = rf"y float32\[{CONFIG.max_recv_tokens}, 7\], got float32\[{ROWS}, 7\]"
    with pytest.raises(ValueError, match=expected):
        traced(program, Y, X, IDX, WEIGHTS)


def test_an_unknown_output_is_refused(buffer):
    with pytest.raises(ValueError, match="'experts' or 'tokens', got 'rows'"):
        traced(lambda *args: buffer.dispatch(*args, output="rows"), X, IDX, WEIGHTS)


def test_a_sent_value_of_another_op_is_refused():
    buffer = support.apis(CONFIG)[0].buffer
    with pytest.raises(TypeError, match=r"combine_send returned, got that of dispatch_send"):
        traced(lambda *a: buffer.combine_recv(buffer.dispatch_send(*a)), X, IDX, WEIGHTS)
    with pytest.raises(TypeError, match=r"dispatch_send returned, got "):
        traced(buffer.dispatch_recv, X)
    with pytest.raises(TypeError, match=r"what a send returned or a receive hook, got "):
        traced(lambda x: smf.overlap(x, jnp.sin, x), X)


# ------------------------------------------------------------------------------------ where to call


def test_calls_outside_of_shard_map_are_refused():
    buffer = support.apis(CONFIG)[0].buffer
    x, topk_idx, weights = (value[0] for value in make_inputs(CONFIG))
    for call in (buffer.dispatch, jax.jit(buffer.dispatch)):
        with pytest.raises(ValueError, match=r"inside jax.shard_map over .*'ep', got .* none"):
            call(x, topk_idx, weights)


@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
def test_a_shard_map_over_another_mesh_is_refused():
    buffer = support.apis(make_config(2))[0].buffer

    def mesh_of(shape, names):
        return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)

    for mesh, expected in (
        (mesh_of((4,), ("ep",)), r"mesh {'ep': 2}, got shard_map over {'ep': 4}"),
        (mesh_of((2,), ("tp",)), r"over the buffer's axis 'ep', got .* \['tp'\]"),
        (mesh_of((2, 2), ("dp", "ep")), r"mesh {'ep': 2}, got .* {'dp': 2, 'ep': 2}"),
    ):
        with pytest.raises(ValueError, match=expected):
            traced(buffer.dispatch, X, IDX, WEIGHTS, mesh=mesh)


def rows_of(buffer, *args):
    return buffer.dispatch(*args).x


def compiled_rows(buffer):
    return support.on_ranks(functools.partial(rows_of, buffer), support.mesh_of(CONFIG.ep_size))


@pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two ranks")
def test_a_shard_map_over_the_same_devices_in_another_order_is_a_fault():
    """Tracing cannot see it, and the ranks would be mistaken for each other."""
    inputs = make_inputs(CONFIG)
    with support.open_buffer(CONFIG) as buffer:
        mesh = jax.sharding.Mesh(buffer.mesh.devices[::-1], ("ep",))
        run = support.on_ranks(functools.partial(rows_of, buffer), mesh)
        expected = (
            r"expected shard_map over the buffer's own mesh, .* position \d, seen position \d"
        )
        support.assert_matches(faulty_runs.run_into_fault(run, *inputs), expected)
        support.assert_matches(faulty_runs.fault_of(buffer), expected)
        buffer, good = faulty_runs.go_on(buffer, compiled_rows(buffer), compiled_rows)
        want = compiled_rows(support.apis(CONFIG)[1].buffer)
        support.assert_same_bits(good(*inputs), want(*inputs))


# --------------------------------------------------------------------------------- transformations


def layer(buffer, x, topk_idx, weights):
    recv = buffer.dispatch(x, topk_idx, weights)
    return buffer.combine(recv.x, recv.layout, weights=recv.weights)


@pytest.mark.parametrize("overlap", [False, True])
def test_second_derivatives_are_refused(overlap):
    """Forward over reverse and reverse over reverse raise an error instead of giving zero."""
    buffer = support.apis(CONFIG)[0].buffer

    def loss(x, topk_idx, weights):
        hook = buffer.dispatch(x, topk_idx, weights, return_recv_hook=True)
        if overlap:
            _, hook = smf.overlap(hook, jnp.sin, x)
        return (hook().x ** 2).sum()

    for second in (jax.hessian(loss), jax.grad(lambda *a: jax.grad(loss)(*a).sum())):
        with pytest.raises(NotImplementedError, match=r"'smf_.*_send' not implemented"):
            traced(second, X, IDX, WEIGHTS)


def test_forward_derivatives_are_refused():
    buffer = support.apis(CONFIG)[0].buffer

    def program(x, topk_idx, weights):
        return jax.jvp(lambda x: layer(buffer, x, topk_idx, weights), (x,), (x,))

    run = support.on_ranks(program, buffer.mesh)
    with pytest.raises(TypeError, match="forward-mode"):
        run.lower(*make_inputs(CONFIG))


def quantised_loss(wrap, buffer, x, topk_idx, weights):
    values, scales = wrap((x[:, :3], x[:, 3:4]))
    recv = buffer.dispatch((values, scales), topk_idx, weights)
    rows = jnp.concatenate([*recv.x, recv.x[0]], axis=1)
    return buffer.combine(rows, recv.layout, weights=recv.weights).sum()


def test_a_gradient_through_values_and_scales_is_refused():
    buffer = support.apis(CONFIG)[0].buffer
    program = jax.grad(functools.partial(quantised_loss, lambda pair: pair, buffer))
    words = r"without a gradient when it is \(values, scales\).*float32\[6, 3\].*stop_gradient"
    with pytest.raises(TypeError, match=words):
        traced(program, X, IDX, WEIGHTS)


def quantised_weight_gradient(api, x, topk_idx, weights):
    loss = functools.partial(quantised_loss, jax.lax.stop_gradient, api.buffer)
    return jax.grad(loss, 2)(x, topk_idx, weights)


def test_weights_have_gradients_beside_values_and_scales():
    """As the error says: with stop_gradient around the rows."""
    ours, theirs = support.runners(CONFIG, quantised_weight_gradient)
    inputs = make_inputs(CONFIG, seed=1)
    got = ours(*inputs)
    assert np.asarray(got).any()
    support.assert_close(got, theirs(*inputs))
