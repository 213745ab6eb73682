"""`moe`: a whole mixture-of-experts layer over a buffer, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_sm_free.buffer import Buffer
from jax_sm_free.checks import describe
from jax_sm_free.config import Config
from jax_sm_free.schedule import Sent, overlap

Shared = Callable[[Array], Array] | tuple[Callable[[Array], Any], Callable[[Any], Array]]


def moe(
    x: Array,
    topk_idx: Array,
    topk_weights: Array,
    experts: Callable[..., Any],
    buffer: Buffer,
    *,
    shared: Shared | None = None,
    has_aux: bool = False,
    apply_weights: bool = True,
) -> Any:
    """Dispatches tokens, runs the experts, combines their results. Collective.

    Runs inside `jax.shard_map`, as the ops of `Buffer` do, and has gradients to `x`,
    `topk_weights`, and all that `experts` and `shared` close over.

        weights, topk_idx = jax.lax.top_k(jax.nn.softmax(x @ router), top_k)

        def experts(recv):
            h = jax.nn.silu(smf.grouped_matmul(recv.x, up, recv))
            return smf.grouped_matmul(h, down, recv)

        out = smf.moe(x, topk_idx, weights, experts, buffer, shared=lambda x: mlp(x, shared_params))

    Args:
      x: [..., hidden] of the buffer's dtype; all leading dimensions together are at most
        `max_tokens` tokens.
      topk_idx: of an integer dtype, [..., top_k], in [-1, num_experts); -1 selects none.
      topk_weights: of a float dtype, [..., top_k]; they travel and multiply as float32.
      experts: a function of a `Received`, which returns [recv_capacity, hidden] of the buffer's
        dtype, rows as in `Received.x`. `Received.expert` has each row's expert.
      buffer: who exchanges.
      shared: compute that every token gets, added to the result. A function of `x` to [..., hidden]
        runs while the dispatch travels. A pair (first, second) runs first(x) while the dispatch
        travels, and second(first(x)), which is added, while the combine travels. What they close
        over is placed with them, in the backward pass, too.
      apply_weights: whether combine multiplies rows by their weights. With False `experts` has done
        so itself, times `recv.weights`: before its last product, where rows are narrow, that costs
        less, and the backward pass need not keep what `experts` returns.
      has_aux: whether `experts` returns (rows, aux), for example to report `recv.dropped`.

    Returns:
      [..., hidden]: for each token the sum of weight * row over its experts, plus what `shared`
      returns; with `has_aux` a pair of that and the `aux` of `experts`.

    Raises:
      TypeError, ValueError: at trace time, for a dtype or a shape other than these.
    """
    _check(x, topk_idx, topk_weights, buffer)
    before, after = shared if isinstance(shared, tuple) else (shared, None)
    hidden, top_k = buffer.config.hidden, buffer.config.top_k
    sent = buffer.dispatch_send(
        x.reshape(-1, hidden),
        topk_idx.reshape(-1, top_k).astype(jnp.int32),
        topk_weights.reshape(-1, top_k).astype(jnp.float32),
    )
    of_all, sent = _beside(sent, before, x)
    recv = buffer.dispatch_recv(sent)
    y, aux = experts(recv) if has_aux else (experts(recv), None)
    sent = buffer.combine_send(y, recv.layout, recv.weights if apply_weights else None)
    if after is not None:
        of_all, sent = _beside(sent, after, of_all)
    out = buffer.combine_recv(sent).reshape(x.shape)
    if shared is not None:
        if jnp.shape(of_all) != x.shape:
            raise ValueError(
                f"moe: expected shared to return {list(x.shape)}, got {describe(of_all)}"
            )
        out = out + of_all
    return (out, aux) if has_aux else out


def _beside(sent: Sent, fn: Callable[[Any], Any] | None, arg: Any) -> tuple[Any, Sent]:
    """fn(arg) while `sent` travels, with what fn closes over held there as well."""
    if fn is None:
        return None, sent
    closed, consts = jax.closure_convert(fn, arg)
    return overlap(sent, closed, arg, *consts)


def _check(x: Any, topk_idx: Any, topk_weights: Any, buffer: Any) -> None:
    if not isinstance(getattr(buffer, "config", None), Config):
        raise TypeError(f"moe: expected buffer to be a Buffer, got {type(buffer).__name__}")
    hidden, top_k = buffer.config.hidden, buffer.config.top_k
    wants = (
        ("x", x, "of a float dtype", jnp.floating, hidden),
        ("topk_idx", topk_idx, "of an integer dtype", jnp.integer, top_k),
        ("topk_weights", topk_weights, "of a float dtype", jnp.floating, top_k),
    )
    for name, array, kind, parent, columns in wants:
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"moe: expected {name} to be an array, got {describe(array)}")
        if not jnp.issubdtype(array.dtype, parent):
            raise TypeError(f"moe: expected {name} {kind}, got {describe(array)}")
        if not array.shape or array.shape[-1] != columns or array.shape[:-1] != x.shape[:-1]:
            want = [*x.shape[:-1], columns] if name != "x" else f"[..., {columns}]"
            raise ValueError(f"moe: expected {name} {want}, got {describe(array)}")
