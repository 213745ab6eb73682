"""Calls that did not come from `Buffer`: handlers check every operand and result by themselves."""

from __future__ import annotations

from typing import Any

import faulty_runs
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P

import jax_sm_free as smf

RANKS, T, H, E, K, C = min(2, support.MAX_RANKS), 4, 5, 6, 3, 11
N, R, LOCAL = C, RANKS * T, E // RANKS
F32, I32 = jnp.float32, jnp.int32
TOKEN = ("token", (8,), F32)
TOPK_IDX = ("topk_idx", (T, K), I32)
ROWS = ("layout.rows", (R, K), I32)
ROWS_FROM = ("layout.num_rows_from", (RANKS,), I32)
Y, WEIGHTS = ("y", (N, H), F32), ("weights", (N,), F32)
OWN = (("own values", (T, H), F32), ("own scales", (T, 0), F32))
BY_TOKEN = (
    ("topk_idx", (R, K), I32),
    ("topk_weights", (R, K), F32),
    ("counts", (LOCAL,), I32),
    ("num_tokens", (), I32),
    ("layout.rows", (R, 1), I32),
    ROWS_FROM,
)
BY_EXPERT = (
    ("group_sizes", (LOCAL,), I32),
    ("counts", (LOCAL,), I32),
    ("weights", (C,), F32),
    ("dropped", (), I32),
    ROWS,
    ROWS_FROM,
)

# Operands and results of each op: name in errors, shape, dtype.
CALLS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "dispatch_send": (
        (
            ("values", (T, H), F32),
            ("scales", (T, 0), F32),
            TOPK_IDX,
            ("topk_weights", (T, K), F32),
            ("position", (), I32),
        ),
        (TOKEN,),
    ),
    "dispatch_recv": (
        (TOKEN, *OWN),
        (("values", (C, H), F32), ("scales", (C, 0), F32), *BY_EXPERT),
    ),
    "dispatch_recv_tokens": (
        (TOKEN, *OWN),
        (("values", (R, H), F32), ("scales", (R, 0), F32), *BY_TOKEN),
    ),
    "combine_send": ((Y, WEIGHTS, ROWS, ROWS_FROM), (TOKEN,)),
    "combine_recv": (
        (TOKEN, TOPK_IDX, Y, WEIGHTS, ROWS, ROWS_FROM),
        (("the result", (T, H), F32),),
    ),
    "combine_backward_send": ((("out_grad", (T, H), F32), TOPK_IDX), (TOKEN,)),
    "combine_backward_recv": (
        (TOKEN, Y, WEIGHTS, ROWS, ROWS_FROM),
        (("y_grad", (N, H), F32), ("weight_grads", (N,), F32)),
    ),
    "dispatch_backward_send": (
        (("x_grad", (N, H), F32), ("weight_grads", (R, K), F32), ROWS, ROWS_FROM),
        (TOKEN,),
    ),
    "dispatch_backward_recv": (
        (TOKEN, TOPK_IDX),
        (("x_grad", (T, H), F32), ("weight_grads", (T, K), F32)),
    ),
}


@pytest.fixture(scope="module")
def buffer() -> smf.Buffer:
    config = support.make_config(
        RANKS, hidden=H, num_experts=E, top_k=K, max_tokens=T, recv_capacity=C
    )
    return support.open_buffer(config)


def run(buffer: smf.Buffer, op: str, operands: Any, results: Any, name: str = "") -> str:
    """The error of one call, with operands of ones and zeros."""
    name = name or buffer._ref.buffer

    def call() -> Any:
        types = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in results]
        function = jax.ffi.ffi_call(f"smf_{op}", types, has_side_effect=True)
        arrays = [jnp.ones(shape, dtype) for _, shape, dtype in operands]
        return [out[None] for out in function(*arrays, buffer=name)]

    spec = P(buffer.mesh.axis_names)
    mapped = jax.shard_map(call, mesh=buffer.mesh, in_specs=(), out_specs=spec, check_vma=False)
    return faulty_runs.error_of(jax.jit(mapped))


def changed(arrays: Any, index: int, change: Any) -> Any:
    name, shape, dtype = arrays[index]
    return (*arrays[:index], (name, *change(shape, dtype)), *arrays[index + 1 :])


def one_more(shape: Any, dtype: Any) -> Any:
    """One row more, or a dimension where there was none."""
    return ((shape[0] + 1, *shape[1:]) if shape else (1,)), dtype


