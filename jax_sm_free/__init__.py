"""Expert-parallel dispatch and combine for JAX, split so that compute runs between send and recv.

The public names; see `Buffer` for the ops and `overlap` for placing compute.
"""

from jax_sm_free.autodiff import DISPATCHED, DISPATCHED_ROWS
from jax_sm_free.buffer import Buffer
from jax_sm_free.config import Config
from jax_sm_free.exporting import export_checks
from jax_sm_free.grouped_matmul import grouped_matmul
from jax_sm_free.inspection import Pair, Schedule, Step, inspect
from jax_sm_free.layer import moe
from jax_sm_free.lifetime import FaultError
from jax_sm_free.memory import MemoryEstimate, estimate_memory, get_rdma_size_hint
from jax_sm_free.opening import buffer_for
from jax_sm_free.padding import pad_experts, padded_num_experts
from jax_sm_free.pending import Hook, Sent, overlap
from jax_sm_free.results import Layout, Received, ReceivedTokens
from jax_sm_free.stats import BufferStats, RankStats
from jax_sm_free.version import __version__

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
]
