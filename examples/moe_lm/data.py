"""Real text that every machine has: the source of Python's standard library, as bytes."""

from __future__ import annotations

import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

VOCABULARY = 256


def load_bytes() -> np.ndarray:
    """uint8 [N], some megabytes: the modules of the standard library, in order of their names."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise FileNotFoundError("this Python has no source files of its standard library")
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)


def unigram_entropy(text: np.ndarray) -> float:
    """Bits per byte of a model that knows only how often each byte occurs."""
    share = np.bincount(text, minlength=VOCABULARY) / text.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def batches(text: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of int32 [batch, length + 1], in random order.

    Windows do not overlap and come once each before any comes again, so that the training loss
    is the loss on unseen text.
    """
    windows = text[: text.size // (length + 1) * (length + 1)].reshape(-1, length + 1)
    if len(windows) < batch:
        raise ValueError(f"the text has {len(windows)} windows of {length + 1}, fewer than {batch}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(windows))
        for first in range(0, len(order) - batch + 1, batch):
            yield windows[order[first : first + batch]].astype(np.int32)
