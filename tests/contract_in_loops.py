"""The contract in loops over NumPy arrays. Tests compare the reference with it.

Arrays carry a leading axis of source ranks; the result is a rank's.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from jax_sm_free.config import Config


def padded(size: int, config: Config) -> int:
    if config.expert_capacity is not None:
        return config.expert_capacity
    return -(-size // config.expert_alignment) * config.expert_alignment


def cut(counts: np.ndarray, config: Config) -> np.ndarray:
    """How many rows each group keeps; found by trying every level."""
    if config.expert_capacity is not None:
        return np.minimum(counts, config.expert_capacity)
    best = np.zeros_like(counts)
    for level in range(int(counts.max(initial=0)) + 1):
        kept = np.minimum(counts, level)
        if sum(padded(size, config) for size in kept) <= config.recv_capacity:
            best = kept
    return best


def local_expert(expert: int, rank: int, config: Config) -> int:
    """-1 if the expert is another rank's."""
    local = expert - rank * config.num_local_experts
    return local if expert >= 0 and 0 <= local < config.num_local_experts else -1


def token_rows(topk_idx: np.ndarray, rank: int, config: Config) -> list[tuple[int, int]]:
    """(source, token) of every token row the rank receives, in order."""
    ep_size, num_tokens, _ = topk_idx.shape
    return [
        (src, token)
        for src in range(ep_size)
        for token in range(num_tokens)
        if any(local_expert(e, rank, config) >= 0 for e in topk_idx[src, token])
    ]


def dispatch_to_experts(x, topk_idx, topk_weights, rank: int, config: Config) -> SimpleNamespace:
    runs: list[list] = [[] for _ in range(config.num_local_experts)]
    received = token_rows(topk_idx, rank, config)
    for row, (src, token) in enumerate(received):
        for k, expert in enumerate(topk_idx[src, token]):
            if (local := local_expert(expert, rank, config)) >= 0:
                runs[local].append((row, src, token, k))
    counts = np.array([len(run) for run in runs], np.int32)
    kept = cut(counts, config)
    out = SimpleNamespace(
        x=np.zeros((config.recv_capacity, x.shape[-1]), x.dtype),
        weights=np.zeros(config.recv_capacity, np.float32),
        counts=counts,
        group_sizes=np.array([padded(size, config) for size in kept], np.int32),
        dropped=np.int32((counts - kept).sum()),
        rows=np.full((config.max_recv_tokens, config.top_k), -1, np.int32),
        num_rows_from=np.bincount([src for src, _ in received], minlength=config.ep_size),
    )
    start = 0
    for run, size, group in zip(runs, kept, out.group_sizes, strict=True):
        for place, (row, src, token, k) in enumerate(run[:size], start):
            out.x[place] = x[src, token]
            out.weights[place] = topk_weights[src, token, k]
            out.rows[row, k] = place
        start += group
    return out


def dispatch_to_tokens(x, topk_idx, topk_weights, rank: int, config: Config) -> SimpleNamespace:
    num_rows = config.max_recv_tokens
    received = token_rows(topk_idx, rank, config)
    out = SimpleNamespace(
        x=np.zeros((num_rows, x.shape[-1]), x.dtype),
        topk_idx=np.full((num_rows, config.top_k), -1, np.int32),
        topk_weights=np.zeros((num_rows, config.top_k), np.float32),
        counts=np.zeros(config.num_local_experts, np.int32),
        num_tokens=np.int32(len(received)),
        rows=np.full((num_rows, 1), -1, np.int32),
        num_rows_from=np.bincount([src for src, _ in received], minlength=config.ep_size),
    )
    for row, (src, token) in enumerate(received):
        out.x[row] = x[src, token]
        out.rows[row] = row
        for k, expert in enumerate(topk_idx[src, token]):
            if (local := local_expert(expert, rank, config)) >= 0:
                out.topk_idx[row, k] = local
                out.topk_weights[row, k] = topk_weights[src, token, k]
                out.counts[local] += 1
    return out


def combine(ys, rows, weights, topk_idx, config: Config) -> np.ndarray:
    """[ep_size, T, H]; ys, rows and weights by the rank that holds the experts."""
    ep_size, num_tokens, _ = topk_idx.shape
    dtype = ys[0].dtype
    out = np.zeros((ep_size, num_tokens, ys[0].shape[-1]), np.float32)
    for rank in range(ep_size):
        for row, (src, token) in enumerate(token_rows(topk_idx, rank, config)):
            total = np.zeros(ys[0].shape[-1], np.float32)
            for place in rows[rank][row]:
                if place >= 0:
                    value = ys[rank][place].astype(np.float32)
                    if weights is not None:
                        value = weights[rank][place] * value
                    total = total + value
            out[src, token] = out[src, token] + total.astype(dtype).astype(np.float32)
    return out.astype(dtype)
