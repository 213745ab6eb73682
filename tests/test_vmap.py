"""jax.vmap: one exchange for each place of the mapped axis, bit for bit as in a loop over it."""

from __future__ import annotations

import dataclasses
import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P, assert_same_bits, make_config
from test_programs import LAYERS, loss_of, overlapped_layer

import jax_sm_free as smf

NUM_PLACES = 3
CONFIG = make_config(num_experts=2 * support.SOME_RANKS, num_slots=NUM_PLACES)
# On CPU the dispatch that jax.checkpoint repeats may run beside the first one, at each place.
REPEATED = dataclasses.replace(CONFIG, num_slots=2 * NUM_PLACES)
QUANTISED = dataclasses.replace(CONFIG, wire_dtype=jnp.float8_e4m3fn)
CUT = dataclasses.replace(CONFIG, recv_capacity=11, expert_alignment=2)


def inputs_of(config, num_places=NUM_PLACES, rows=None):
    """x, topk_idx, topk_weights, y, each [ep_size, num_places, ...]."""
    rows = config.recv_capacity if rows is None else rows
    places = [
        (*support.make_inputs(config, seed=seed), support.make_rows(config, rows, 10 + seed))
        for seed in range(num_places)
    ]
    return tuple(np.stack(parts, axis=1) for parts in zip(*places, strict=True))


def in_a_loop(fn, in_axes, out_axes):
    """What jax.vmap of the same arguments promises."""

    def looped(*args):
        axes = (in_axes,) * len(args) if isinstance(in_axes, int) else in_axes
        mapped = [a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None]
        outs = [
            fn(
                *(
                    a if axis is None else jax.lax.index_in_dim(a, place, axis, keepdims=False)
                    for a, axis in zip(args, axes, strict=True)
                )
            )
            for place in range(mapped[0])
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, out_axes), *outs)

    return looped


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
    check(config, support.round_trip, inputs_of(config, num_places))


@pytest.mark.parametrize("check_vma", [False, True])
def test_by_token(check_vma):
    inputs = inputs_of(CONFIG, rows=CONFIG.max_recv_tokens)
    check(CONFIG, support.round_trip_tokens, inputs, check_vma=check_vma)


def test_axes_that_are_not_the_first():
    """In and out; the axis of ranks is not there under the vmap."""
    x, topk_idx, weights, y = inputs_of(CONFIG)
    args = x, np.moveaxis(topk_idx, 1, 2), np.moveaxis(weights, 1, 3), np.moveaxis(y, 1, 2)

    def combined(api, *args):
        return support.round_trip(api, *args)[1]

    check(CONFIG, combined, args, in_axes=(0, 1, 2, -2), out_axes=-1)


@pytest.mark.parametrize("mapped", range(4))
def test_operands_that_are_not_mapped(mapped):
    """One of x, topk_idx, weights and y is mapped. Only y: there is one dispatch for all places."""
    inputs = inputs_of(CONFIG)
    args = [a if number == mapped else a[:, 0] for number, a in enumerate(inputs)]
    axes = tuple(0 if number == mapped else None for number in range(4))
    check(CONFIG, support.round_trip, args, in_axes=axes)


def combine_of_pairs(api, x, topk_idx, weights, y):
    values, scales = x[:, :5].astype(jnp.float16), x[:, 5:6]
    recv = api.buffer.dispatch((values, scales), topk_idx, weights)
    return recv.x, api.buffer.combine(y, recv.layout)


def test_values_and_scales():
    check(CONFIG, combine_of_pairs, inputs_of(CONFIG))


# ---------------------------------------------------------------------------------------- gradients


def overlapped(api, x, topk_idx, weights, y):
    """Nothing but copies and products, so that no rounding depends on how XLA compiles it."""
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    doubled, sent = api.overlap(sent, lambda x: 2 * x, x)
    recv = api.buffer.dispatch_recv(sent)
    sent = api.buffer.combine_send(recv.x * y, recv.layout, recv.weights)
    doubled, sent = api.overlap(sent, lambda x: -x, doubled)
    return api.buffer.combine_recv(sent), doubled


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


# ----------------------------------------------------------------------------- around the shard_map


def on_ep(fn, mesh, check_vma):
    """Over the axis of ranks alone: the same on all ranks along the other axis."""
    specs = {"in_specs": P("ep"), "out_specs": P("ep")}
    return jax.shard_map(fn, mesh=mesh, check_vma=check_vma, **specs)


def stacked(results):
    return jax.tree.map(lambda leaf: leaf[None], results)


def stages_of(num_stages=2):
    """A mesh of stages and ranks, and a configuration for its ranks."""
    devices = np.array(jax.devices()[: support.MAX_RANKS]).reshape(num_stages, -1)
    config = make_config(devices.shape[1], num_experts=support.MAX_RANKS)
    return jax.sharding.Mesh(devices, ("stage", "ep")), config


with_types = pytest.mark.skipif(
    jax.__version__.startswith("0.9."), reason="JAX 0.9 refuses any product there"
)


