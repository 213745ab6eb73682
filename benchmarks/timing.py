"""Timing that is fair on a machine that others use too, and memory that is as warm for all."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from time import perf_counter

# M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX of malloc.h, and what keeps pages. One
# arena, because the others unmap a heap as soon as it is empty.
_OPTIONS = (-4, -1, -2, -8)
_KEEP = (0, 2**31 - 1, 2**28, 1)
# More would be above the second of these, and given back.
_MOST_WARM = 3 << 29


def keep_pages() -> None:
    """Lets malloc keep the memory it has instead of giving it back to the system.

    By default glibc returns every large array when it is freed, and the next one pays a page fault
    for each of its pages. That costs more than the exchange itself, most of all in programs with
    many temporary arrays, such as the peer.
    """
    libc = ctypes.CDLL(None)
    for option, value in zip(_OPTIONS, _KEEP, strict=True):
        if not libc.mallopt(option, value):
            raise RuntimeError(f"mallopt({option}, {value}) failed")


def keep_pages_of_programs() -> dict[str, str]:
    """The environment that does the same in a program from its start."""
    names = ("mmap_max", "trim_threshold", "top_pad", "arena_max")
    tunables = (f"glibc.malloc.{name}={value}" for name, value in zip(names, _KEEP, strict=True))
    return {"GLIBC_TUNABLES": ":".join(tunables)}


def warm_heap(num_bytes: int) -> None:
    """Gives malloc `num_bytes` of memory that has its pages, at most 1.5 GiB, beside `keep_pages`.

    Before 2.38, glibc looks for a little more than an aligned array takes, and gives away the rest:
    where one of a size was freed, the next of that size does not fit. So a heap with large arrays
    grows for long, and each of its new pages costs a page fault.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    num_bytes = min(num_bytes, _MOST_WARM)
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(num_bytes)))
    if not block:
        raise MemoryError(f"malloc({num_bytes}) failed")
    ctypes.memset(block, 1, num_bytes)
    libc.free(block)


def race(runners: dict[str, Callable[[], object]], seconds: float, least: int, most: int) -> dict:
    """Runs all in turn, again and again: what disturbs the machine disturbs them alike.

    Args:
      runners: by name; each returns when its work is done.
      seconds: how long to go on.
      least: rounds at least.
      most: rounds at most.

    Returns:
      Seconds of each run, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()
        run()
    start = perf_counter()
    for turn in range(most):
        if turn >= least and perf_counter() - start > seconds:
            break
        for name, run in runners.items():
            begin = perf_counter()
            run()
            times[name].append(perf_counter() - begin)
    return times
