"""The programs that are timed on GPUs: loops of one operation, in which a launch weighs little.

A step depends on the one before it through a scalar, and that on all that the step computed.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

Name = TypeVar("Name")
Step = Callable[..., Any]  # (carry, *args) -> what is computed, a pytree


def after(value: Any, carry: Array) -> Any:
    """`value`, which XLA cannot have before `carry`."""
    return lax.optimization_barrier((value, carry))[0]


def loop(step: Step, length: int) -> Callable[..., Array]:
    """Per rank: `length` steps in a row; returns f32 [1]. Every step computes all its results."""

    def touch(results: Any) -> Array:
        leaves = [leaf for leaf in jax.tree.leaves(results) if leaf.size]
        held = lax.optimization_barrier(leaves)
        return sum((leaf.reshape(-1)[0].astype(jnp.float32) for leaf in held), jnp.float32(0))

    def run(*args: Any) -> Array:
        def body(carry: Array, _: None) -> tuple[Array, None]:
            return touch(step(carry, *args)), None

        return lax.scan(body, jnp.float32(0), None, length=length)[0][None]

    return run


def multiply(a: Array, b: Array, count: int) -> Array:
    """Multiplies a by b `count` times."""
    for _ in range(count):
        a = a @ b
    return a


def gemms(count: int) -> Step:
    """`count` products; a [M, H], b [H, H]."""
    return lambda carry, a, b: multiply(after(a, carry), b, count)


def dispatch(one: Any) -> Step:
    return lambda carry, x, topk_idx, weights: one.dispatch(x, after(topk_idx, carry), weights)


def combine(one: Any) -> Step:
    return lambda carry, y, handle, weights: one.combine(y, handle, after(weights, carry))


def chained(fn: Callable[..., Any]) -> Step:
    """`fn` of a step's arguments, the second of which it cannot have before the step before."""
    return lambda carry, first, second, *rest: fn(first, after(second, carry), *rest)


def dispatch_beside_gemms(one: Any, count: int) -> Step:
    """Dispatch with `count` products between send and recv."""

    def step(carry: Array, a: Array, b: Array, x: Array, topk_idx: Array, weights: Array) -> Any:
        a, topk_idx = after((a, topk_idx), carry)
        product = lambda a, b: multiply(a, b, count)  # noqa: E731
        return one.dispatch_beside(product, (a, b), x, topk_idx, weights)

    return step


def combine_beside_gemms(one: Any, count: int) -> Step:
    """Combine with `count` products between send and recv."""

    def step(carry: Array, a: Array, b: Array, y: Array, handle: Any, weights: Array) -> Any:
        a, weights = after((a, weights), carry)
        product = lambda a, b: multiply(a, b, count)  # noqa: E731
        return one.combine_beside(product, (a, b), y, handle, weights)

    return step


def compile_all(programs: Mapping[Name, tuple[Any, tuple]]) -> dict[Name, Any]:
    """Compiles jitted functions for their arguments, all at once.

    Products that are in several of them should have been compiled before: XLA would try for each
    program on its own which implementation is fastest, and need not choose the same one.

    Args:
      programs: by name, (jitted function, arguments).

    Returns:
      By name, a function without arguments that runs the program and waits for it, or the
      exception that compiling raised.
    """
    lowered = {name: fn.lower(*args) for name, (fn, args) in programs.items()}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pending = {name: pool.submit(program.compile) for name, program in lowered.items()}
    return {
        name: future.exception() or _runner(future.result(), programs[name][1])
        for name, future in pending.items()
    }


def compile_one(fn: Any, args: tuple) -> Callable[[], Any]:
    """The same for one jitted function; raises what compiling raises."""
    return _runner(fn.lower(*args).compile(), args)


def _runner(program: Any, args: tuple) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(program(*args))
