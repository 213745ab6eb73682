"""Saves programs in one process and runs them in another: what tests/test_saved_programs.py starts.

    python saved_programs.py save|load HOW FOLDER BUFFERS [CHANGE]

HOW is "executable" (jax.experimental.serialize_executable) or "export" (jax.export). BUFFERS says
which buffers are opened, in order: "x" and "y" over these axes of the mesh, "n" over x by name, "-"
over x and closed again. CHANGE is a size of the buffers over x. The program dispatches over the
last buffer over x, or over the one by name. Prints its result, or the error, as the last line.
"""

from __future__ import annotations

import ast
import pathlib
import pickle
import sys
from typing import Any

import conftest  # noqa: F401  chooses the devices
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_sm_free as smf

T, H, E = 2, 3, 4
SPEC = P(("x", "y"))


def open_buffers(mesh: Mesh, order: str, **changes: Any) -> tuple[smf.Buffer | None, list[Any]]:
    """The buffer that the program is for, and all."""
    sizes = {"hidden": H, "num_experts": E, "top_k": 1, "max_tokens": T, "dtype": jnp.float32}
    wanted, opened = None, []
    for kind in order:
        axis = "y" if kind == "y" else "x"
        name = "mine" if kind == "n" else None
        change = changes if axis == "x" else {}
        buffer = smf.Buffer(mesh, axis, **(sizes | {"timeout_s": 5.0} | change), name=name)
        opened.append(buffer)
        if kind == "-":
            buffer.close()
        elif kind == "n" or (kind == "x" and "n" not in order):
            wanted = buffer
    return wanted, opened


def inputs(mesh: Mesh) -> list[Any]:
    sharding = NamedSharding(mesh, SPEC)
    size = mesh.size * T
    values = (
        np.arange(size * H, dtype=np.float32).reshape(size, H),
        np.full((size, 1), E - 1, np.int32),  # of the last rank of each group
        np.ones((size, 1), np.float32),
    )
    return [jax.make_array_from_callback(v.shape, sharding, lambda i, v=v: v[i]) for v in values]


def program_of(mesh: Mesh, buffer: smf.Buffer) -> Any:
    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        recv = buffer.dispatch(x, topk_idx, weights)
        return buffer.combine(2 * recv.x, recv.layout, weights=recv.weights), recv.x

    return jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=SPEC, out_specs=SPEC))


def save(how: str, program: Any, args: list[Any]) -> bytes:
    if how == "executable":
        return pickle.dumps(serialize_executable.serialize(program.lower(*args).compile()))
    return export.export(program, disabled_checks=smf.export_checks())(*args).serialize()


def load(how: str, saved: bytes) -> Any:
    if how == "executable":
        return serialize_executable.deserialize_and_load(*pickle.loads(saved))
    return jax.jit(export.deserialize(bytearray(saved)).call)


def run(program: Any, args: list[Any]) -> str:
    try:
        out = jax.block_until_ready(program(*args))
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    shards = [shard.data for leaf in out for shard in leaf.addressable_shards]
    return str([np.asarray(shard).tolist() for shard in shards])


def main(what: str, how: str, folder: str, order: str, *changes: str) -> str:
    """The result of this process's devices, or the error."""
    path = pathlib.Path(folder, f"program.{jax.process_index()}")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, -1), ("x", "y"))  # of two GPUs: (2, 1)
    pairs = [change.split("=") for change in changes]
    changed = {key: ast.literal_eval(value) for key, value in pairs}
    wanted, opened = open_buffers(mesh, order, **changed)
    args = inputs(mesh)
    if what == "save":
        assert wanted is not None
        program = program_of(mesh, wanted)
        path.write_bytes(save(how, program, args))
    else:
        program = load(how, path.read_bytes())
    text = run(program, args)
    for buffer in opened:
        buffer.close()
    return text


if __name__ == "__main__":
    print(main(*sys.argv[1:]), flush=True)
