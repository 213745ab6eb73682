"""The libraries NVSHMEM and UCX: whether they are there, and their versions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import jax

from jax_sm_free.doctor.findings import Finding, note, ok, problem
from jax_sm_free.transports import nvshmem, ucx


def check_nvshmem() -> Iterator[Finding]:
    """NVSHMEM, which GPUs of several processes need."""
    try:
        path = nvshmem.library()
    except ImportError:
        needed = jax.default_backend() == "gpu" and jax.process_count() > 1
        yield _missing("NVSHMEM", "nvidia-nvshmem-cu13", needed)
        return
    numbers = [ctypes.c_int() for _ in range(3)]
    ctypes.CDLL(path).nvshmemx_vendor_get_version_info(*map(ctypes.byref, numbers))
    yield ok(f"NVSHMEM {'.'.join(str(n.value) for n in numbers)}, {path}")


def check_ucx() -> Iterator[Finding]:
    """UCX, which CPU devices of several processes need."""
    try:
        path = ucx.library()
    except ImportError:
        needed = jax.default_backend() == "cpu" and jax.process_count() > 1
        yield _missing("UCX", "libucx-cu13", needed)
        return
    # Without this, UCX patches mmap and madvise of the whole process when it is loaded.
    os.environ.setdefault("UCX_MEM_EVENTS", "n")
    version = ctypes.CDLL(path).ucp_get_version_string
    version.restype = ctypes.c_char_p
    yield ok(f"UCX {version().decode()}, {path}")
    if not ucx.has_rdma(path):
        yield note("this UCX was built without RDMA: between hosts it uses TCP")


def _missing(name: str, package: str, needed: bool) -> Finding:
    text = f"no {name} found; pip has it as {package}"
    return problem(f"{text}, and several processes need it") if needed else note(text)
