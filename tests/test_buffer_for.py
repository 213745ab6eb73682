"""Buffers that layers find by their arguments, and modules that hold one."""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import pickle
import subprocess
import sys
import threading
import warnings

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P

import jax_sm_free as smf

SIZES = {"hidden": 8, "num_experts": 16, "top_k": 2, "max_tokens": 5, "dtype": jnp.float32}
needs_two_ranks = pytest.mark.skipif(support.MAX_RANKS == 1, reason="needs two devices")


def mesh(axis="ep", devices=None):
    return jax.sharding.Mesh(np.array(devices or jax.devices()[: support.SOME_RANKS]), (axis,))


def round_trip(x, idx, weights):
    """A layer that knows no mesh, as those of model libraries."""
    buffer = smf.buffer_for("ep", **SIZES)
    recv = buffer.dispatch(x, idx, weights)
    return buffer.combine(recv.x, recv.layout, weights=recv.weights)


def on_ranks(fn):
    return jax.jit(lambda *args: jax.shard_map(fn, in_specs=P("ep"), out_specs=P("ep"))(*args))


def inputs(ranks=support.SOME_RANKS):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5 * ranks, 8)).astype(np.float32)
    idx = np.argsort(rng.random((5 * ranks, 16)), axis=1)[:, :2].astype(np.int32)
    return x, idx, np.ones((5 * ranks, 2), np.float32)


@pytest.mark.cpu_only
@pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two devices")
def test_a_traced_function_is_for_one_mesh_of_a_shape():
    """JAX does not trace it again for other devices: a fault there, and no wrong numbers."""
    sizes = SIZES | {"timeout_s": 5.0, "name": "one mesh of a shape"}

    def of_rank(x, idx, weights):
        return smf.moe(x, idx, weights, lambda recv: recv.x, smf.buffer_for("ep", **sizes))

    run, args = on_ranks(of_rank), inputs(1)
    first, second = (mesh(devices=[device]) for device in jax.devices()[:2])
    with jax.set_mesh(first):
        np.testing.assert_array_equal(run(*args), 2 * args[0])
    with jax.set_mesh(second):
        assert "expected a device of the mesh of buffer" in faulty_runs.error_of(run, *args)


def test_a_layer_finds_its_buffer_while_it_is_traced():
    x, *routing = inputs()
    with jax.set_mesh(mesh()):
        np.testing.assert_array_equal(on_ranks(round_trip)(x, *routing), 2 * x)
        gradient = jax.grad(lambda x: on_ranks(round_trip)(x, *routing).sum())(x)
        np.testing.assert_array_equal(gradient, np.full_like(x, 2))
        buffer = smf.buffer_for("ep", **SIZES)
    buffer.check()
    assert buffer is smf.buffer_for(("ep",), mesh(), **SIZES | {"dtype": "float32", "num_slots": 2})
    assert buffer is smf.buffer_for("ep", mesh(), **SIZES, name=None, transport="auto")
    assert buffer is not smf.buffer_for("ep", mesh(), **SIZES, name="another")
    assert buffer is not smf.buffer_for("ep", mesh(), **SIZES, num_slots=3)
    assert buffer is not smf.buffer_for("other", mesh("other"), **SIZES)


def test_a_mesh_in_a_with_statement_is_in_force():
    with warnings.catch_warnings(action="ignore"), mesh():
        assert smf.buffer_for("ep", **SIZES) is smf.buffer_for("ep", mesh(), **SIZES)


def test_an_abstract_mesh_stands_for_the_mesh_in_force():
    with jax.set_mesh(mesh()):
        abstract = jax.sharding.get_abstract_mesh()
        assert smf.buffer_for("ep", abstract, **SIZES) is smf.buffer_for("ep", mesh(), **SIZES)


