"""Exchanges that are on their way, and placing compute between a send and its recv.

`overlap` puts one barrier before the compute and one behind it:

    token of send ----+                 +---> token ---> recv
                   [barrier] compute [barrier]
    arguments --------+                 +---> results

In two tiers, the forward takes the place of the recv for compute in front of it, and that of the
send for compute behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import jax
from jax import Array

from jax_sm_free.barrier import hold
from jax_sm_free.primitives import RowType

_R = TypeVar("_R")
_T = TypeVar("_T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sent:
    """What a send or a forward returns: an exchange that is on its way. Use it once.

    Hand it to its recv, or first to its forward, and what the forward returns to the recv.

    Attributes:
      token: f32 [8], names the exchange.
      topk_idx: i32 [T, top_k], what this rank dispatched by.
      own_rows: the arrays from which the recv takes this rank's own rows. Of a dispatch they are
        (x,) or (values, scales), and () where the wire quantises. Of a combine they are (y, rows,
        num_rows_from), and the weights behind these if there are any.
      node_topk: i32 [num_nodes * max_tokens, top_k], the `Layout.node_topk` of the dispatch. None
        without a `node_axis`, and in a dispatch that has not been forwarded.
      forwarded: whether it has gone through a forward (static).
      kind: "dispatch" or "combine" (static).
      row_type: of the rows that travel (static).
    """

    token: Array
    topk_idx: Array
    own_rows: tuple[Array, ...]
    kind: str = dataclasses.field(metadata={"static": True})
    row_type: RowType = dataclasses.field(metadata={"static": True})
    node_topk: Array | None = None
    forwarded: bool = dataclasses.field(default=False, metadata={"static": True})


class Hook(Generic[_T]):
    """The receive of a `dispatch` or `combine` that was called with `return_recv_hook=True`.

    Call the hook inside the same `shard_map`. The call receives, and returns what the op would have
    returned without `return_recv_hook`. Collective. `overlap` takes a hook as it takes a sent
    value. Call a hook, or hand it to `overlap`, once.

    Raises:
      RuntimeError: at trace time, on a second use.
    """

    def __init__(self, recv: Callable[[Any], _T], sent: Any) -> None:
        self._recv = recv
        self._sent: Any = sent

    def __call__(self) -> _T:
        return self._recv(self.take())

    def take(self) -> Any:
        """Returns the sent value. The hook is then used up."""
        if self._sent is None:
            raise RuntimeError(
                "jax_sm_free: expected a receive hook to be used once, got a second use"
            )
        sent, self._sent = self._sent, None
        return sent

    def replace(self, sent: Any) -> Hook[_T]:
        """The same receive, of another sent value."""
        return Hook(self._recv, sent)


def forward(pending: Any, fn: Callable[[Any], Any]) -> Any:
    """fn(sent value), in a receive hook if `pending` is one."""
    return pending.replace(fn(pending.take())) if isinstance(pending, Hook) else fn(pending)


@overload
def overlap(pending: Sent, fn: Callable[..., _R], *args: Any) -> tuple[_R, Sent]: ...
@overload
def overlap(pending: Hook[_T], fn: Callable[..., _R], *args: Any) -> tuple[_R, Hook[_T]]: ...


def overlap(pending: Any, fn: Callable[..., _R], *args: Any) -> tuple[_R, Any]:
    """Computes fn(*args) between a send and its recv, in the forward and in the backward pass.

    With a `node_axis` there is a forward between the two, and the compute is before or behind it.
    What `fn` computes from its arguments is held between the two. What `fn` closes over is not held
    there: pass it as an argument. Several calls of `overlap` on one exchange run one after the
    other. Not collective.

    Args:
      pending: what a send or a forward returned, or a receive hook.
      fn: a function of pytrees of arrays to a pytree of arrays.
      *args: the arguments of `fn`.

    Returns:
      (fn(*args), pending). Use this `pending` from here on: the one that was passed in is used up.

    Raises:
      TypeError: if `pending` is neither.
    """
    if isinstance(pending, Hook):
        result, sent = overlap(pending.take(), fn, *args)
        return result, pending.replace(sent)
    if not isinstance(pending, Sent):
        raise TypeError(
            "overlap: expected what a send returned or a receive hook, got "
            f"{type(pending).__name__}"
        )
    args, token = hold(args, pending.token)
    result, token = hold(fn(*args), token)
    return result, dataclasses.replace(pending, token=token)
