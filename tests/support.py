"""What the tests share: ranks, sizes, and running a program on the library and on the reference.

A program under test takes an `Api` first, so that it runs on either. Sizes follow the devices that
there are: eight CPU devices, or the GPUs of the machine under JAX_PLATFORMS=cuda.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sm_free as smf
from jax_sm_free import reference
from jax_sm_free.config import Config

P = jax.sharding.PartitionSpec

EP_SIZES = tuple(n for n in (1, 2, 4, 8) if n <= jax.device_count())
MAX_RANKS = EP_SIZES[-1]
# Four ranks: each has a peer that is not its neighbour. All ranks would take longer.
SOME_RANKS = min(4, MAX_RANKS)
ON_CPU = jax.default_backend() == "cpu"
# Whether a buffer can be used again after a fault.
BUFFERS_GO_ON = ON_CPU

# JAX 0.11.2 ends the process while it compiles some programs with such inputs.
needs_empty_inputs = pytest.mark.skipif(
    jax.__version__ == "0.11.2", reason="JAX 0.11.2 crashes on empty inputs of shard_map"
)

NO_TOKENS = pytest.param(0, marks=needs_empty_inputs)


def random_examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings of a hypothesis test of `count` examples; the same ones each time in CI."""
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


# ------------------------------------------------------------------------------------ programs


@dataclasses.dataclass(frozen=True)
class Api:
    """One of the two implementations: the buffer with its ops, and the module's functions."""

    buffer: Any
    module: ModuleType

    def overlap(self, pending: Any, fn: Callable[..., Any], *args: Any) -> Any:
        return self.module.overlap(pending, fn, *args)


def mesh_of(ep_size: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:ep_size]), ("ep",))


def mesh_for(config: Config) -> jax.sharding.Mesh:
    """A mesh in which the position of a device is its rank. Several nodes are the axis "node"."""
    if config.num_nodes == 1:
        return mesh_of(config.ep_size)
    shape = -1, config.num_nodes, config.node_stride
    devices = np.array(jax.devices()[: config.ep_size]).reshape(shape)
    return jax.sharding.Mesh(devices, ("outer", "node", "inner"))


def make_config(ep_size: int = SOME_RANKS, **sizes: Any) -> Config:
    """A configuration of small, odd sizes; `sizes` replaces some of them."""
    defaults = {
        "hidden": 7,
        "num_experts": 8,
        "top_k": 3,
        "max_tokens": 6,
        "dtype": jnp.float32,
        "timeout_s": 60.0 if ON_CPU else 20.0,  # on GPUs nothing but a hang takes long
    }
    return Config(ep_size=ep_size, **(defaults | sizes))


def open_buffer(
    config: Config, mesh: Any = None, axis: Any = None, module: Any = smf, node_axis: Any = None
) -> Any:
    """A buffer of the library, or of the reference, with these sizes."""
    if mesh is None and config.num_nodes > 1:
        mesh = mesh_for(config)
        axis, node_axis = mesh.axis_names, "node"
    mesh = mesh_of(config.ep_size) if mesh is None else mesh
    axis = "ep" if axis is None else axis
    return module.Buffer.from_config(mesh, axis, config, node_axis=node_axis)


def on_ranks(fn: Callable[..., Any], mesh: Any, **kwargs: Any) -> Callable[..., Any]:
    """jit(shard_map(fn)), for arrays with a leading axis of ranks, in and out."""
    return jax.jit(unjitted_on_ranks(fn, mesh, **kwargs))


def unjitted_on_ranks(fn: Callable[..., Any], mesh: Any, **kwargs: Any) -> Callable[..., Any]:
    """The same as `on_ranks` without jit, so that operations run one by one."""

    def per_rank(*args: Any) -> Any:
        out = fn(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    spec = P(mesh.axis_names)
    return jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec, **kwargs)


def ranks_here(buffer: Any) -> list[int]:
    """The ranks of this process, where the mesh has one axis."""
    devices = enumerate(buffer.mesh.devices.flat)
    return [rank for rank, device in devices if device.process_index == jax.process_index()]


def whole(results: Any) -> Any:
    """All parts of the results of a jitted function, also where a process has only its own part."""
    return results


@functools.cache
def apis(config: Config) -> tuple[Api, Api]:
    """The library and the reference, each with one buffer of this configuration for all tests."""
    return Api(open_buffer(config), smf), Api(open_buffer(config, module=reference), reference)


@functools.cache
def runners(config: Config, program: Callable[..., Any], **kwargs: Any) -> tuple[Any, Any]:
    """`program(api, *args)` compiled for the library and for the reference; compiled once."""
    mesh = mesh_for(config)
    ours, theirs = (functools.partial(program, api) for api in apis(config))
    return on_ranks(ours, mesh, **kwargs), on_ranks(theirs, mesh, **kwargs)


def check_same(config: Config, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `program` on both, asserts the same bits, and returns the result."""
    ours, theirs = runners(config, program, **kwargs)
    got = ours(*args)
    assert_same_bits(got, theirs(*args))
    return got


def assert_same_bits(got: Any, want: Any) -> None:
    """Two pytrees: the same structure, dtypes, shapes and bytes. 0.0 is not -0.0."""
    got, want = jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        a, b, name = np.asarray(a), np.asarray(b), jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, (name, a.dtype, b.dtype)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        if a.tobytes() != b.tobytes():
            np.testing.assert_array_equal(a, b, err_msg=f"{name}, got before want")
            raise AssertionError(f"{name} differs in the sign of a zero or in a NaN")


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Two pytrees that are equal but for rounding, relative to the largest value of each array."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32)
        atol = tolerance * np.abs(b).max(initial=1e-3)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol)


def assert_matches(text: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, text), f"expected {pattern!r} in {text!r}"