def test_the_mesh_is_checked():
    with pytest.raises(ValueError, match=r"mesh with devices in force, got none; .*set_mesh"):
        smf.buffer_for("ep", **SIZES)
    abstract = jax.sharding.AbstractMesh((3,), ("ep",))
    with pytest.raises(ValueError, match=r"got an AbstractMesh \{'ep': 3\} alone, which has no de"):
        smf.buffer_for("ep", abstract, **SIZES)
    with (
        jax.set_mesh(mesh()),
        pytest.raises(ValueError, match=r"of the shape \{'ep': 3\}.* got \{'ep': \d\} in force"),
    ):
        smf.buffer_for("ep", abstract, **SIZES)
    with pytest.raises(ValueError, match=r"axes of the mesh \['ep'\], each once, got 'model'"):
        smf.buffer_for("model", mesh(), **SIZES)
    with pytest.raises(TypeError, match=r"buffer_for: expected hidden, .*, got also colour"):
        smf.buffer_for("ep", mesh(), **SIZES, colour="red")
    with pytest.raises(TypeError, match=r"buffer_for: .*, got none of max_tokens, top_k"):
        smf.buffer_for("ep", mesh(), hidden=8, num_experts=16)
    with pytest.raises(TypeError, match=r"buffer_for: expected name to be a string, got \[1\]"):
        smf.buffer_for("ep", mesh(), **SIZES, name=[1])


@needs_two_ranks
def test_a_program_that_was_traced_for_other_devices_ends_with_an_error():
    """JAX traces a function once for all meshes of one shape, so once for both of these."""
    first, second = (mesh(devices=[device]) for device in jax.devices()[:2])
    run = on_ranks(round_trip)
    x, *routing = inputs(1)
    with jax.set_mesh(first):
        np.testing.assert_array_equal(run(x, *routing), 2 * x)
    with jax.set_mesh(second):
        error = faulty_runs.error_of(run, x, *routing)
    support.assert_matches(error, r"expected a device of the mesh of buffer \d+, seen device")


def test_a_closed_buffer_is_opened_anew():
    first = smf.buffer_for("ep", mesh(), **SIZES, name="closes")
    first.close()
    second = smf.buffer_for("ep", mesh(), **SIZES, name="closes")
    assert first.is_closed
    assert not second.is_closed


def test_threads_that_ask_at_once_get_one_buffer():
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(smf.buffer_for("ep", mesh(), **SIZES, name="of threads"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


# ------------------------------------------------------------------- modules that hold a buffer


@dataclasses.dataclass
class Module:
    buffer: smf.Buffer
    weights: np.ndarray


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_a_module_uses_the_same_buffer(copied):
    for buffer in (
        smf.Buffer(mesh(), "ep", **SIZES),
        smf.buffer_for("ep", mesh(), **SIZES),
    ):
        module = copied(Module(buffer, np.ones(3)))
        assert module.buffer is buffer
        np.testing.assert_array_equal(module.weights, np.ones(3))


def test_a_pickled_buffer_that_was_closed_since_is_opened_by_its_arguments():
    first = smf.Buffer(mesh(), "ep", **SIZES, expert_capacity=3)
    pickled = pickle.dumps(first)
    first.close()
    second, third = pickle.loads(pickled), pickle.loads(pickled)
    assert second is third
    assert not second.is_closed
    assert (second.config, second.axes, second.mesh) == (first.config, first.axes, first.mesh)


# What another process does with a pickled module: runs it.
ELSEWHERE = """
import pickle, sys
import jax
from jax import P
buffer, (x, idx, weights) = pickle.load(open(sys.argv[1], "rb"))

def round_trip(x, idx, weights):
    recv = buffer.dispatch(x, idx, weights)
    return buffer.combine(recv.x, recv.layout, weights=recv.weights)

run = jax.jit(jax.shard_map(round_trip, mesh=buffer.mesh, in_specs=P("ep"), out_specs=P("ep")))
assert (run(x, idx, weights) == 2 * x).all()
print(buffer.axes, buffer.config.hidden, buffer.transport)
"""


@pytest.mark.cpu_only
def test_another_process_opens_a_pickled_buffer(tmp_path):
    buffer = smf.Buffer(mesh(), "ep", **SIZES)
    path = tmp_path / "module.pickle"
    path.write_bytes(pickle.dumps((buffer, inputs())))
    command = [sys.executable, "-c", ELSEWHERE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "('ep',) 8 in_process\n"


def test_a_pickled_buffer_needs_its_devices():
    buffer = smf.Buffer(mesh(), "ep", **SIZES)
    _, (name, where, *rest) = copyreg.dispatch_table[smf.Buffer](buffer)
    platform, _, *shape = where
    with pytest.raises(ValueError, match=r"expected the \w+ devices \[.*\], .* without \[12345\]"):
        smf.opening._find_or_open(name, (platform, (12345,), *shape), *rest)
