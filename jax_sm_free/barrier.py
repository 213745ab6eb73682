"""`hold`: an optimization barrier that lets dead code and absent gradients through.

XLA:GPU runs plain custom calls next to each other, whatever their order in the program. Two
barriers hold a send and its recv apart, because nothing behind a barrier starts before all that
goes into the barrier is there.

JAX's own barrier has two rules that would break a send and its recv apart. Dead code elimination
keeps the whole barrier for one used output, so that a send would outlive its recv. And JAX turns an
absent cotangent into zeros, so that a mirrored recv would wait for a send that never was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.extend import core
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

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


def hold(tree: Any, token: Array) -> tuple[Any, Array]:
    """Puts one barrier around a token and the arrays of a pytree. Other leaves pass unchanged."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    *held, token = _hold_p.bind(*(x for x, a in zip(leaves, is_array, strict=True) if a), token)
    arrays = iter(held)
    leaves = [next(arrays) if a else x for x, a in zip(leaves, is_array, strict=True)]
    return jax.tree.unflatten(treedef, leaves), token
