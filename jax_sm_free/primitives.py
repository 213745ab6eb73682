"""The custom calls as JAX primitives: their results' types, and their lowering.

The operands have been checked (`sending.py`), and all vary over the same mesh axes. A call has an
HLO side effect, so that XLA neither merges nor hoists it. It has no JAX effect, so that scan, remat
and custom_vjp take it.

XLA:GPU has passes that repeat or remove a call although it has a side effect. An optimization
barrier over all operands, and one for each result, keeps these passes away:

- The dynamic-slice fusion of jaxlib 0.11.1 and 0.11.2 fuses a call with a slice of an operand, or
  with the update that stacks its result in a scan. The original call stays, and runs as well.
- The pipelining of all-gathers, in all versions, copies what feeds an all-gather into the loop's
  iteration before. It then removes the original recv and keeps its send.

The operands share one barrier: with a barrier for each operand, XLA fails a check of its own where
it unrolls a loop or double-buffers it. Each result has its own: one over all results makes XLA
warn at each call.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from jax_sm_free import call_names, mapped_axes
from jax_sm_free.config import Config

TOKEN_SIZE = 8


@dataclasses.dataclass(frozen=True)
class BufferRef:
    """The buffer that a call is for: its sizes, and the name by which the handler finds it."""

    config: Config
    buffer: str
    spans_processes: bool = False


@dataclasses.dataclass(frozen=True)
class RowType:
    """Columns and dtype of rows, in one part or in two."""

    columns: int
    dtype: Any
    scale_columns: int = 0
    scale_dtype: Any = jnp.float32

    @property
    def has_scales(self) -> bool:
        return self.scale_columns > 0

    @property
    def num_bytes(self) -> int:
        scale_bytes = self.scale_columns * jnp.dtype(self.scale_dtype).itemsize
        return self.columns * jnp.dtype(self.dtype).itemsize + scale_bytes


def _result_aval(operand: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A type of `shape` and `dtype` that varies over the same mesh axes as `operand`."""
    sharding = operand.sharding.update(spec=PartitionSpec(*(None for _ in shape)))
    return operand.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def _define(name: str, spans_processes: bool) -> core.Primitive:
    """The primitive of one FFI target.

    Its parameters are the name of its `buffer`, the shapes and dtypes of its `results`, and the two
    that `mapped_axes` needs.
    """
    is_named = spans_processes and name.endswith("_send")
    primitive = core.Primitive(f"smf_{name}")
    primitive.multiple_results = True

    def abstract_eval(*operands: Any, results: tuple[tuple[Any, Any], ...], **_: Any) -> Any:
        return [_result_aval(operands[0], shape, dtype) for shape, dtype in results]

    def lower(ctx: Any, *operands: Any, buffer: str, **_: Any) -> Any:
        rule = jax.ffi.ffi_lowering(f"smf_{name}", has_side_effect=True)
        names = call_names.names_of(name, buffer, ctx) if is_named else {}
        return rule(ctx, *operands, buffer=buffer, **names)

    def lower_for_gpus(ctx: Any, *operands: Any, **params: Any) -> Any:
        held = stablehlo.OptimizationBarrierOp(operands).results
        results = lower(ctx, *held, **params)
        return [stablehlo.OptimizationBarrierOp([result]).result for result in results]

    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(functools.partial(_run_eagerly, primitive))
    # Equal calls of a module share one lowering, but each named send needs a name of its own.
    mlir.register_lowering(primitive, lower, cacheable=not is_named)
    mlir.register_lowering(primitive, lower_for_gpus, platform="cuda", cacheable=not is_named)
    mapped_axes.define(name, primitive)
    return primitive


def _run_eagerly(primitive: core.Primitive, *operands: Any, **params: Any) -> Any:
    return jax.jit(functools.partial(primitive.bind, **params))(*operands)


OP_NAMES = (
    "dispatch_send",
    "dispatch_forward",
    "dispatch_recv",
    "dispatch_recv_tokens",
    "dispatch_backward_send",
    "dispatch_backward_forward",
    "dispatch_backward_recv",
    "combine_send",
    "combine_forward",
    "combine_recv",
    "combine_backward_send",
    "combine_backward_forward",
    "combine_backward_recv",
)
_PRIMITIVES = {(name, spans): _define(name, spans) for name in OP_NAMES for spans in (False, True)}


def _bind(name: str, ref: BufferRef, operands: Any, *results: tuple[Any, Any]) -> tuple[Array, ...]:
    hashable = tuple((tuple(shape), jnp.dtype(dtype)) for shape, dtype in results)
    primitive = _PRIMITIVES[name, ref.spans_processes]
    num_slots = ref.config.num_slots
    return tuple(
        primitive.bind(
            *operands, buffer=ref.buffer, results=hashable, num_slots=num_slots, mapped=()
        )
    )


_TOKEN = ((TOKEN_SIZE,), jnp.float32)


def dispatch_send(
    ref: BufferRef,
    values: Array,  # [T, columns]
    scales: Array,  # [T, scale_columns], 0 columns if there are none
    topk_idx: Array,  # i32 [T, top_k]
    topk_weights: Array,  # f32 [T, top_k]
    position: Array,  # i32 [], this device's place in the mesh
) -> Array:
    operands = (values, scales, topk_idx, topk_weights, position)
    return _bind("dispatch_send", ref, operands, _TOKEN)[0]


