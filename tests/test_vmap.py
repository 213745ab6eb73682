"""jax.vmap: one exchange for each place of the mapped axis, bit for bit as in a loop over it."""

from __future__ import annotations

import dataclasses
import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_programs
import support
from support import P, assert_same_bits, make_config
from trained_layers import LAYERS, loss_of, overlapped_layer
from vmap_places import CONFIG, NUM_PLACES, in_a_loop, inputs_of, overlapped

import jax_sm_free as smf

# On CPU the dispatch that jax.checkpoint repeats may run beside the first one, at each place.
REPEATED = dataclasses.replace(CONFIG, num_slots=2 * NUM_PLACES)
QUANTISED = dataclasses.replace(CONFIG, wire_dtype=jnp.float8_e4m3fn)
CUT = dataclasses.replace(CONFIG, recv_capacity=11, expert_alignment=2)


def check(config, program, args, in_axes=0, out_axes=0, reference=True, **kwargs):
    """Runs `program` under vmap and in a loop, of the library and of the reference."""
    mesh = support.mesh_of(config.ep_size)
    ours, theirs = support.apis(config)
    got = support.on_ranks(
        jax.vmap(functools.partial(program, ours), in_axes, out_axes), mesh, **kwargs
    )(*args)
    loop = in_a_loop(functools.partial(program, ours), in_axes, out_axes)
    assert_same_bits(got, support.on_ranks(loop, mesh, **kwargs)(*args))
    if reference:
        for over in (jax.vmap, in_a_loop):
            of_all = over(functools.partial(program, theirs), in_axes, out_axes)
            assert_same_bits(got, support.on_ranks(of_all, mesh, **kwargs)(*args))
    return got


# ----------------------------------------------------------------------------------- what is mapped


@pytest.mark.parametrize("num_places", [1, NUM_PLACES])
@pytest.mark.parametrize("config", [CONFIG, CUT, QUANTISED], ids=["whole", "cut", "quantised"])
def test_by_expert(config, num_places):
    check(config, sample_programs.round_trip, inputs_of(config, num_places))


@pytest.mark.parametrize("check_vma", [False, True])
def test_by_token(check_vma):
    inputs = inputs_of(CONFIG, rows=CONFIG.max_recv_tokens)
    check(CONFIG, sample_programs.round_trip_tokens, inputs, check_vma=check_vma)


def test_axes_that_are_not_the_first():
    """In and out; the axis of ranks is not there under the vmap."""
    x, topk_idx, weights, y = inputs_of(CONFIG)
    args = x, np.moveaxis(topk_idx, 1, 2), np.moveaxis(weights, 1, 3), np.moveaxis(y, 1, 2)

    def combined(api, *args):
        return sample_programs.round_trip(api, *args)[1]

    check(CONFIG, combined, args, in_axes=(0, 1, 2, -2), out_axes=-1)


@pytest.mark.parametrize("mapped", range(4))
def test_operands_that_are_not_mapped(mapped):
    """One of x, topk_idx, weights and y is mapped. Only y: there is one dispatch for all places."""
    inputs = inputs_of(CONFIG)
    args = [a if number == mapped else a[:, 0] for number, a in enumerate(inputs)]
    axes = tuple(0 if number == mapped else None for number in range(4))
    check(CONFIG, sample_programs.round_trip, args, in_axes=axes)


def combine_of_pairs(api, x, topk_idx, weights, y):
    values, scales = x[:, :5].astype(jnp.float16), x[:, 5:6]
    recv = api.buffer.dispatch((values, scales), topk_idx, weights)
    return recv.x, api.buffer.combine(y, recv.layout)


def test_values_and_scales():
    check(CONFIG, combine_of_pairs, inputs_of(CONFIG))


# ---------------------------------------------------------------------------------------- gradients


def by_tokens(api, x, topk_idx, weights, y):
    recv = api.buffer.dispatch(x, topk_idx, weights, output="tokens")
    return api.buffer.combine(recv.x * recv.topk_weights[:, :1], recv.layout), y


def gradients_of(layer, wrap, api, x, topk_idx, weights, y):
    def outputs(x, weights, y):
        return wrap(functools.partial(layer, api))(x, topk_idx, weights, y)

    out, pullback = jax.vjp(outputs, x, weights, y)
    return out, pullback(out)


def twice_in_scan(fn):
    def layers(x, *args):
        def step(x, _):
            out, doubled = fn(x, *args)
            return out, doubled

        return jax.lax.scan(step, x, length=2)

    return layers


WRAPS = {
    "alone": lambda fn: fn,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": twice_in_scan,
    "scan_of_checkpoint": lambda fn: twice_in_scan(jax.checkpoint(fn)),
}


@pytest.mark.parametrize(
    ("wrap", "check_vma"),
    [
        ("alone", True),
        ("jit", False),
        ("checkpoint", False),
        ("scan", False),
        ("scan_of_checkpoint", True),
    ],
)
def test_of_gradients(wrap, check_vma):
    """The vmap is outside: each place has a backward pass of its own."""
    program = functools.partial(gradients_of, overlapped, WRAPS[wrap])
    check(REPEATED, program, inputs_of(CONFIG), reference=False, check_vma=check_vma)


def test_of_gradients_by_token():
    program = functools.partial(gradients_of, by_tokens, WRAPS["alone"])
    check(CONFIG, program, inputs_of(CONFIG), reference=False)


