"""A lower bound: the same bytes moved by memcpy, with a thread on each core."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os

import numpy as np

from benchmarks.cases import Case, Load

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def bytes_moved(case: Case, load: Load) -> int:
    """Bytes that dispatch must read and write; combine, the other way, the same.

    Pack reads the tokens and writes the messages, unpack reads the messages and writes the expert
    rows. Indices, weights and padding rows are left out.
    """
    rows = case.ep_size * case.tokens + 2 * load.token_rows + load.expert_rows
    return rows * case.row_bytes


class Memcpy:
    """Copies half of `moved` bytes: each is read once and written once. All pages are warm."""

    def __init__(self, moved: int) -> None:
        threads = num_cores()
        self._part = -(-moved // 2 // threads)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._arrays = [
            (np.ones(self._part, np.uint8), np.ones(self._part, np.uint8)) for _ in range(threads)
        ]

    def __call__(self) -> None:
        list(self._pool.map(self._copy, self._arrays))

    def _copy(self, arrays: tuple[np.ndarray, np.ndarray]) -> None:
        # A foreign call: Python lets the other threads run.
        dst, src = arrays
        _libc.memcpy(dst.ctypes.data, src.ctypes.data, self._part)

    def close(self) -> None:
        self._pool.shutdown()
