"""Processes of a group tell each other something, and begin a program together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax

from jax_sm_free.bootstrap import Bootstrap


def told_to_all(mesh: jax.sharding.Mesh, what: Any) -> list[Any]:
    """A list of what each process of the mesh gave as `what`, the same in all of them."""
    with Bootstrap(mesh) as bootstrap:
        return [pickle.loads(told) for told in bootstrap.exchange(pickle.dumps(what))]


def meet(mesh: jax.sharding.Mesh) -> None:
    """Waits for every process of the mesh."""
    told_to_all(mesh, None)


def compile_and_meet(run: Callable[..., Any], mesh: jax.sharding.Mesh, *args: Any) -> None:
    """Compiles a jitted function and waits until all processes have, so that no run waits."""
    run.lower(*args).compile()
    meet(mesh)