def one_column_more(shape: Any, dtype: Any) -> Any:
    return (*shape[:-1], shape[-1] + 1), dtype


ARRAYS = [
    pytest.param(
        op, side, index, id=f"{op}-{CALLS[op][side][index][0]}-{'in' if side == 0 else 'out'}"
    )
    for op in CALLS
    for side in (0, 1)
    for index in range(len(CALLS[op][side]))
]


@pytest.mark.parametrize(("op", "side", "index"), ARRAYS)
def test_array_of_another_size(buffer: smf.Buffer, op: str, side: int, index: int) -> None:
    call = list(CALLS[op])
    call[side] = changed(call[side], index, one_more)
    text = run(buffer, op, *call)
    # Of two arrays with one size in common, either may be the one that is named.
    names = {array[0] for arrays in CALLS[op] for array in arrays}
    assert "INVALID_ARGUMENT: jax_sm_free: " in text
    assert any(f"expected {name}" in text for name in names), text
    assert ", seen " in text, text


@pytest.mark.parametrize(
    ("op", "side", "index"),
    [
        ("dispatch_send", 0, 2),  # topk_idx
        ("dispatch_recv", 1, 6),  # layout.rows
        ("dispatch_recv_tokens", 1, 6),
        ("combine_send", 0, 2),
        ("combine_recv", 0, 1),
        ("combine_backward_send", 0, 1),
        ("combine_backward_recv", 0, 3),
        ("dispatch_backward_send", 0, 1),
        ("dispatch_backward_recv", 1, 1),
    ],
)
def test_array_of_more_columns(buffer: smf.Buffer, op: str, side: int, index: int) -> None:
    call = list(CALLS[op])
    call[side] = changed(call[side], index, one_column_more)
    text = run(buffer, op, *call)
    assert "INVALID_ARGUMENT: jax_sm_free: " in text
    assert "expected" in text
    assert "columns" in text or "shape" in text, text


@pytest.mark.parametrize("op", ["combine_send", "combine_recv", "combine_backward_recv"])
def test_rows_that_cannot_be_summed(buffer: smf.Buffer, op: str) -> None:
    def with_integers(arrays: Any) -> Any:
        has_rows = lambda shape: len(shape) == 2 and shape[1] == H  # noqa: E731
        return [(name, s, jnp.int16 if has_rows(s) else dtype) for name, s, dtype in arrays]

    text = run(buffer, op, *map(with_integers, CALLS[op]))
    assert "of float32, bfloat16 or float16" in text


def test_more_tokens_than_the_buffer_takes(buffer: smf.Buffer) -> None:
    def with_one_more(array: Any) -> Any:
        name, shape, dtype = array
        return name, (T + 1, *shape[1:]) if shape[:1] == (T,) else shape, dtype

    operands, results = CALLS["dispatch_send"]
    text = run(buffer, "dispatch_send", [*map(with_one_more, operands)], results)
    assert f"expected at most {T} tokens, seen {T + 1}" in text


def test_a_name_that_no_buffer_has(buffer: smf.Buffer) -> None:
    text = run(buffer, "dispatch_send", *CALLS["dispatch_send"], name="axes none #0")
    assert "made for to be open: axes none, seen open buffers:" in text


def test_the_shapes_are_those_of_the_ops(buffer: smf.Buffer) -> None:
    """What `Buffer` calls has the shapes of CALLS, so that these do not grow old."""
    seen: dict[str, Any] = {}

    def note(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name.startswith("smf_") and eqn.primitive.name != "smf_hold":
                sides = (eqn.invars, eqn.outvars)
                seen[eqn.primitive.name.removeprefix("smf_")] = [
                    [(v.aval.shape, v.aval.dtype) for v in side] for side in sides
                ]
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                note(inner)

    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        recv = buffer.dispatch(x, topk_idx, weights)
        tokens = buffer.dispatch(x, topk_idx, weights, output="tokens")
        out = buffer.combine(recv.x * 2, recv.layout, weights=recv.weights)
        return (out**2).sum() + (tokens.x**2).sum()

    step = jax.shard_map(
        lambda *args: jax.grad(layer, (0, 2))(*args),
        mesh=buffer.mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    args = (np.ones((R, H), F32), np.zeros((R, K), I32), np.ones((R, K), F32))
    note(jax.make_jaxpr(step)(*args).jaxpr)
    assert set(seen) == set(CALLS)
    for op, sides in CALLS.items():
        want = [[(shape, jnp.dtype(dtype)) for _, shape, dtype in side] for side in sides]
        assert seen[op] == want, op
