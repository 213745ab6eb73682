"""`WholeOps`: `dispatch` and `combine`, each made of its send and its recv."""

from __future__ import annotations

import abc
from typing import Any, Literal, overload

from jax import Array

from jax_sm_free.pending import Hook
from jax_sm_free.results import Layout, Received, ReceivedTokens

Output = Literal["experts", "tokens"]
Rows = Array | tuple[Array, Array]


def check_output(op: str, output: Any) -> None:
    """Raises ValueError unless `output` is one of the forms in which a dispatch is received."""
    if output not in ("experts", "tokens"):
        raise ValueError(f"{op}: expected output 'experts' or 'tokens', got {output!r}")


class WholeOps(abc.ABC):
    """The ops that send and receive in one call, of a class that has the split ops."""

    @abc.abstractmethod
    def dispatch_send(self, x: Rows, topk_idx: Array, topk_weights: Array) -> Any: ...

    @abc.abstractmethod
    def dispatch_forward(self, pending: Any) -> Any: ...

    @abc.abstractmethod
    def dispatch_recv(self, sent: Any, output: Output) -> Received | ReceivedTokens: ...

    @abc.abstractmethod
    def combine_send(self, y: Array, layout: Layout, weights: Array | None = None) -> Any: ...

    @abc.abstractmethod
    def combine_forward(self, pending: Any) -> Any: ...

    @abc.abstractmethod
    def combine_recv(self, sent: Any) -> Array: ...

    @overload
    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        output: Literal["experts"] = "experts",
        return_recv_hook: Literal[False] = False,
    ) -> Received: ...
    @overload
    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        output: Literal["experts"] = "experts",
        *,
        return_recv_hook: Literal[True],
    ) -> Hook[Received]: ...
    @overload
    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        output: Literal["experts"],
        return_recv_hook: Literal[True],
    ) -> Hook[Received]: ...
    @overload
    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        output: Literal["tokens"],
        return_recv_hook: Literal[False] = False,
    ) -> ReceivedTokens: ...
    @overload
    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        output: Literal["tokens"],
        return_recv_hook: Literal[True],
    ) -> Hook[ReceivedTokens]: ...
    @overload
    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        output: Output = "experts",
        return_recv_hook: bool = False,
    ) -> Received | ReceivedTokens | Hook[Received] | Hook[ReceivedTokens]: ...

    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        output: Output = "experts",
        return_recv_hook: bool = False,
    ) -> Received | ReceivedTokens | Hook[Received] | Hook[ReceivedTokens]:
        """`dispatch_send`, `dispatch_forward` and `dispatch_recv` in one call. Collective.

        Args:
          x: as for `dispatch_send`.
          topk_idx: as for `dispatch_send`.
          topk_weights: as for `dispatch_send`.
          output: as for `dispatch_recv`.
          return_recv_hook: whether to leave the receive, and the forward, to the caller.

        Returns:
          `Received` for output="experts", `ReceivedTokens` for output="tokens". With
          `return_recv_hook` a `Hook`, which returns that when it is called.
        """
        check_output("dispatch", output)
        sent = self.dispatch_send(x, topk_idx, topk_weights)
        hook: Hook[Any] = Hook(lambda sent: self.dispatch_recv(sent, output), sent)
        return hook if return_recv_hook else hook()

    @overload
    def combine(
        self,
        y: Array,
        layout: Layout,
        weights: Array | None = None,
        return_recv_hook: Literal[False] = False,
    ) -> Array: ...
    @overload
    def combine(
        self,
        y: Array,
        layout: Layout,
        weights: Array | None = None,
        *,
        return_recv_hook: Literal[True],
    ) -> Hook[Array]: ...
    @overload
    def combine(
        self,
        y: Array,
        layout: Layout,
        weights: Array | None,
        return_recv_hook: Literal[True],
    ) -> Hook[Array]: ...
    @overload
    def combine(
        self,
        y: Array,
        layout: Layout,
        weights: Array | None = None,
        return_recv_hook: bool = False,
    ) -> Array | Hook[Array]: ...

    def combine(
        self,
        y: Array,
        layout: Layout,
        weights: Array | None = None,
        return_recv_hook: bool = False,
    ) -> Array | Hook[Array]:
        """`combine_send`, `combine_forward` and `combine_recv` in one call. Collective.

        Args:
          y: as for `combine_send`.
          layout: as for `combine_send`.
          weights: as for `combine_send`.
          return_recv_hook: whether to leave the receive, and the forward, to the caller.

        Returns:
          [T, hidden] of the buffer's dtype. With `return_recv_hook` a `Hook`, which returns that
          when it is called.
        """
        hook = Hook(self.combine_recv, self.combine_send(y, layout, weights))
        return hook if return_recv_hook else hook()
