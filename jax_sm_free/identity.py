"""The name by which a compiled program finds its buffer, so that it runs on no other buffer.

A name holds the sizes from which the program's shapes and its routing follow, and ends in a number:

    axes ep of mesh (dp=2, ep=4), transport in_process, hidden=16, num_experts=8, ... #0

Buffers with equal sizes are numbered in the order in which they open. So a program that was saved,
or exported, finds its buffer in every process that opens equal buffers in the same order. And a
program that was made for a buffer that has been closed does not find a later buffer in its place.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from jax.sharding import Mesh

from jax_sm_free.config import Config

_lock = threading.Lock()
_num_opened: collections.Counter[tuple[str, bool]] = collections.Counter()


def describe(
    name: str | None, mesh: Mesh, axes: tuple[str, ...], transport: str, config: Config
) -> str:
    """The text that equal buffers have in common."""
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    sizes = config.sizes() | {"dtype": config.dtype.name}
    del sizes["timeout_s"]  # A program does not depend on it.
    # Saved programs have this text in them. It calls a wire format what it was called at first, and
    # says nothing of nodes where there is one.
    if config.num_nodes == 1:
        del sizes["num_nodes"], sizes["node_stride"]
    wire = {0: "float8_wire=False", 1: "float8_wire=True"}[int(sizes["wire_format"])]
    facts = [
        *([] if name is None else [f"name {name}"]),
        f"axes {' '.join(axes)} of mesh ({shape})",
        f"transport {transport}",
        *(wire if key == "wire_format" else f"{key}={value}" for key, value in sizes.items()),
    ]
    return ", ".join(facts)


def take_name(description: str, number: int = 0, is_abstract: bool = False) -> str:
    """The name of one more buffer, with the lowest free number from `number` on.

    Buffers of devices that are only described (`is_abstract`) have numbers of their own. A program
    for them runs in another process, on a buffer that is opened there.
    """
    key = description, is_abstract
    with _lock:
        number = max(_num_opened[key], number)
        _num_opened[key] = number + 1
    return f"{description} #{number}"


def agree(
    exchange: Callable[[bytes], list[bytes]], description: str, lowest_free_id: int
) -> tuple[int, str]:
    """An id and a name that no process has used, so that all compile the same program. Collective.

    Args:
      exchange: gives bytes to all processes, and returns the bytes of all.
      description: the text of `describe`, which is the same in all processes.
      lowest_free_id: a number above the ids of all buffers of this process.
    """
    with _lock:
        own = f"{lowest_free_id} {_num_opened[description, False]}"
    of_all = [payload.decode().split() for payload in exchange(own.encode())]
    buffer_id, number = (max(map(int, numbers)) for numbers in zip(*of_all, strict=True))
    return buffer_id, take_name(description, number)
