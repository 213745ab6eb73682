"""Forwards that did not come from `Buffer`, and sent values that were changed by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from test_hand_made_programs import TOKEN, changed, one_column_more, one_more, run

import jax_sm_free as smf

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(support.MAX_RANKS < 4, reason="needs four devices"),
]

CONFIG = support.make_config(4, num_nodes=2, num_slots=2)
T, K = CONFIG.max_tokens, CONFIG.top_k
F32, I32 = jnp.float32, jnp.int32
NODE_TOPK = ("layout.node_topk", (CONFIG.num_nodes * T, K), I32)
# Operands and results of each op: name in errors, shape, dtype.
CALLS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "dispatch_forward": ((TOKEN,), (TOKEN, NODE_TOPK)),
    "combine_forward": ((TOKEN, NODE_TOPK), (TOKEN,)),
    "combine_backward_forward": ((TOKEN, NODE_TOPK), (TOKEN,)),
    "dispatch_backward_forward": ((TOKEN, NODE_TOPK), (TOKEN,)),
}
ARRAYS = [
    pytest.param(op, side, index, id=f"{op}-{arrays[index][0]}-{'out' if side else 'in'}")
    for op, sides in CALLS.items()
    for side, arrays in enumerate(sides)
    for index in range(len(arrays))
]
of_any_array = pytest.mark.parametrize(("op", "side", "index"), ARRAYS)


@pytest.fixture(scope="module")
def buffer() -> smf.Buffer:
    return support.open_buffer(CONFIG)


def error_of(buffer: smf.Buffer, op: str, side: int, index: int, change: Any) -> str:
    call = list(CALLS[op])
    call[side] = changed(call[side], index, change)
    return run(buffer, op, *call)


@of_any_array
def test_array_of_another_size(buffer: smf.Buffer, op: str, side: int, index: int) -> None:
    text = error_of(buffer, op, side, index, one_more)
    name, shape, _ = CALLS[op][side][index]
    assert f"INVALID_ARGUMENT: jax_sm_free: {op}: expected {name}" in text
    assert str(shape[0]) in text.split("seen")[0], text
    assert str(shape[0] + 1) in text.split("seen")[1], text


@pytest.mark.parametrize("op", CALLS)
def test_routing_of_more_columns(buffer: smf.Buffer, op: str) -> None:
    side = 1 if op == "dispatch_forward" else 0
    text = error_of(buffer, op, side, 1, one_column_more)
    assert f"INVALID_ARGUMENT: jax_sm_free: {op}: expected layout.node_topk" in text


@of_any_array
def test_array_of_another_dtype(buffer: smf.Buffer, op: str, side: int, index: int) -> None:
    other = {F32: I32, I32: F32}
    text = error_of(buffer, op, side, index, lambda shape, dtype: (shape, other[dtype]))
    assert "INVALID_ARGUMENT" in text
    assert "Wrong buffer dtype: expected" in text, text


@pytest.mark.parametrize("op", CALLS)
def test_a_token_that_no_send_returned(buffer: smf.Buffer, op: str) -> None:
    for text in (run(buffer, op, *CALLS[op]), faulty_runs.fault_of(buffer)):
        support.assert_matches(
            text,
            rf"jax_sm_free: {op} on rank \d of node [01]: expected the token of one send, "
            "seen an array that no send returned",
        )


@pytest.mark.parametrize("op", CALLS)
def test_a_forward_in_a_buffer_of_one_tier(op: str) -> None:
    with support.open_buffer(dataclasses.replace(CONFIG, num_nodes=1, node_stride=None)) as flat:
        text = run(flat, op, *CALLS[op])
    assert f"{op}: expected a buffer of several nodes, seen one of a single node" in text


# ------------------------------------------------------------------------- changed sent values


def errors_of_program(buffer: smf.Buffer, program: Any) -> tuple[str, str]:
    """Errors of `program(buffer, x, topk_idx, weights)` and of `check`; then the buffer goes on.

    Either may be the fault of another rank.
    """
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((4, T, CONFIG.hidden)).astype(np.float32),
        rng.integers(0, CONFIG.num_experts, (4, T, K)).astype(np.int32),
        np.ones((4, T, K), np.float32),
    )
    step = support.on_ranks(lambda *args: program(buffer, *args), buffer.mesh)
    texts = faulty_runs.error_of(step, *inputs), faulty_runs.fault_of(buffer)

    def good(*args: Any) -> Any:
        return buffer.dispatch(*args).x

    jax.block_until_ready(support.on_ranks(good, buffer.mesh)(*inputs))
    buffer.check()
    return texts


def received_without_a_forward(buffer: Any, *args: Any) -> Any:
    sent = buffer.dispatch_send(*args)
    node_topk = jnp.zeros((CONFIG.num_nodes * T, K), I32)
    return buffer.dispatch_recv(dataclasses.replace(sent, forwarded=True, node_topk=node_topk)).x


def forwarded_twice(buffer: Any, *args: Any) -> Any:
    sent = buffer.dispatch_forward(buffer.dispatch_send(*args))
    again = dataclasses.replace(sent, forwarded=False, node_topk=None)
    return buffer.dispatch_recv(buffer.dispatch_forward(again)).x


def forwarded_by_another_routing(buffer: Any, *args: Any) -> Any:
    recv = buffer.dispatch(*args)
    layout = dataclasses.replace(recv.layout, node_topk=jnp.full_like(recv.layout.node_topk, -1))
    return buffer.combine(recv.x, layout, weights=recv.weights)


def forwarded_as_no_expert(buffer: Any, *args: Any) -> Any:
    recv = buffer.dispatch(*args)
    layout = dataclasses.replace(recv.layout, node_topk=jnp.full_like(recv.layout.node_topk, 99))
    return buffer.combine(recv.x, layout, weights=recv.weights)


def one_send_too_many(buffer: Any, *args: Any) -> Any:
    sent = [buffer.dispatch_send(*args) for _ in range(CONFIG.num_slots + 1)]
    total = sum(one.token[0] for one in sent)  # all sends come before the first forward
    sent = [dataclasses.replace(one, token=one.token + 0 * total) for one in sent]
    return [buffer.dispatch_recv(one).x for one in sent]


def index_out_of_range(buffer: Any, x: Any, topk_idx: Any, weights: Any) -> Any:
    """On rank 2, the first of the other node."""
    is_there = (jax.lax.axis_index("node") == 1) & (jax.lax.axis_index("inner") == 0)
    return buffer.dispatch(x, jnp.where(is_there, 77, topk_idx), weights).x


PROGRAMS = {
    received_without_a_forward: r"dispatch_recv on rank \d of node [01]: expected the token of a "
    "forward, because the buffer has several nodes, seen exchange .* sent and not forwarded",
    forwarded_twice: r"dispatch_forward on rank \d of node [01]: expected one forward of each "
    "exchange, seen a second one of exchange",
    forwarded_by_another_routing: r"combine_forward on rank \d of node [01], peer rank \d of node "
    r"[01]: expected \d+ rows",
    forwarded_as_no_expert: r"combine_forward on rank \d of node [01]: expected "
    r"layout.node_topk in \[-1, 4\), seen 99 at row \d+, k 0",
    one_send_too_many: r"dispatch_send on rank \d of node [01]: expected at most 2 .*in flight",
    index_out_of_range: r"dispatch_send on rank 2 of node 1: expected topk_idx in \[-1, 8\), "
    "seen 77",
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_changed_program_ends_with_an_error(buffer: smf.Buffer, program: Any) -> None:
    for text in errors_of_program(buffer, program):
        support.assert_matches(text, PROGRAMS[program])
