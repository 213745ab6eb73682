"""Compiling for GPUs on a machine without one, to read the schedule that XLA makes for them.

tests/targets/ holds descriptions of GPUs, in XLA's own format. A machine that has the GPU prints
its description with anything that compiles:

    XLA_FLAGS=--xla_dump_to=/tmp/dump python -c 'import jax; jax.jit(lambda x: x + 1)(1.0)'
    cp /tmp/dump/*jit__lambda*gpu_target_config.pbtxt tests/targets/<gpu>.txtpb
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

_TARGETS = pathlib.Path(__file__).parent / "targets"
# Numbers that newer versions of XLA print, and that of jaxlib 0.10.2 and before refuses. None of
# them is used for scheduling.
_NEW_FIELDS = re.compile(
    r"^\s*(mem_clock_ghz|reserved_shared_memory_per_block|max_blocks_per_multiprocessor"
    r"|collective_memory_granularity):.*\n",
    re.MULTILINE,
)


def require_gpu_compiler() -> None:
    """Skips the test where XLA's GPU compiler is not installed; in CI that is a failure."""
    if jax.__version__.startswith("0.9."):
        pytest.skip("JAX 0.9 reads no descriptions of GPUs that newer versions wrote")
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
        "jax_plugins.xla_cuda13"
    ):
        return
    reason = "needs jax-cuda13-plugin and jax-cuda13-pjrt of jaxlib's version (pip --no-deps)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def mesh(target: str = "h200", num_gpus: int = 4) -> Mesh:
    """A mesh of GPUs of one host that are not there, with the one axis "ep"."""
    return Mesh(_devices(target, 1, num_gpus), ("ep",))


@functools.cache
def mesh_of_nodes(num_nodes: int = 2, num_gpus: int = 4) -> Mesh:
    """A mesh of GPUs of several hosts that are not there, with the axes "node" and "gpu"."""
    return Mesh(_devices("h200", num_nodes, num_gpus).reshape(num_nodes, -1), ("node", "gpu"))


def _devices(target: str, num_hosts: int, num_gpus: int) -> np.ndarray:
    require_gpu_compiler()
    description = _NEW_FIELDS.sub("", (_TARGETS / f"{target}.txtpb").read_text())
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=description, topology=f"1x{num_hosts}x{num_gpus}"
    )
    return np.array(topology.devices)


def compile_for(
    mesh: Mesh,
    f: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    *args: Any,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles f under shard_map; `args` give global shapes and dtypes only."""

    def place(spec: Any, arg: Any) -> Any:
        def place_one(leaf: Any) -> Any:
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place_one, arg)

    is_spec = lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)  # noqa: E731
    placed = jax.tree.map(place, in_specs, args, is_leaf=is_spec)
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
    return mapped.lower(*placed).compile(compiler_options=options)
