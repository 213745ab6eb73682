"""A user's program, for a type checker: `test_types.py` runs mypy --strict on it. It never runs."""

from typing import assert_type

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

import jax_sm_free as smf


def square(x: Array) -> Array:
    return x * x


def dispatches(buffer: smf.Buffer, x: Array, idx: Array, weights: Array) -> None:
    assert_type(buffer.dispatch(x, idx, weights), smf.Received)
    assert_type(buffer.dispatch(x, idx, weights, "experts"), smf.Received)
    assert_type(buffer.dispatch((x, x), idx, weights, output="tokens"), smf.ReceivedTokens)
    hook = buffer.dispatch(x, idx, weights, return_recv_hook=True)
    assert_type(hook, smf.Hook[smf.Received])
    assert_type(buffer.dispatch(x, idx, weights, "experts", True), smf.Hook[smf.Received])
    of_tokens = buffer.dispatch(x, idx, weights, output="tokens", return_recv_hook=True)
    assert_type(of_tokens, smf.Hook[smf.ReceivedTokens])
    squared, hook = smf.overlap(hook, square, x)
    assert_type(squared, Array)
    assert_type(hook, smf.Hook[smf.Received])
    assert_type(buffer.dispatch_forward(hook), smf.Hook[smf.Received])
    assert_type(hook(), smf.Received)


def split_dispatch(buffer: smf.Buffer, x: Array, idx: Array, weights: Array) -> None:
    sent = buffer.dispatch_send(x, topk_idx=idx, topk_weights=weights)
    assert_type(sent, smf.Sent)
    squared, sent = smf.overlap(sent, square, x)
    assert_type(squared, Array)
    assert_type(sent, smf.Sent)
    assert_type(buffer.dispatch_forward(sent), smf.Sent)
    assert_type(buffer.dispatch_recv(sent), smf.Received)
    assert_type(buffer.dispatch_recv(sent, "tokens"), smf.ReceivedTokens)
    assert_type(buffer.dispatch_recv(sent, output="tokens"), smf.ReceivedTokens)


def combines(buffer: smf.Buffer, recv: smf.Received) -> None:
    y, layout, weights = jnp.zeros((2, 2)), recv.layout, recv.weights
    assert_type(layout, smf.Layout)
    assert_type(buffer.combine(y, layout), Array)
    assert_type(buffer.combine(y, layout, weights), Array)
    assert_type(buffer.combine(y, layout, weights=weights), Array)
    assert_type(buffer.combine(y, layout, return_recv_hook=True), smf.Hook[Array])
    assert_type(buffer.combine(y, layout, weights, True), smf.Hook[Array])
    assert_type(buffer.combine_send(y, layout, weights=weights), smf.Sent)
    assert_type(buffer.combine_forward(buffer.combine_send(y, layout)), smf.Sent)
    hook = buffer.combine(y, layout, return_recv_hook=True)
    assert_type(buffer.combine_forward(hook), smf.Hook[Array])
    assert_type(buffer.combine_recv(buffer.combine_send(y, layout, weights)), Array)


def opens(mesh: Mesh) -> None:
    sizes = smf.Config(ep_size=2, hidden=8, num_experts=4, top_k=1, max_tokens=2)
    assert_type(smf.Buffer.from_config(mesh, "ep", sizes, transport="auto"), smf.Buffer)
    with smf.Buffer(mesh, "ep", hidden=8, num_experts=4, top_k=1, max_tokens=2) as buffer:
        assert_type(buffer, smf.Buffer)
    assert_type(smf.buffer_for("ep", mesh, hidden=8), smf.Buffer)
    axes = ("node", "gpu")
    assert_type(smf.Buffer.from_config(mesh, axes, sizes, node_axis="node"), smf.Buffer)
    assert_type(smf.buffer_for(axes, mesh, node_axis="node", hidden=8), smf.Buffer)


def runs_on_the_reference(mesh: Mesh, x: Array, idx: Array, weights: Array) -> None:
    buffer = smf.reference.Buffer(mesh, "ep", hidden=8, num_experts=4, top_k=1, max_tokens=2)
    assert_type(buffer.dispatch(x, idx, weights), smf.Received)
    assert_type(buffer.dispatch(x, idx, weights, output="tokens"), smf.ReceivedTokens)
    hook = buffer.dispatch(x, idx, weights, return_recv_hook=True)
    squared, hook = smf.reference.overlap(hook, square, x)
    assert_type(squared, Array)
    assert_type(hook, smf.Hook[smf.Received])