def gradients_through(over, layer, api, x, topk_idx, weights, matrix):
    """The gradient of a vmap, in which weights and experts are the same at all places."""
    axes = (0, 0, None, None)

    def loss(x, weights, matrix):
        return loss_of(over(functools.partial(layer, api), axes, 0)(x, topk_idx, weights, matrix))

    return jax.value_and_grad(loss, (0, 1, 2))(x, weights, matrix)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layer", "check_vma"), [(LAYERS[0], False), *((layer, True) for layer in LAYERS[1:])]
)
def test_gradients_through(layer, check_vma):
    x, topk_idx, weights, _ = inputs_of(CONFIG)
    matrix = np.random.default_rng(2).normal(size=(CONFIG.ep_size, 7, 7)).astype(np.float32)
    args = x, topk_idx, weights[:, 0], matrix
    mesh = support.mesh_of(CONFIG.ep_size)
    results = [
        support.on_ranks(
            functools.partial(gradients_through, over, layer, api), mesh, check_vma=check_vma
        )(*args)
        for api in support.apis(CONFIG)
        for over in (jax.vmap, in_a_loop)
    ]
    for want in results[1:]:
        support.assert_close(results[0], want, 1e-4)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(results[0]))


# ----------------------------------------------------------------------------------------- how many


def nested(fn, over):
    return over(over(fn, 0, 0), 0, 0)


def test_nested():
    config = dataclasses.replace(CONFIG, num_slots=4)
    args = [a.reshape(a.shape[0], 2, 2, *a.shape[2:]) for a in inputs_of(config, 4)]
    mesh = support.mesh_of(config.ep_size)
    program = functools.partial(sample_programs.round_trip, support.apis(config)[0])
    got, want = (
        support.on_ranks(nested(program, over), mesh)(*args) for over in (jax.vmap, in_a_loop)
    )
    assert_same_bits(got, want)


def traced(program, args):
    jax.eval_shape(support.unjitted_on_ranks(program, support.mesh_of(CONFIG.ep_size)), *args)


@pytest.mark.parametrize(
    ("num_places", "text"),
    [
        (
            NUM_PLACES + 1,
            r"^dispatch_send: expected jax.vmap over 1 to 3 places \(num_slots\), got 4: .* and 4 "
            r"of them .* at once; make .* token axis, or open the buffer with num_slots=4",
        ),
        (65, r"got 65: .* part of the token axis\n"),
        (0, r"over 1 to 3 places \(num_slots\), got 0"),
    ],
)
def test_too_many_places_are_refused(num_places, text):
    program = jax.vmap(functools.partial(sample_programs.round_trip, support.apis(CONFIG)[0]))
    args = [np.repeat(a, num_places, axis=1) for a in inputs_of(CONFIG, 1)]
    with pytest.raises(ValueError, match=text):
        traced(program, args)


def test_too_many_places_of_nested_axes_are_refused():
    program = nested(
        functools.partial(sample_programs.round_trip, support.apis(CONFIG)[0]), jax.vmap
    )
    args = [a.reshape(a.shape[0], 2, 2, *a.shape[2:]) for a in inputs_of(CONFIG, 4)]
    with pytest.raises(ValueError, match=r"got 2 x 2: .* num_slots=4"):
        traced(program, args)


def many_layers(api, x, topk_idx, weights, y):
    """Layers in a row, each of which needs the one before at the same place alone."""
    for _ in range(4):
        x = sample_programs.layer(api, x, topk_idx, weights, y)
    return x


def test_layers_in_a_row():
    """However many: of each place at most one exchange is in flight."""
    inputs, mesh = inputs_of(CONFIG), support.mesh_of(CONFIG.ep_size)
    program = functools.partial(many_layers, support.apis(CONFIG)[0])
    run, loop = (support.on_ranks(over(program, 0, 0), mesh) for over in (jax.vmap, in_a_loop))
    want = loop(*inputs)
    for _ in range(10):
        assert_same_bits(run(*inputs), want)


@pytest.mark.cpu_only
def test_the_schedule_for_gpus():
    """Sends and recvs are paired, in the order of the places, and need no more slots than these."""
    mesh = aot.mesh()
    config = make_config(4, hidden=64, dtype=jnp.bfloat16)
    api = support.Api(support.open_buffer(config, mesh), smf)
    rows = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731

    def program(x, matrix):
        weights, topk_idx = jax.lax.top_k(x[..., :8].astype(jnp.float32), 3)
        layer = functools.partial(overlapped_layer, api)
        loss = lambda x: jax.vmap(layer, (0, 0, 0, None))(x, topk_idx, weights, matrix)  # noqa: E731
        return jax.grad(lambda x: jnp.square(loss(x).astype(jnp.float32)).sum())(x)

    compiled = aot.compile_for(
        mesh, program, (P(None, "ep"), P()), P(None, "ep"), rows(2, 4 * 6, 64), rows(64, 64)
    )
    schedule = smf.inspect(compiled)
    assert set(schedule.counts.values()) == {2}, str(schedule)
    assert not schedule.unmatched, str(schedule)
    assert not schedule.repeated, str(schedule)
    assert not schedule.copied, str(schedule)
    assert schedule.num_slots <= config.num_slots, str(schedule)