@pytest.mark.parametrize(
    ("spmd_axis_name", "check_vma"),
    [pytest.param("stage", True, marks=with_types), ("stage", False), (None, True)],
)
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
def test_around_a_shard_map(spmd_axis_name, check_vma):
    """Stages of a pipeline: of two, each rank has one with spmd_axis_name, and both without."""
    mesh, config = stages_of()
    x, topk_idx, weights, y = (np.moveaxis(a, 1, 0) for a in inputs_of(config, 2))

    def gradients(over, api, x, topk_idx, weights, y):
        layer = functools.partial(overlapped, api)
        mapped = on_ep(lambda *args: stacked(layer(*(a[0] for a in args))), mesh, check_vma)
        stages = over(mapped, 0, 0)
        out, pullback = jax.vjp(lambda x, w, y: stages(x, topk_idx, w, y), x, weights, y)
        return out, pullback(out)

    vmap = functools.partial(jax.vmap, spmd_axis_name=spmd_axis_name)
    with support.open_buffer(config, mesh) as buffer:
        api = support.Api(buffer, smf)
        got, want = (
            support.whole(jax.jit(functools.partial(gradients, over, api))(x, topk_idx, weights, y))
            for over in (vmap, in_a_loop)
        )
        jax.block_until_ready(got)
        jax.block_until_ready(want)
        buffer.check()
    # Equal values: the gradient of the loop adds zeros, which turns -0.0 into 0.0.
    jax.tree.map(np.testing.assert_array_equal, got, want)


@with_types
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
def test_around_a_shard_map_of_what_is_the_same_at_all_places():
    """Rows and experts are; the gradient to the experts is the sum over the stages."""
    mesh, config = stages_of()
    x, topk_idx, weights, _ = (np.moveaxis(a, 1, 0) for a in inputs_of(config, 2))
    matrix = np.random.default_rng(2).normal(size=(mesh.shape["ep"], 7, 7)).astype(np.float32)

    def gradients(over, api, weights, matrix):
        layer = functools.partial(overlapped_layer, api)
        mapped = on_ep(lambda *args: stacked(layer(*(a[0] for a in args))), mesh, check_vma=True)
        stages = over(mapped, (None, None, 0, None), 0)
        loss = lambda *args: loss_of(stages(x[0], topk_idx[0], *args))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(weights, matrix)

    vmap = functools.partial(jax.vmap, spmd_axis_name="stage")
    with support.open_buffer(config, mesh) as buffer:
        api = support.Api(buffer, smf)
        got, want = (
            support.whole(jax.jit(functools.partial(gradients, over, api))(weights, matrix))
            for over in (vmap, in_a_loop)
        )
        support.assert_close(got, want, 1e-4)
        buffer.check()


@with_types
@pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices")
@pytest.mark.filterwarnings("ignore:grouped_matmul:UserWarning")
def test_around_a_shard_map_with_grouped_products():
    """Stages with experts of their own: group_sizes go through the products' rule for gradients."""
    mesh, config = stages_of()
    x, topk_idx, weights, _ = (np.moveaxis(a, 1, 0) for a in inputs_of(config, 2))
    shape = (2, config.num_experts, config.hidden, config.hidden)
    matrices = np.random.default_rng(2).normal(size=shape).astype(np.float32)

    def gradients(over, buffer, x, weights, matrices):
        def layer(x, topk_idx, weights, matrices):
            def experts(recv):
                return jnp.sin(smf.grouped_matmul(recv.x, matrices, recv))

            return smf.moe(x[0], topk_idx[0], weights[0], experts, buffer)[None]

        stages = over(on_ep(layer, mesh, check_vma=True), 0, 0)
        loss = lambda x, *rest: loss_of(stages(x, topk_idx, *rest))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 2))(x, weights, matrices)

    vmap = functools.partial(jax.vmap, spmd_axis_name="stage")
    with support.open_buffer(config, mesh) as buffer:
        got, want = (
            support.whole(jax.jit(functools.partial(gradients, over, buffer))(x, weights, matrices))
            for over in (vmap, in_a_loop)
        )
        support.assert_close(got, want, 1e-4)
        buffer.check()


# ----------------------------------------------------------------------------------------- how many


def nested(fn, over):
    return over(over(fn, 0, 0), 0, 0)


def test_nested():
    config = dataclasses.replace(CONFIG, num_slots=4)
    args = [a.reshape(a.shape[0], 2, 2, *a.shape[2:]) for a in inputs_of(config, 4)]
    mesh = support.mesh_of(config.ep_size)
    program = functools.partial(support.round_trip, support.apis(config)[0])
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
    program = jax.vmap(functools.partial(support.round_trip, support.apis(CONFIG)[0]))
    args = [np.repeat(a, num_places, axis=1) for a in inputs_of(CONFIG, 1)]
    with pytest.raises(ValueError, match=text):
        traced(program, args)


def test_too_many_places_of_nested_axes_are_refused():
    program = nested(functools.partial(support.round_trip, support.apis(CONFIG)[0]), jax.vmap)
    args = [a.reshape(a.shape[0], 2, 2, *a.shape[2:]) for a in inputs_of(CONFIG, 4)]
    with pytest.raises(ValueError, match=r"got 2 x 2: .* num_slots=4"):
        traced(program, args)


def many_layers(api, x, topk_idx, weights, y):
    """Layers in a row, each of which needs the one before at the same place alone."""
    for _ in range(4):
        x = support.layer(api, x, topk_idx, weights, y)
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
