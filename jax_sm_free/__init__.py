"""Expert-parallel dispatch and combine for JAX, split into send and recv so that compute runs between.

The public names; see `Buffer` for the ops and `overlap` for placing compute.
"""

from jax_sm_free.buffer import Buffer, FaultError
from jax_sm_free.config import Config, MemoryEstimate, estimate_memory, get_rdma_size_hint
from jax_sm_free.inspection import Schedule, inspect
from jax_sm_free.results import Layout, Received, ReceivedTokens
from jax_sm_free.schedule import Hook, Sent, overlap
from jax_sm_free.version import __version__

__all__ = [
    "Buffer",
    "Config",
    "FaultError",
    "Hook",
    "Layout",
    "MemoryEstimate",
    "Received",
    "ReceivedTokens",
    "Schedule",
    "Sent",
    "__version__",
    "estimate_memory",
    "get_rdma_size_hint",
    "inspect",
    "overlap",
]
