"""Bounds of the sizes of a buffer, and the checks that raise when a size is out of bounds.

This module is the only place in Python that holds a bound. `Config` names the check of each of its
fields. cc/cuda/host/device_buffer.cc repeats the bounds of GPUs as a last guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax_sm_free.config import Config

MAX_TOP_K = 32
MAX_NUM_SLOTS = 64
MAX_TIMEOUT_S = 1e6
# The dtypes of rows, each with its number in C++ (cc/dtype.h).
DTYPES = {"bfloat16": 1, "float16": 2, "float32": 0}

# A kernel serves each rank of the group by one lane of a warp.
MAX_GPU_RANKS = 32
# Routing on a GPU counts rows by expert and by rank, and counts the rows of more than one rank. It
# has one counter for each of these, and at most so many counters.
MAX_GPU_COUNTERS = 512 * 64


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns `value` as an int. Raises TypeError for another type, ValueError out of bounds."""
    bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer {bounds}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {bounds}, got {value}")
    if value > np.iinfo(np.int32).max:
        raise ValueError(f"{name} must fit int32, got {value}")
    return int(value)


def check_dtype(name: str, dtype: Any) -> Any:
    """Returns `dtype` as a NumPy dtype. Raises TypeError unless it is one of `DTYPES`."""
    try:
        checked = None if dtype is None else jnp.dtype(dtype)  # NumPy reads None as float64.
    except TypeError:
        checked = None
    if checked is None or checked.name not in DTYPES:
        got = repr(dtype) if checked is None else checked.name
        raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {got}")
    return checked


def check_seconds(name: str, seconds: Any) -> float:
    """Returns `seconds` as a float. Raises unless it is a number in (0, MAX_TIMEOUT_S]."""
    bounds = f"in (0, {MAX_TIMEOUT_S}]"
    number = isinstance(seconds, (int, float, np.integer, np.floating))
    if isinstance(seconds, bool) or not number:
        raise TypeError(f"{name} must be a number {bounds}, got {seconds!r}")
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ValueError(f"{name} must be {bounds}, got {seconds}")
    return float(seconds)


# What a field of `Config` has as its metadata.
FieldCheck = Mapping[str, Callable[[str, Any], Any]]


def checked_by(check: Callable[[str, Any], Any]) -> FieldCheck:
    """Metadata of a field whose value is what `check(name, value)` returns."""
    return {"check": check}


def int_in(low: int, high: int | None = None) -> FieldCheck:
    """Metadata of a field that is an int from `low` to `high`."""
    return checked_by(functools.partial(check_int, low=low, high=high))


def int_or_none(low: int) -> FieldCheck:
    """Metadata of a field that is None or an int of at least `low`."""
    return checked_by(lambda name, value: None if value is None else check_int(name, value, low))


def check_gpus(config: Config) -> None:
    """Raises ValueError where the kernels for GPUs do not support the sizes of `config`."""
    if config.ep_size > MAX_GPU_RANKS:
        raise ValueError(f"ep_size must be at most {MAX_GPU_RANKS} on GPUs, got {config.ep_size}")
    most = MAX_GPU_COUNTERS - config.ep_size - 1
    if config.num_experts > most:
        raise ValueError(
            f"num_experts must be at most {most} on GPUs with ep_size={config.ep_size}, got "
            f"{config.num_experts}"
        )
