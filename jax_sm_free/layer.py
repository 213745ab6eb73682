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
from jax_sm_free.pending import Sent, overlap

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

    Call it inside `jax.shard_map`, as the ops of `Buffer`. It has gradients with respect to `x`,
    `topk_weights`, and all that `experts` and `shared` close over.

        weights, topk_idx = jax.lax.top_k(jax.nn.softmax(x @ router), top_k)

        def experts(recv):
            h = jax.nn.silu(smf.grouped_matmul(recv.x, up, recv))
            return smf.grouped_matmul(h, down, recv)

        out = smf.moe(x, topk_idx, weights, experts, buffer, shared=lambda x: mlp(x, shared_params))

    Args:
      x: [..., hidden] of the buffer's dtype; all leading dimensions together are at most
        `max_tokens` tokens.
      topk_idx: of an integer dtype, [..., top_k], in [-1, num_experts); -1 selects none. If the
        dtype is not int32, a fault for an index out of range names -2 or num_experts in its place.
      topk_weights: of a float dtype, [..., top_k]; they travel and multiply as float32.
      experts: a function of a `Received`, which returns [recv_capacity, hidden] of the buffer's
        dtype, with rows as in `Received.x`. `Received.expert` has each row's expert.
      buffer: the buffer that exchanges the tokens.
      shared: compute that every token gets, added to the result. A function of `x` to [..., hidden]
        runs while the dispatch travels. Of a pair (first, second), first(x) runs while the dispatch
        travels, and second(first(x)), which is added, runs while the combine travels. With a
        `node_axis`, both run while rows travel between nodes. What these functions close over is
        placed with them, in the backward pass, too.
      apply_weights: whether combine multiplies rows by their weights. With False, `experts` has to
        multiply by `recv.weights` itself. That costs less before its last product, where rows are
        narrow, and the backward pass need not keep what `experts` returns.
      has_aux: whether `experts` returns (rows, aux), for example to report `recv.dropped`.

    Returns:
      [..., hidden]: for each token the sum of weight * row over its experts, plus what `shared`
      returns. The dtype is the buffer's. With `shared` it is the dtype to which JAX promotes the
      buffer's dtype and that of the result of `shared`. With `has_aux` the result is a pair of this
      array and the `aux` of `experts`.

    Raises:
      TypeError, ValueError: at trace time, for a dtype or a shape other than these.
    """
    _check(x, topk_idx, topk_weights, buffer)
    before, after = _halves(shared)
    hidden, top_k = buffer.config.hidden, buffer.config.top_k
    sent = buffer.dispatch_send(
        x.reshape(-1, hidden),
        _as_int32(topk_idx.reshape(-1, top_k), buffer.config.num_experts),
        topk_weights.reshape(-1, top_k).astype(jnp.float32),
    )
    of_all, sent = _beside(sent, before, x)
    recv = buffer.dispatch_recv(sent)
    y, aux = _rows_and_aux(experts(recv), has_aux, buffer.config)
    sent = buffer.combine_send(y, recv.layout, recv.weights if apply_weights else None)
    if after is not None:
        # Between nodes, sums travel behind the forward, and rows of a dispatch before it.
        of_all, sent = _beside(buffer.combine_forward(sent), after, of_all)
    out = buffer.combine_recv(sent).reshape(x.shape)
    if shared is not None:
        if getattr(of_all, "shape", None) != x.shape:
            raise ValueError(
                f"moe: expected shared to return {list(x.shape)}, got {describe(of_all)}"
            )
        out = out + of_all
    return (out, aux) if has_aux else out


def _halves(shared: Any) -> tuple[Any, Any]:
    """The functions that run beside the dispatch and beside the combine; None for no function."""
    if shared is None or callable(shared):
        return shared, None
    if isinstance(shared, tuple) and len(shared) == 2 and all(map(callable, shared)):
        return shared
    got = f"a tuple of {len(shared)}" if isinstance(shared, tuple) else type(shared).__name__
    raise TypeError(
        f"moe: expected shared to be a function, a pair of two functions or None, got {got}"
    )


def _as_int32(topk_idx: Array, num_experts: int) -> Array:
    """The same indices as int32. An index out of int32's range becomes another one out of range."""
    if topk_idx.dtype != jnp.int32:
        info = jnp.iinfo(topk_idx.dtype)
        topk_idx = topk_idx.clip(max(info.min, -2), min(info.max, num_experts))
    return topk_idx.astype(jnp.int32)


def _rows_and_aux(returned: Any, has_aux: bool, config: Config) -> tuple[Array, Any]:
    """Checks what `experts` has returned, and takes it apart: the rows, and `aux` or None."""
    y, aux = returned, None
    if has_aux:
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            got = f"{len(returned)} of them" if isinstance(returned, (tuple, list)) else None
            raise TypeError(
                "moe: expected experts to return a pair (rows, aux), as has_aux says, got "
                f"{got or describe(returned)}"
            )
        y, aux = returned
    shape = config.recv_capacity, config.hidden
    if getattr(y, "shape", None) != shape or y.dtype != config.dtype:
        error = ValueError if getattr(y, "dtype", None) == config.dtype else TypeError
        raise error(
            f"moe: expected experts to return rows {config.dtype.name}{list(shape)}, got "
            f"{describe(y)}"
        )
    return y, aux


def _beside(sent: Sent, fn: Callable[[Any], Any] | None, arg: Any) -> tuple[Any, Sent]:
    """Computes fn(arg) while `sent` travels. What fn closes over is held there as well."""
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
