"""The cases: their sizes, their routing, and the capacities that just hold it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

NUM_EXPERTS = 64
TOP_K = 8
SLACK = 1.25  # Capacity over the balanced load.
_ROWS_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One exchange: tokens of each rank, columns, ranks, dtype of the rows."""

    tokens: int
    hidden: int
    ep_size: int
    dtype: str = "bfloat16"

    @property
    def row_bytes(self) -> int:
        return self.hidden * (2 if self.dtype == "bfloat16" else 4)

    def __str__(self) -> str:
        dtype = {"bfloat16": "bf16", "float32": "f32"}[self.dtype]
        return f"{self.tokens} x {self.hidden} EP{self.ep_size} {dtype}"


class Inputs(NamedTuple):
    """Arrays of all ranks, [ep_size * tokens, ...]."""

    x: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray


class Load(NamedTuple):
    """What the routing asks for, over all ranks, and static sizes that hold it.

    Attributes:
      token_rows: (token, rank) pairs; each is one row of a message.
      expert_rows: (token, expert) pairs.
      recv_capacity: expert rows that the fullest rank must hold.
      pair_capacity: token rows that the fullest message, from one rank to another, must hold.
    """

    token_rows: int
    expert_rows: int
    recv_capacity: int
    pair_capacity: int


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random rows; every token names `TOP_K` different experts, all equally likely."""
    rng = np.random.default_rng(seed)
    rows = case.ep_size * case.tokens
    scores = rng.random((rows, NUM_EXPERTS), np.float32)
    topk_idx = np.argpartition(scores, TOP_K, axis=1)[:, :TOP_K].astype(np.int32)
    weights = rng.random((rows, TOP_K), np.float32)
    x = rng.standard_normal((rows, case.hidden), np.float32)
    return Inputs(x, topk_idx, weights / weights.sum(1, keepdims=True))


def measure_load(case: Case, topk_idx: np.ndarray) -> Load:
    """Counts rows; capacities have `SLACK`, or what the fullest needs if that is more."""
    rank = topk_idx // (NUM_EXPERTS // case.ep_size)
    goes_to = (rank[:, :, None] == np.arange(case.ep_size)).any(1)
    by_pair = goes_to.reshape(case.ep_size, case.tokens, case.ep_size).sum(1)
    by_rank = np.bincount(rank.reshape(-1), minlength=case.ep_size)

    def capacity(load: np.ndarray) -> int:
        need = max(SLACK * load.mean(), load.max())
        return int(-(-need // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)

    return Load(
        token_rows=int(goes_to.sum()),
        expert_rows=int(topk_idx.size),
        recv_capacity=capacity(by_rank),
        pair_capacity=min(capacity(by_pair), case.tokens),
    )