def dispatch_forward(ref: BufferRef, token: Array) -> tuple[Array, ...]:
    """The token, and node_topk i32 [num_nodes * max_tokens, top_k]."""
    c = ref.config
    node_topk = ((c.max_node_tokens, c.top_k), jnp.int32)
    return _bind("dispatch_forward", ref, (token,), _TOKEN, node_topk)


def dispatch_recv(
    ref: BufferRef,
    rows: RowType,
    token: Array,
    own_values: Array,  # [T, columns], the rows that were sent; T is 0 where the wire quantises
    own_scales: Array,  # [T, scale_columns]
) -> tuple[Array, ...]:
    """values, scales, group_sizes, counts, weights, dropped, layout rows, layout num_rows_from."""
    c = ref.config
    return _bind(
        "dispatch_recv",
        ref,
        (token, own_values, own_scales),
        ((c.recv_capacity, rows.columns), rows.dtype),
        ((c.recv_capacity, rows.scale_columns), rows.scale_dtype),
        ((c.num_local_experts,), jnp.int32),
        ((c.num_local_experts,), jnp.int32),
        ((c.recv_capacity,), jnp.float32),
        ((), jnp.int32),
        ((c.max_recv_tokens, c.top_k), jnp.int32),
        ((c.ep_size,), jnp.int32),
    )


def dispatch_recv_tokens(
    ref: BufferRef,
    rows: RowType,
    token: Array,
    own_values: Array,  # as for dispatch_recv
    own_scales: Array,
) -> tuple[Array, ...]:
    """values, scales, topk_idx, topk_weights, counts, num_tokens, layout rows, num_rows_from."""
    c = ref.config
    return _bind(
        "dispatch_recv_tokens",
        ref,
        (token, own_values, own_scales),
        ((c.max_recv_tokens, rows.columns), rows.dtype),
        ((c.max_recv_tokens, rows.scale_columns), rows.scale_dtype),
        ((c.max_recv_tokens, c.top_k), jnp.int32),
        ((c.max_recv_tokens, c.top_k), jnp.float32),
        ((c.num_local_experts,), jnp.int32),
        ((), jnp.int32),
        ((c.max_recv_tokens, 1), jnp.int32),
        ((c.ep_size,), jnp.int32),
    )


def dispatch_backward_send(
    ref: BufferRef,
    x_grad: Array,  # [N, hidden]; hidden is 0 where only the weights have a gradient
    weight_grads: Array,  # f32 [R, top_k]
    rows: Array,  # i32 [R, fanout]
    num_rows_from: Array,  # i32 [ep_size]
) -> Array:
    operands = (x_grad, weight_grads, rows, num_rows_from)
    return _bind("dispatch_backward_send", ref, operands, _TOKEN)[0]


def dispatch_backward_forward(ref: BufferRef, token: Array, node_topk: Array) -> Array:
    return _bind("dispatch_backward_forward", ref, (token, node_topk), _TOKEN)[0]


def dispatch_backward_recv(
    ref: BufferRef, hidden: int, dtype: Any, token: Array, topk_idx: Array
) -> tuple[Array, ...]:
    """x_grad [T, hidden], weight_grads f32 [T, top_k]."""
    shape = (topk_idx.shape[0], hidden)
    results = ((shape, dtype), (topk_idx.shape, jnp.float32))
    return _bind("dispatch_backward_recv", ref, (token, topk_idx), *results)


def combine_send(
    ref: BufferRef,
    y: Array,  # [N, hidden]
    weights: Array,  # f32 [N], or [0] for a plain sum
    rows: Array,  # i32 [R, fanout]
    num_rows_from: Array,  # i32 [ep_size]
) -> Array:
    return _bind("combine_send", ref, (y, weights, rows, num_rows_from), _TOKEN)[0]


def combine_forward(
    ref: BufferRef,
    token: Array,
    node_topk: Array,  # as of dispatch_forward
) -> Array:
    return _bind("combine_forward", ref, (token, node_topk), _TOKEN)[0]


def combine_recv(
    ref: BufferRef,
    token: Array,
    topk_idx: Array,  # i32 [T, top_k]
    y: Array,  # this and the rest as for combine_send
    weights: Array,
    rows: Array,
    num_rows_from: Array,
) -> Array:
    """The sum, [T, hidden]."""
    c = ref.config
    operands = (token, topk_idx, y, weights, rows, num_rows_from)
    result = ((topk_idx.shape[0], c.hidden), c.dtype)
    return _bind("combine_recv", ref, operands, result)[0]


def combine_backward_send(ref: BufferRef, out_grad: Array, topk_idx: Array) -> Array:
    return _bind("combine_backward_send", ref, (out_grad, topk_idx), _TOKEN)[0]


def combine_backward_forward(ref: BufferRef, token: Array, node_topk: Array) -> Array:
    return _bind("combine_backward_forward", ref, (token, node_topk), _TOKEN)[0]


def combine_backward_recv(
    ref: BufferRef,
    num_rows: int,
    token: Array,
    y: Array,  # [num_rows, hidden], or [0, hidden] for a plain sum
    weights: Array,  # f32 [num_rows], or [0] for a plain sum
    rows: Array,  # i32 [R, fanout]
    num_rows_from: Array,  # i32 [ep_size]
) -> tuple[Array, ...]:
    """y_grad [num_rows, hidden], weight_grads f32 of the shape of weights."""
    c = ref.config
    operands = (token, y, weights, rows, num_rows_from)
    results = (((num_rows, c.hidden), c.dtype), (weights.shape, jnp.float32))
    return _bind("combine_backward_recv", ref, operands, *results)
