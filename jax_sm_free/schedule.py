"""Placing compute between a send and its recv.

XLA:GPU runs plain custom calls next to each other however they are written in the program. Two
barriers hold them apart: nothing behind a barrier starts before all that goes into it is there.

    token of send ----+                 +---> token ---> recv
                   [barrier] compute [barrier]
    arguments --------+                 +---> results
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import numpy as np
from jax import Array
from jax.extend import core
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from jax_sm_free.primitives import RowType

# An optimization barrier of our own. JAX's has two rules that would break a pair apart: dead code
# elimination keeps all of it for one used output, so that a send would outlive its recv; and it
# turns a cotangent that is absent into zeros, so that a mirrored recv would wait for a send that
# never was.
_hold_p = core.Primitive("smf_hold")
_hold_p.multiple_results = True
_hold_p.def_impl(lambda *operands: list(operands))
_hold_p.def_abstract_eval(lambda *operands: list(operands))


def _hold_lowering(ctx: Any, *operands: Any) -> Any:
    del ctx
    return stablehlo.OptimizationBarrierOp(operands).results


def _hold_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    return _hold_p.bind(*primals), _hold_present(tangents)


def _hold_transpose(cts: Sequence[Any], *_: Any) -> Any:
    return _hold_present(cts)


def _hold_present(values: Sequence[Any]) -> list[Any]:
    """Holds the values that are not symbolic zeros."""
    present = [value for value in values if type(value) is not ad.Zero]
    held = iter(_hold_p.bind(*present) if present else ())
    return [value if type(value) is ad.Zero else next(held) for value in values]


def _hold_batch(operands: Sequence[Any], dims: Sequence[Any]) -> Any:
    return _hold_p.bind(*operands), dims


def _hold_dce(used: Sequence[bool], *rest: Any) -> Any:
    eqn = rest[-1]  # JAX 0.12 passes which inputs are live, too
    if not any(used):
        return [False] * len(used), None
    invars = [var for var, keep in zip(eqn.invars, used, strict=True) if keep]
    outvars = [var for var, keep in zip(eqn.outvars, used, strict=True) if keep]
    return list(used), eqn.replace(invars=invars, outvars=outvars)


mlir.register_lowering(_hold_p, _hold_lowering)
ad.primitive_jvps[_hold_p] = _hold_jvp
ad.primitive_transposes[_hold_p] = _hold_transpose
batching.primitive_batchers[_hold_p] = _hold_batch
pe.dce_rules[_hold_p] = _hold_dce


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sent:
    """What a send returns: an exchange on its way. Hand it to its recv, once.

    Attributes:
      token: f32 [8], names the exchange.
      topk_idx: i32 [T, top_k], what this rank dispatched by.
      own_rows: what the recv takes this rank's own rows from: (x,) or (values, scales) of a
        dispatch, () where the wire quantises; (y, rows, num_rows_from) of a combine, with weights
        behind them if it has any.
      kind: "dispatch" or "combine" (static).
      row_type: of the rows that travel (static).
    """

    token: Array
    topk_idx: Array
    own_rows: tuple[Array, ...]
    kind: str = dataclasses.field(metadata={"static": True})
    row_type: RowType = dataclasses.field(metadata={"static": True})


class Hook:
    """The receive of a `dispatch` or `combine` that was called with `return_recv_hook`.

    Calling it, inside the same `shard_map`, receives and returns what the op would have returned.
    Collective. `overlap` takes it as it takes a sent value. It can be used once, for either.

    Raises:
      RuntimeError: at trace time, on a second use.
    """

    def __init__(self, recv: Callable[[Sent], Any], sent: Sent) -> None:
        self._recv = recv
        self._sent: Sent | None = sent

    def __call__(self) -> Any:
        return self._recv(self.take())

    def take(self) -> Sent:
        """The sent value, which this hook then no longer has."""
        if self._sent is None:
            raise RuntimeError(
                "jax_sm_free: expected a receive hook to be used once, got a second use"
            )
        sent, self._sent = self._sent, None
        return sent

    def replace(self, sent: Sent) -> Hook:
        """The same receive, of another sent value."""
        return Hook(self._recv, sent)


def _hold(tree: Any, token: Array) -> tuple[Any, Array]:
    """Holds the arrays of a pytree together with a token; its other leaves pass."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    *held, token = _hold_p.bind(*(x for x, a in zip(leaves, is_array, strict=True) if a), token)
    arrays = iter(held)
    leaves = [next(arrays) if a else x for x, a in zip(leaves, is_array, strict=True)]
    return jax.tree.unflatten(treedef, leaves), token


@overload
def overlap(pending: Sent, fn: Callable[..., Any], *args: Any) -> tuple[Any, Sent]: ...
@overload
def overlap(pending: Hook, fn: Callable[..., Any], *args: Any) -> tuple[Any, Hook]: ...


def overlap(
    pending: Sent | Hook, fn: Callable[..., Any], *args: Any
) -> tuple[Any, Sent] | tuple[Any, Hook]:
    """Computes fn(*args) between a send and its recv, in the forward and in the backward pass.

    What fn computes from its arguments is held between the two. What it closes over is not: pass it
    as an argument. Several calls on one exchange run one after the other. Not collective.

    Args:
      pending: what a send returned, or a receive hook.
      fn: a function of pytrees of arrays to a pytree of arrays.
      *args: its arguments.

    Returns:
      (fn(*args), pending): go on with this `pending`; the one passed in is used up.

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
    args, token = _hold(args, pending.token)
    result, token = _hold(fn(*args), token)
    return result, dataclasses.replace(pending, token=token)
