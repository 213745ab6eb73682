"""Runs the ops over all ranks: compares them with the reference, and measures their speed."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_sm_free import reference
from jax_sm_free.bounds import MAX_TOP_K
from jax_sm_free.buffer import Buffer
from jax_sm_free.config import Config
from jax_sm_free.doctor import waits
from jax_sm_free.doctor.findings import Finding, ok, problem

_NODE_AXIS = "node"
_AXES = (_NODE_AXIS, "device")
# The reference brings all tokens to each rank, so that the comparison has to be small.
_MAX_TOKENS, _MAX_HIDDEN = 64, 1024
_ROUNDS, _TIMED = 3, 10


def check_against_reference(config: Config, timeout_s: float) -> Iterator[Finding]:
    """Compares dispatch and combine of random tokens, at small sizes. Collective.

    It does so in one tier. Then it does so in two tiers: with the nodes of `config`, or else with
    two nodes if there are enough ranks.
    """
    for num_nodes in _numbers_of_nodes(config):
        small = dataclasses.replace(
            config,
            hidden=min(config.hidden, _MAX_HIDDEN),
            max_tokens=min(config.max_tokens, _MAX_TOKENS),
            recv_capacity=None,
            timeout_s=timeout_s,
            num_nodes=num_nodes,
            node_stride=None,
        )
        yield _compare(small)


def _numbers_of_nodes(config: Config) -> tuple[int, ...]:
    if config.num_nodes > 1:
        return 1, config.num_nodes
    return (1, 2) if config.ep_size >= 4 and config.ep_size % 2 == 0 else (1,)


def _compare(config: Config) -> Finding:
    mesh = _mesh(config.num_nodes)
    where: dict[str, Any] = {"axis": _AXES, "node_axis": _NODE_AXIS}
    with Buffer.from_config(mesh, config=config, **where) as buffer:
        theirs = reference.Buffer.from_config(mesh, config=config, **where)
        runs = [_on_ranks(_round_trip(each), mesh) for each in (buffer, theirs)]
        differing = set()
        for seed in range(_ROUNDS):
            inputs = _random_inputs(config, mesh, seed)
            got, want = (jax.block_until_ready(run(*inputs)) for run in runs)
            differing.update(_differing_ranks(got, want))
        buffer.check()
    text = f"{_ROUNDS} rounds over {config.ep_size} rank(s) by transport {buffer.transport!r}"
    if config.num_nodes > 1:
        text += f",\nin two tiers of {config.num_nodes} nodes x {config.node_size}"
    if differing:
        return problem(f"{text}: rank(s) {sorted(differing)} differ from jax_sm_free.reference")
    return ok(f"{text}: the bits of jax_sm_free.reference")


def check_exchange(config: Config, num_bytes: int, timeout_s: float) -> Iterator[Finding]:
    """Times dispatches in which each rank sends about `num_bytes` to others. Collective.

    Every token goes to the next ranks, each of which has one expert. All rows go in one tier, so
    that each link between two ranks carries the same.
    """
    ranks = config.ep_size
    if ranks == 1:
        yield ok("one rank sends nothing")
        return
    num_others = min(ranks - 1, MAX_TOP_K)
    tokens = max(1, num_bytes // (num_others * config.dispatched_row_bytes))
    small = dataclasses.replace(
        config,
        num_experts=ranks,
        top_k=num_others,
        max_tokens=tokens,
        recv_capacity=num_others * tokens,
        expert_alignment=1,
        expert_capacity=None,
        timeout_s=timeout_s,
        num_nodes=1,
    )
    mesh = _mesh()
    with Buffer.from_config(mesh, _AXES, small) as buffer:
        run = _on_ranks(lambda *args: buffer.dispatch(*args).x[:1], mesh)
        inputs = _next_ranks(small, mesh)
        jax.block_until_ready(run(*inputs))  # compiles
        before, started = buffer.stats(), time.perf_counter()
        seconds = interval(lambda: jax.block_until_ready(run(*inputs)))
        spent = time.perf_counter() - started
        waited = waits.of_all_ranks(buffer.stats() - before, mesh)
        buffer.check()
        egress = num_others * tokens * small.dispatched_row_bytes / seconds
        yield ok(
            f"dispatch by transport {buffer.transport!r}: {egress / 1e9:.2f} GB/s leave each of "
            f"{ranks} ranks at once,\npacking included"
        )
        yield from waits.who_stands_out(waited, spent)


def _mesh(num_nodes: int = 1) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(num_nodes, -1), _AXES)


def _round_trip(buffer: Any) -> Callable[..., Any]:
    def run(x: Any, topk_idx: Any, topk_weights: Any) -> Any:
        recv = buffer.dispatch(x, topk_idx, topk_weights)
        out = buffer.combine(recv.x, recv.layout, weights=recv.weights)
        return recv.x, recv.weights, recv.counts, recv.group_sizes, out

    return run


def _on_ranks(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """jit(shard_map(fn)), for arrays with a leading axis of ranks, in and out."""

    def per_rank(*args: Any) -> Any:
        return jax.tree.map(lambda out: out[None], fn(*(arg[0] for arg in args)))

    spec = PartitionSpec(_AXES)
    return jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec))


def _random_inputs(config: Config, mesh: Mesh, seed: int) -> list[Any]:
    """x, topk_idx and topk_weights, with some indices -1."""

    def make(rank: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([seed, rank])
        shape = (config.max_tokens, config.top_k)
        x = rng.normal(size=(config.max_tokens, config.hidden)).astype(np.float32)
        topk_idx = rng.integers(-1, config.num_experts, shape).astype(np.int32)
        return x.astype(config.dtype), topk_idx, rng.uniform(-1, 1, shape).astype(np.float32)

    return _place(make, mesh)


def _next_ranks(config: Config, mesh: Mesh) -> list[Any]:
    """Each token goes to the `top_k` ranks behind its own."""
    tokens, top_k = config.max_tokens, config.top_k

    def make(rank: int) -> tuple[Any, ...]:
        others = (rank + 1 + np.arange(top_k)) % config.ep_size
        topk_idx = np.broadcast_to(others.astype(np.int32), (tokens, top_k))
        x = np.full((tokens, config.hidden), 1.0, np.float32).astype(config.dtype)
        return x, topk_idx, np.ones((tokens, top_k), np.float32)

    return _place(make, mesh)


def _place(make: Callable[[int], tuple[Any, ...]], mesh: Mesh) -> list[Any]:
    """Arrays with a leading axis of ranks; only those of this process's ranks are made."""
    sharding = NamedSharding(mesh, PartitionSpec(_AXES))
    placed = []
    for part, example in enumerate(make(0)):
        shape = (mesh.size, *example.shape)

        def shard(index: Any, part: int = part) -> Any:
            return make(index[0].start or 0)[part][None]

        placed.append(jax.make_array_from_callback(shape, sharding, shard))
    return placed


def _differing_ranks(got: Any, want: Any) -> set[int]:
    """Ranks of this process whose results have other bytes."""
    differing = set()
    for a, b in zip(got, want, strict=True):
        for ours, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
            if np.asarray(ours.data).tobytes() != np.asarray(theirs.data).tobytes():
                differing.add(ours.index[0].start or 0)
    return differing


def interval(run: Callable[[], Any]) -> float:
    """Seconds from the end of one run to the end of the next: the median of all but the first.

    The time of a single run would be too short in a process that begins later than its peers,
    because a part of the exchange has happened before it begins.
    """
    run()
    ends = []
    for _ in range(_TIMED + 1):
        run()
        ends.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(ends))
