"""A pytest plugin: the tests of one process, run by every process of a group.

Each process runs the same tests in the same order. Meshes have devices of all processes, one's in
turn with another's, and results are gathered, so that a test sees what it sees in one process.
Tests that are not about results of whole programs are not for this; those that are marked
`one_process` are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faulty_runs
import jax
import numpy as np
import pytest
import support
from jax.experimental import multihost_utils

from processes import together

_on_ranks = support.on_ranks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that are marked `one_process`."""
    left_out = [item for item in items if item.get_closest_marker("one_process")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


class Gathered:
    """A jitted function of this mesh whose results are whole NumPy arrays in every process."""

    def __init__(self, ungathered: Callable[..., Any], mesh: jax.sharding.Mesh) -> None:
        self._ungathered = ungathered
        self._mesh = mesh
        self._has_begun = False

    def __call__(self, *args: Any) -> Any:
        if support.ON_CPU:  # On CPU a run that fails raises in every process.
            return whole(self.begin(*args))
        out, error = None, None
        try:
            out = jax.block_until_ready(self.begin(*args))
        except faulty_runs.RUN_ERROR as raised:
            error = str(raised)
        # A process that has results would wait for those of a process that has an error.
        for other in together.told_to_all(self._mesh, error):
            if other is not None:
                raise jax.errors.JaxRuntimeError(error or other)
        return whole(out)

    def begin(self, *args: Any) -> Any:
        """This process's part of the results. All processes have compiled before the run begins."""
        if not self._has_begun:
            together.compile_and_meet(self._ungathered, self._mesh, *args)
            self._has_begun = True
        return self._ungathered(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ungathered, name)


def whole(results: Any) -> Any:
    return jax.tree.map(gather, results)


def gather(array: jax.Array) -> np.ndarray:
    """The whole array, gathered as integers, because XLA changes NaNs of narrow floats."""
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    return np.asarray(multihost_utils.process_allgather(bits, tiled=True)).view(array.dtype)


def mesh_of(ep_size: int) -> jax.sharding.Mesh:
    """As many devices of each process, one's in turn with another's."""
    by_process = np.array(jax.devices()).reshape(jax.process_count(), -1)
    if ep_size < jax.process_count():
        pytest.skip(f"{ep_size} ranks are too few for {jax.process_count()} processes")
    return jax.sharding.Mesh(by_process.T.reshape(-1)[:ep_size], ("ep",))


def on_ranks(fn: Callable[..., Any], mesh: Any, *args: Any, **kwargs: Any) -> Gathered:
    return Gathered(_on_ranks(fn, mesh, *args, **kwargs), mesh)


def errors_by_rank(buffer: Any, run: Gathered, *args: Any) -> list[str | None]:
    """`faulty_runs.errors_by_rank` of all processes together."""
    here = support.ranks_here(buffer)
    try:
        out = run.begin(*args)
        errors = {rank: faulty_runs.error_of_rank(buffer, out, rank) for rank in here}
    except faulty_runs.RUN_ERROR as error:
        errors = dict.fromkeys(here, str(error))
    all_told = together.told_to_all(buffer.mesh, errors)
    errors = {rank: error for told in all_told for rank, error in told.items()}
    return [errors[rank] for rank in sorted(errors)]


support.BUFFERS_GO_ON = False
support.EP_SIZES = tuple(n for n in support.EP_SIZES if n >= jax.process_count())
support.SOME_RANKS = max(support.SOME_RANKS, jax.process_count())
support.mesh_of = mesh_of
support.on_ranks = on_ranks
support.whole = whole
faulty_runs.errors_by_rank = errors_by_rank
