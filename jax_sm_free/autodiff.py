"""The mirrored VJPs: the gradient of a send is a receive, and of a receive a send.

The gradient of a forward, which lies between the two, is a forward.

The token carries the cotangent, so that the backward pass is split like the forward pass. The
gradient of compute that `overlap` placed between a send and its recv is computed between the
mirrored send and recv.

    forward pass                          backward pass
    dispatch_send         ->  token       dispatch_backward_recv         <-  token
    dispatch_forward  token -> token      dispatch_backward_forward  token <- token
    dispatch_recv         <-  token       dispatch_backward_send         ->  token
    combine_send          ->  token       combine_backward_recv          <-  token
    combine_forward   token -> token      combine_backward_forward   token <- token
    combine_recv          <-  token       combine_backward_send          ->  token

No residual of a send comes out of the send itself, so that dead code elimination drops a send and
its recv together or not at all. A recv of the forward pass also takes the rows that its send had,
because this rank's own rows need not travel. All of the gradient goes through the token.

One residual comes out of a dispatch_forward: node_topk. Each backward pass that needs it also needs
the rows of the layout, which come out of the recv, so that these two stay or go together as well.

The results of a dispatch get a name for the policies of `jax.checkpoint` inside of the rules for
gradients. So the backward pass keeps the arrays that a policy saves by that name.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jax_sm_free import primitives
from jax_sm_free.primitives import BufferRef, RowType

# The name of all that a dispatch has received. With a policy such as
# jax.checkpoint_policies.save_only_these_names(smf.DISPATCHED), `jax.checkpoint` saves it, and the
# backward pass does not dispatch again.
DISPATCHED = "smf_dispatched"
# A second name of the rows, recv.x. A policy can offload the rows to the host's memory, and save
# the rest on the device, which is small and needed first:
#   jax.checkpoint_policies.save_and_offload_only_these_names(
#       names_which_can_be_saved=[smf.DISPATCHED],
#       names_which_can_be_offloaded=[smf.DISPATCHED_ROWS],
#       offload_src="device", offload_dst="pinned_host")
DISPATCHED_ROWS = "smf_dispatched_rows"


def _name(results: tuple[Array, ...]) -> tuple[Array, ...]:
    """Names the results of a dispatch: values and scales of the rows, and all that follows.

    The rows' own name is the outer one. So a policy for DISPATCHED alone saves the rows, and a
    policy that offloads DISPATCHED_ROWS does not also save them.
    """
    values, scales, *rest = (checkpoint_name(result, DISPATCHED) for result in results)
    rows = (checkpoint_name(part, DISPATCHED_ROWS) for part in (values, scales))
    return *rows, *rest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shape:
    """A residual of which the backward pass needs the shape alone.

    Empty arrays are kept in this form, because JAX 0.11.2 crashes where one leaves a shard_map.
    """

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


def _keep(array: Array) -> Array | _Shape:
    return array if array.size else _Shape(array.shape, array.dtype)


def _give_back(kept: Array | _Shape, like: Array) -> Array:
    """The array that was kept, or an empty array that varies over the mesh axes of `like`."""
    if not isinstance(kept, _Shape):
        return kept
    nothing = like.reshape(-1)[:0].reshape(0, *(1 for _ in kept.shape[1:]))
    return jnp.broadcast_to(nothing, (0, *kept.shape[1:])).astype(kept.dtype)


@jax.custom_vjp
def no_gradient(values: Array, scales: Array) -> tuple[Array, Array]:
    """The identity, for quantised rows. Raises TypeError if a program needs their gradient."""
    return values, scales


def _no_gradient_fwd(values: Array, scales: Array) -> Any:
    raise TypeError(
        f"dispatch: expected x without a gradient when it is (values, scales), got a gradient with "
        f"respect to values {values.dtype}{list(values.shape)} or scales; wrap both in "
        "jax.lax.stop_gradient, or dispatch rows of the buffer's dtype"
    )


no_gradient.defvjp(_no_gradient_fwd, lambda _, cts: cts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dispatch_send(
    ref: BufferRef,
    row_type: RowType,
    values: Array,
    scales: Array,
    topk_idx: Array,
    topk_weights: Array,
    position: Array,
) -> Array:
    del row_type
    return primitives.dispatch_send(ref, values, scales, topk_idx, topk_weights, position)


def _dispatch_send_fwd(ref: BufferRef, row_type: RowType, *operands: Array) -> Any:
    del row_type
    topk_idx = operands[2]
    return primitives.dispatch_send(ref, *operands), _keep(topk_idx)


def _dispatch_send_bwd(ref: BufferRef, row_type: RowType, kept: Any, token: Array) -> Any:
    topk_idx = _give_back(kept, token)
    hidden, dtype = _gradient_rows(ref, row_type)
    x_grad, weight_grads = primitives.dispatch_backward_recv(ref, hidden, dtype, token, topk_idx)
    return None if row_type.has_scales else x_grad, None, None, weight_grads, None


dispatch_send.defvjp(_dispatch_send_fwd, _dispatch_send_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch_forward(ref: BufferRef, token: Array) -> tuple[Array, ...]:
    return primitives.dispatch_forward(ref, token)


def _dispatch_forward_fwd(ref: BufferRef, token: Array) -> Any:
    token, node_topk = primitives.dispatch_forward(ref, token)
    node_topk = checkpoint_name(node_topk, DISPATCHED)
    return (token, node_topk), node_topk


def _dispatch_forward_bwd(ref: BufferRef, node_topk: Array, cts: Any) -> Any:
    return (primitives.dispatch_backward_forward(ref, cts[0], node_topk),)


dispatch_forward.defvjp(_dispatch_forward_fwd, _dispatch_forward_bwd)


def _gradient_rows(ref: BufferRef, row_type: RowType) -> tuple[int, Any]:
    """Columns and dtype of the rows that travel back. Quantised rows have 0 columns."""
    return (0 if row_type.has_scales else row_type.columns), ref.config.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dispatch_recv(
    ref: BufferRef, row_type: RowType, token: Array, own_values: Array, own_scales: Array
) -> tuple[Array, ...]:
    return primitives.dispatch_recv(ref, row_type, token, own_values, own_scales)


def _dispatch_recv_fwd(ref: BufferRef, row_type: RowType, *operands: Array) -> Any:
    results = _name(primitives.dispatch_recv(ref, row_type, *operands))
    return results, results[-2:]


def _dispatch_recv_bwd(ref: BufferRef, row_type: RowType, layout: Any, cts: Any) -> Any:
    rows, num_rows_from = layout
    # A row's weight belongs to one (token row, k): hand its gradient back there.
    if cts[4].size:
        weight_grads = cts[4].at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    else:
        weight_grads = 0 * rows.astype(jnp.float32)
    hidden, dtype = _gradient_rows(ref, row_type)
    x_grad = cts[0][:, :hidden].astype(dtype)
    token = primitives.dispatch_backward_send(ref, x_grad, weight_grads, rows, num_rows_from)
    return token, None, None


dispatch_recv.defvjp(_dispatch_recv_fwd, _dispatch_recv_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dispatch_recv_tokens(
    ref: BufferRef, row_type: RowType, token: Array, own_values: Array, own_scales: Array
) -> tuple[Array, ...]:
    return primitives.dispatch_recv_tokens(ref, row_type, token, own_values, own_scales)


def _dispatch_recv_tokens_fwd(ref: BufferRef, row_type: RowType, *operands: Array) -> Any:
    results = _name(primitives.dispatch_recv_tokens(ref, row_type, *operands))
    return results, results[-2:]


def _dispatch_recv_tokens_bwd(ref: BufferRef, row_type: RowType, layout: Any, cts: Any) -> Any:
    hidden, dtype = _gradient_rows(ref, row_type)
    x_grad = cts[0][:, :hidden].astype(dtype)
    return primitives.dispatch_backward_send(ref, x_grad, cts[3], *layout), None, None


dispatch_recv_tokens.defvjp(_dispatch_recv_tokens_fwd, _dispatch_recv_tokens_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine_send(
    ref: BufferRef, y: Array, weights: Array | None, rows: Array, num_rows_from: Array
) -> Array:
    """Without weights it is a plain sum, for whose gradient neither y nor weights are kept."""
    present = no_weights(y) if weights is None else weights
    return primitives.combine_send(ref, y, present, rows, num_rows_from)


def no_weights(y: Array) -> Array:
    """f32 [0], which varies over the mesh axes that y varies over."""
    return y[:0].reshape(-1).astype(jnp.float32)


def _combine_send_fwd(
    ref: BufferRef, y: Array, weights: Array | None, rows: Array, num_rows_from: Array
) -> Any:
    token = combine_send(ref, y, weights, rows, num_rows_from)
    kept = _Shape(y.shape, y.dtype) if weights is None else _keep(y)
    return token, (kept, weights if weights is None else _keep(weights), rows, num_rows_from)


def _combine_send_bwd(ref: BufferRef, residuals: Any, token: Array) -> Any:
    kept, weights, rows, num_rows_from = residuals
    num_rows = kept.shape[0]
    y = _give_back(kept, token)
    present = no_weights(y) if weights is None else _give_back(weights, token)
    y_grad, weight_grads = primitives.combine_backward_recv(
        ref, num_rows, token, y, present, rows, num_rows_from
    )
    return y_grad, None if weights is None else weight_grads, None, None


combine_send.defvjp(_combine_send_fwd, _combine_send_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine_forward(ref: BufferRef, token: Array, node_topk: Array) -> Array:
    return primitives.combine_forward(ref, token, node_topk)


def _combine_forward_fwd(ref: BufferRef, token: Array, node_topk: Array) -> Any:
    return primitives.combine_forward(ref, token, node_topk), node_topk


def _combine_forward_bwd(ref: BufferRef, node_topk: Array, token: Array) -> Any:
    return primitives.combine_backward_forward(ref, token, node_topk), None


combine_forward.defvjp(_combine_forward_fwd, _combine_forward_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine_recv(ref: BufferRef, token: Array, topk_idx: Array, *own_rows: Array) -> Array:
    return primitives.combine_recv(ref, token, topk_idx, *own_rows)


def _combine_recv_fwd(ref: BufferRef, token: Array, topk_idx: Array, *own_rows: Array) -> Any:
    return primitives.combine_recv(ref, token, topk_idx, *own_rows), _keep(topk_idx)


def _combine_recv_bwd(ref: BufferRef, kept: Any, out_grad: Array) -> Any:
    topk_idx = _give_back(kept, out_grad)
    token = primitives.combine_backward_send(ref, out_grad, topk_idx)
    return token, None, None, None, None, None


combine_recv.defvjp(_combine_recv_fwd, _combine_recv_bwd)
