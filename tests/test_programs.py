"""The programs that people write around a layer: gradients, remat, scan, control flow."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import make_inputs
from support import P, make_config
from trained_layers import (
    LAYERS,
    alone,
    gradients,
    in_checkpoint,
    in_scan,
    in_scan_and_checkpoint,
    layer_that_uses_weights_early,
    loss_of,
    overlapped_layer,
    plain_layer,
)

CONFIG = make_config(num_experts=2 * support.SOME_RANKS, num_slots=4)
CUT = dataclasses.replace(CONFIG, recv_capacity=11, expert_alignment=2)


@pytest.fixture
def inputs():
    """x, topk_idx, topk_weights, and a matrix that stands for the experts, of all ranks."""
    x, topk_idx, weights = make_inputs(CONFIG, seed=1)
    matrix = np.random.default_rng(2).normal(size=(CONFIG.ep_size, 7, 7)).astype(np.float32)
    return x, topk_idx, weights, matrix


# All layers alone, all wraps around the overlapped layer.
CASES = [(alone, layer) for layer in LAYERS]
CASES += [(wrap, overlapped_layer) for wrap in (in_checkpoint, in_scan, in_scan_and_checkpoint)]
CASES += [(in_scan_and_checkpoint, plain_layer)]


@functools.cache
def program_of(wrap, layer):
    return functools.partial(gradients, wrap, layer)


def check_gradients(config, wrap, layer, inputs, **kwargs):
    ours, theirs = support.runners(config, program_of(wrap, layer), **kwargs)
    got = ours(*inputs)
    support.assert_close(got, theirs(*inputs), 1e-4)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(got))
    return got


@pytest.mark.parametrize(("wrap", "layer"), CASES)
def test_gradients(wrap, layer, inputs):
    """value_and_grad for rows, weights and experts; alone, under remat, in scan, and both."""
    check_gradients(CONFIG, wrap, layer, inputs)


@pytest.mark.parametrize("layer", [overlapped_layer, layer_that_uses_weights_early])
def test_gradients_with_dropped_and_padding_rows(layer, inputs):
    check_gradients(CUT, alone, layer, inputs, check_vma=False)


@pytest.mark.one_process
@support.needs_empty_inputs
@pytest.mark.parametrize("check_vma", [False, True])
def test_gradients_where_every_row_is_dropped(check_vma, inputs):
    config = dataclasses.replace(CONFIG, recv_capacity=0)
    for run in support.runners(config, program_of(alone, plain_layer), check_vma=check_vma):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(run(*inputs)))


def test_gradients_with_check_vma(inputs):
    check_gradients(CUT, in_scan_and_checkpoint, overlapped_layer, inputs, check_vma=True)


@pytest.mark.one_process
def test_gradients_of_half_precision(inputs):
    dtype = jnp.bfloat16
    config = dataclasses.replace(CONFIG, dtype=dtype)
    x, topk_idx, weights, matrix = inputs
    inputs = x.astype(dtype), topk_idx, weights, (matrix / 4).astype(dtype)
    ours, theirs = support.runners(config, program_of(alone, overlapped_layer))
    support.assert_close(ours(*inputs), theirs(*inputs), 0.05)


@pytest.mark.one_process
@pytest.mark.skipif(support.MAX_RANKS < 2, reason="one rank drops rows of these tokens")
@pytest.mark.parametrize("layer", [plain_layer, layer_that_uses_weights_early])
def test_a_weight_that_is_zero_has_its_gradient(layer, inputs):
    x, topk_idx, weights, matrix = inputs
    topk_idx = np.abs(topk_idx)
    weights = np.where(np.arange(3) == 1, weights, 0).astype(np.float32)
    _, (_, weight_grads, _) = check_gradients(CONFIG, alone, layer, (x, topk_idx, weights, matrix))
    assert np.asarray(weight_grads)[weights == 0].all()


@pytest.mark.one_process
def test_an_entry_that_goes_nowhere_has_no_gradient(inputs):
    _, (_, weight_grads, _) = check_gradients(CONFIG, alone, plain_layer, inputs)
    assert not np.asarray(weight_grads)[inputs[1] < 0].any()


# --------------------------------------------------------------------------------------- dead code


def unused_recv(api, x, topk_idx, weights, matrix):
    """What was received is unused; what ran beside it is the loss."""
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    shared, sent = api.overlap(sent, lambda x, m: jnp.sin(x @ m), x, matrix)
    api.buffer.dispatch_recv(sent)
    return shared + weights.sum() * 2


def unused_combine(api, x, topk_idx, weights, matrix):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    hook = api.buffer.combine(recv.x, recv.layout, return_recv_hook=True)
    shared, hook = api.overlap(hook, lambda x, m: jnp.sin(x @ m), x, matrix)
    hook()
    return shared + weights.sum() * 2


def unused_layer(api, x, topk_idx, weights, matrix):
    overlapped_layer(api, x, topk_idx, weights, matrix)
    return jnp.sin(x @ matrix) + weights.sum() * 2


def unused_weights(api, x, topk_idx, weights, matrix):
    """Only the rows are used: the weights' gradient is zero, but for the sum."""
    recv = api.buffer.dispatch(x, topk_idx, weights)
    return api.buffer.combine(jnp.tanh(recv.x @ matrix), recv.layout) + weights.sum() * 2


