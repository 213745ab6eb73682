"""Inputs of many tests: rows, and who sends what to whom, of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_sm_free.config import Config

# Unusual ways to send tokens to experts. Each is a function of (indices, config) that changes
# uniform indices, some of them -1, of all ranks: [ep_size, T, top_k].
ROUTINGS: dict[str, Callable[[np.ndarray, Config], Any]] = {
    "uniform": lambda idx, c: None,
    "nobody_sends": lambda idx, c: idx.fill(-1),
    "one_rank_sends_nothing": lambda idx, c: idx[-1].fill(-1),
    "some_tokens_go_nowhere": lambda idx, c: idx[:, ::2].fill(-1),
    "one_rank_receives_nothing": lambda idx, c: _replace(idx, idx < c.num_local_experts, -1),
    "all_to_one_expert": lambda idx, c: idx.fill(c.num_experts // 2),
    "one_hot_expert": lambda idx, c: _replace(idx, idx % 4 != 1, c.num_experts - 1),
    "all_to_one_rank": lambda idx, c: _replace(idx, idx >= 0, idx % c.num_local_experts),
    "an_expert_twice": lambda idx, c: _replace(idx, np.ones(idx.shape, bool), idx[..., :1]),
    "only_to_oneself": lambda idx, c: _replace(
        idx,
        idx >= 0,
        idx % c.num_local_experts + np.arange(c.ep_size)[:, None, None] * c.num_local_experts,
    ),
}


def _replace(idx: np.ndarray, where: np.ndarray, value: Any) -> None:
    idx[:] = np.where(where, value, idx)


def make_routing(
    config: Config, num_tokens: int, seed: int, how: str = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
    """topk_idx and topk_weights of all ranks; some indices are -1, some weights exactly 0."""
    rng = np.random.default_rng(seed)
    shape = (config.ep_size, num_tokens, config.top_k)
    topk_idx = rng.integers(-1, config.num_experts, shape).astype(np.int32)
    ROUTINGS[how](topk_idx, config)
    weights = rng.uniform(-1, 1, shape).astype(np.float32)
    weights[rng.uniform(size=shape) < 0.1] = 0
    return topk_idx, weights


def make_rows(config: Config, num: int, seed: int) -> np.ndarray:
    """Random rows of all ranks, [ep_size, num, hidden] of the buffer's dtype."""
    rng = np.random.default_rng(seed)
    shape = (config.ep_size, num, config.hidden)
    return rng.normal(size=shape).astype(np.float32).astype(config.dtype)


def make_inputs(
    config: Config, num_tokens: int | None = None, seed: int = 0, how: str = "uniform"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, topk_idx, topk_weights of all ranks; `max_tokens` tokens each unless told."""
    num_tokens = config.max_tokens if num_tokens is None else num_tokens
    return make_rows(config, num_tokens, seed), *make_routing(config, num_tokens, seed, how)


def layer_inputs(config: Config, seed: int = 1) -> tuple[np.ndarray, ...]:
    """x, topk_idx, topk_weights, y of all ranks, for `layer`."""
    return *make_inputs(config, seed=seed), make_rows(config, config.recv_capacity, seed + 1)
