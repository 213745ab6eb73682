"""Limits of the system on which UCX would fail without an error. Here they are checked before."""

from __future__ import annotations

import ctypes
import os
import pathlib
import resource

# File descriptors that a wire of UCX takes for itself, and for each peer. Those of a peer are the
# sockets of both ends, on two networks.
_WIRE_DESCRIPTORS, _PEER_DESCRIPTORS = 16, 4
# Shared memory of a wire: its segments for messages, and the queue in front of them.
_SHARED_BYTES = 18 << 20

_IPC_PRIVATE, _IPC_CREAT, _IPC_RMID = 0, 0o1000, 0
_CAP_IPC_LOCK = 14


def check_descriptors(num_peers: int) -> None:
    """Raises if there are too few file descriptors for connections to `num_peers` processes.

    Raises:
      RuntimeError: with the number that is needed, and the number that is free.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    needed = _WIRE_DESCRIPTORS + _PEER_DESCRIPTORS * num_peers
    if limit != resource.RLIM_INFINITY and limit - used < needed:
        raise RuntimeError(
            f"expected {needed} free file descriptors to connect to {num_peers} processes, got "
            f"{limit - used}: {used} are in use, and `ulimit -n` is {limit}"
        )


def why_no_shared_memory() -> str | None:
    """Why processes of this host cannot exchange by System V shared memory; None if they can."""
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(_IPC_PRIVATE, ctypes.c_size_t(_SHARED_BYTES), _IPC_CREAT | 0o600)
    if segment < 0:
        return (
            f"{_SHARED_BYTES >> 20} MiB of System V shared memory cannot be had: "
            f"{os.strerror(ctypes.get_errno())} (kernel.shmmax, shmall and shmmni limit it)"
        )
    libc.shmctl(segment, _IPC_RMID, None)
    return None


def why_little_locked_memory() -> str | None:
    """Why this process may lock too little memory for its RDMA devices; None if that is enough."""
    if not any(pathlib.Path("/sys/class/infiniband").glob("*")):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or _has_capability(_CAP_IPC_LOCK):
        return None
    return f"expected `ulimit -l unlimited` for RDMA, got {limit // 1024} KiB"


def _has_capability(number: int) -> bool:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False