def unused_rows(api, x, topk_idx, weights, matrix):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    return x @ matrix + recv.weights.sum() + (recv.weights**2).sum()


@pytest.mark.one_process
@pytest.mark.parametrize(
    "layer", [unused_recv, unused_combine, unused_layer, unused_weights, unused_rows]
)
@pytest.mark.parametrize("wrap", [alone, in_scan_and_checkpoint])
def test_dead_code(wrap, layer, inputs):
    check_gradients(CONFIG, wrap, layer, inputs)


# -------------------------------------------------------------------------------- replicated values


def replicated_program(api, mesh, x, topk_idx, weights, matrix):
    """x, weights and matrix are the same on every rank, and so need the sum of the gradients."""

    def per_rank(x, topk_idx, weights, matrix):
        out = overlapped_layer(api, x, topk_idx[0], weights, matrix)
        return jax.lax.psum(loss_of(out), "ep")

    run = jax.shard_map(
        per_rank, mesh=mesh, in_specs=(P(), P("ep"), P(), P()), out_specs=P(), check_vma=True
    )
    loss = lambda x, weights, matrix: run(x, topk_idx, weights, matrix)  # noqa: E731
    return jax.value_and_grad(loss, (0, 1, 2))(x, weights, matrix)


def test_gradients_of_replicated_values(inputs):
    x, topk_idx, weights, matrix = inputs
    values = x[0], topk_idx, weights[0], matrix[0]
    mesh = support.mesh_of(CONFIG.ep_size)
    got, want = (
        support.whole(jax.jit(functools.partial(replicated_program, api, mesh))(*values))
        for api in support.apis(CONFIG)
    )
    support.assert_close(got, want, 1e-4)


def all_replicated(api, mesh, *values):
    run = jax.shard_map(
        functools.partial(plain_layer, api), mesh=mesh, in_specs=P(), out_specs=P("ep")
    )
    return run(*values)


def test_everything_replicated(inputs):
    """Even then results differ by rank, which shard_map's types must say."""
    mesh = support.mesh_of(CONFIG.ep_size)
    values = [value[0] for value in inputs]
    got, want = (
        support.whole(jax.jit(functools.partial(all_replicated, api, mesh))(*values))
        for api in support.apis(CONFIG)
    )
    support.assert_close(got, want)


# ------------------------------------------------------------------------------------ control flow


def in_cond(api, flag, *args):
    return jax.lax.cond(flag, functools.partial(overlapped_layer, api), lambda x, *_: x, *args)


@pytest.mark.parametrize("flag", [False, True])
def test_in_a_branch_that_all_ranks_take(flag, inputs):
    flags = np.full(CONFIG.ep_size, flag)
    ours, theirs = support.runners(CONFIG, in_cond)
    support.assert_close(ours(flags, *inputs), theirs(flags, *inputs), 1e-4)


def in_while(api, count, x, *args):
    def step(carry):
        i, x = carry
        return i + 1, jnp.sin(overlapped_layer(api, x, *args))

    return jax.lax.while_loop(lambda carry: carry[0] < count, step, (count * 0, x))[1]


def test_in_a_while_loop(inputs):
    counts = np.full(CONFIG.ep_size, 3, np.int32)
    ours, theirs = support.runners(CONFIG, in_while)
    support.assert_close(ours(counts, *inputs), theirs(counts, *inputs), 1e-3)


# --------------------------------------------------------------------------------------- no tokens


def rows_of_experts(api, x, topk_idx, weights, matrix):
    return api.buffer.dispatch(x, topk_idx, weights).x @ matrix


@support.needs_empty_inputs
def test_rows_that_are_received_of_no_tokens(inputs):
    """They leave the shard_map. XLA compiles none that uses nothing but empty operands."""
    no_tokens = [a[:, :0] for a in inputs[:3]]
    got = support.check_same(CONFIG, rows_of_experts, *no_tokens, inputs[3])
    assert not np.asarray(got).any()


# ------------------------------------------------------------------------------------- two buffers


def two_buffers(one, two, x, topk_idx, weights, matrix):
    """Two layers of other sizes, in flight together."""
    sent = one.buffer.dispatch_send(x, topk_idx, weights)
    narrow = (x[:, :5], topk_idx[:, :2] % 4, weights[:, :2])
    (out, recv), sent = one.overlap(
        sent, lambda x, i, w: _small_layer(two.buffer, x, i, w), *narrow
    )
    a = one.buffer.dispatch_recv(sent)
    y = jnp.tanh(a.x @ matrix)
    return one.buffer.combine(y, a.layout, weights=a.weights), out, recv


def _small_layer(buffer, x, topk_idx, weights):
    recv = buffer.dispatch(x, topk_idx, weights)
    return buffer.combine(recv.x, recv.layout, weights=recv.weights), recv


def test_two_buffers_at_once(inputs):
    small = make_config(hidden=5, num_experts=4, top_k=2)
    mesh = support.mesh_of(CONFIG.ep_size)
    pairs = zip(support.apis(CONFIG), support.apis(small), strict=True)
    got, want = (
        support.on_ranks(functools.partial(two_buffers, *pair), mesh)(*inputs) for pair in pairs
    )
    support.assert_same_bits(got[1:], want[1:])
    support.assert_close(got[0], want[0])
