"""The cases: their sizes, their routing, and the capacities that just hold it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

_ROWS_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One exchange.

    Attributes:
      tokens: of each rank.
      hidden: columns of a row.
      ep_size: ranks.
      dtype: of the rows.
      num_experts: of all ranks.
      top_k: experts that a token names.
      slack: capacity over the balanced load.
      wire_dtype: what rows travel as; None for their own dtype.
    """

    tokens: int
    hidden: int
    ep_size: int
    dtype: str = "bfloat16"
    num_experts: int = 64
    top_k: int = 8
    slack: float = 1.25
    wire_dtype: str | None = None

    @property
    def row_bytes(self) -> int:
        return self.hidden * (2 if self.dtype == "bfloat16" else 4)

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ep_size

    def __str__(self) -> str:
        dtype = {"bfloat16": "bf16", "float32": "f32"}[self.dtype]
        wire = f" {self.wire_dtype} wire" if self.wire_dtype else ""
        return f"{self.tokens} x {self.hidden} EP{self.ep_size} {dtype}{wire}"


class Inputs(NamedTuple):
    """Arrays of all ranks, [ep_size * tokens, ...]."""

    x: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray


class Load(NamedTuple):
    """What the routing asks for, and static sizes that hold it.

    Attributes:
      pairs: [ep_size, ep_size], token rows from each rank (first) to each rank.
      expert_pairs: [ep_size, ep_size], expert rows, of (token, expert) pairs, in the same way.
      recv_capacity: expert rows that the fullest rank must hold.
      pair_capacity: token rows that the fullest message, from one rank to another, must hold.
      expert_capacity: rows that the fullest expert must hold.
    """

    pairs: np.ndarray
    expert_pairs: np.ndarray
    recv_capacity: int
    pair_capacity: int
    expert_capacity: int

    @property
    def token_rows(self) -> int:
        """(token, rank) pairs of all ranks; each is one row of a message."""
        return int(self.pairs.sum())

    @property
    def expert_rows(self) -> int:
        """(token, expert) pairs of all ranks."""
        return int(self.expert_pairs.sum())


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random rows; every token names `top_k` different experts, all equally likely."""
    rng = np.random.default_rng(seed)
    rows = case.ep_size * case.tokens
    scores = rng.random((rows, case.num_experts), np.float32)
    topk_idx = np.argpartition(scores, case.top_k, axis=1)[:, : case.top_k].astype(np.int32)
    weights = rng.random((rows, case.top_k), np.float32)
    x = rng.standard_normal((rows, case.hidden), np.float32)
    return Inputs(x, topk_idx, weights / weights.sum(1, keepdims=True))


def measure_load(case: Case, topk_idx: np.ndarray) -> Load:
    """Counts rows; capacities have the case's slack, or what the fullest needs if that is more."""
    rank = topk_idx // case.local_experts
    goes_to = (rank[:, :, None] == np.arange(case.ep_size)).any(1)
    by_pair = goes_to.reshape(case.ep_size, case.tokens, case.ep_size).sum(1)
    sources = rank.reshape(case.ep_size, -1)
    expert_pairs = np.stack([np.bincount(of, minlength=case.ep_size) for of in sources])
    by_expert = np.bincount(topk_idx.reshape(-1), minlength=case.num_experts)

    def capacity(load: np.ndarray) -> int:
        need = max(case.slack * load.mean(), load.max())
        return int(-(-need // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)

    return Load(
        pairs=by_pair,
        expert_pairs=expert_pairs,
        recv_capacity=capacity(expert_pairs.sum(0)),
        pair_capacity=min(capacity(by_pair), case.tokens),
        expert_capacity=capacity(by_expert),
    )
