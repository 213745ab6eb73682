"""Expert-parallel dispatch and combine for JAX, split so that compute runs between send and recv.

What to use for what:

Exchange tokens, inside of `jax.jit` and `jax.shard_map`:

- `Buffer`: one group of ranks that exchange tokens; its methods are the ops.
- `buffer_for`: the open buffer for a mesh and sizes, for layers that are copied or pickled.
- `overlap`: places compute between a send and its recv.
- `Sent`, `Hook`: what a send returns; a receive that the caller still has to call.
- `Received`, `ReceivedTokens`: what a dispatch returns, by expert or by token.
- `Layout`: the part of a `Received` that a combine needs.

Write a layer of experts:

- `moe`: a whole mixture-of-experts layer over a buffer.
- `grouped_matmul`: the product of each row with the weights of its expert.
- `padded_num_experts`, `pad_experts`: experts of padding, where ranks cannot share them evenly.
- `DISPATCHED`, `DISPATCHED_ROWS`: names of what a dispatch received, for `jax.checkpoint`.
- `export_checks`: what `jax.export` needs to be told of our ops.

Choose sizes:

- `Config`: the sizes of a buffer, and what follows from them.
- `estimate_memory`, `MemoryEstimate`: bytes that a buffer takes.
- `get_rdma_size_hint`: bytes that may be on their way through a NIC.

Find out what happens:

- `inspect`: what the compiler made of an overlap, as a `Schedule` of `Step` and `Pair`.
- `Buffer.stats`: `BufferStats` and `RankStats`, what was exchanged and how long ranks waited.
- `FaultError`: what `Buffer.check` raises after an exchange went wrong.
- `reference`: the same ops in plain JAX, slow and simple, to compare with.
- `python -m jax_sm_free.doctor`: whether a machine or a cluster is ready.

`__version__` is the version of the package.
"""

import importlib
from typing import TYPE_CHECKING

from jax_sm_free.autodiff import DISPATCHED, DISPATCHED_ROWS
from jax_sm_free.buffer import Buffer
from jax_sm_free.config import Config
from jax_sm_free.exporting import export_checks
from jax_sm_free.grouped_matmul import grouped_matmul
from jax_sm_free.inspection import inspect
from jax_sm_free.layer import moe
from jax_sm_free.lifetime import FaultError
from jax_sm_free.memory import MemoryEstimate, estimate_memory, get_rdma_size_hint
from jax_sm_free.opening import buffer_for
from jax_sm_free.padding import pad_experts, padded_num_experts
from jax_sm_free.pending import Hook, Sent, overlap
from jax_sm_free.results import Layout, Received, ReceivedTokens
from jax_sm_free.schedule import Pair, Schedule, Step
from jax_sm_free.stats import BufferStats, RankStats
from jax_sm_free.version import __version__

if TYPE_CHECKING:
    from jax_sm_free import reference
else:

    def __getattr__(name: str) -> object:
        """Imports `reference` at its first use: most programs do without it."""
        if name == "reference":
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "DISPATCHED",
    "DISPATCHED_ROWS",
    "Buffer",
    "BufferStats",
    "Config",
    "FaultError",
    "Hook",
    "Layout",
    "MemoryEstimate",
    "Pair",
    "RankStats",
    "Received",
    "ReceivedTokens",
    "Schedule",
    "Sent",
    "Step",
    "__version__",
    "buffer_for",
    "estimate_memory",
    "export_checks",
    "get_rdma_size_hint",
    "grouped_matmul",
    "inspect",
    "moe",
    "overlap",
    "pad_experts",
    "padded_num_experts",
    "reference",
]
