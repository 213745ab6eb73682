"""Two tiers beside one, on CPU: what crosses between nodes, and what the exchanges take.

    python -m benchmarks.tiers [--cable]      # the cable needs root

In one process, the devices stand for nodes of several ranks, and all of them share this machine's
memory. There the second hop of two tiers is work without a gain. With `--cable`, two hosts of two
processes each are joined by a slow cable, and each host is a node. There the cable decides.

Rows over the node boundary are counted by the buffer (`stats`), and beside that from the routing.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=32")

import jax
import numpy as np
from absl import app, flags, logging

import jax_sm_free as smf
from benchmarks import contestants, process_ranks, programs, report, timing
from benchmarks.cases import Case, make_inputs, measure_load
from processes import launcher, two_hosts

_CABLE = flags.DEFINE_boolean("cable", False, "Also over a cable between two hosts.")
_MEGABITS = flags.DEFINE_integer("megabits", 1000, "Mbit/s of the cable.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens of a rank.")
_HIDDEN = flags.DEFINE_integer("hidden", 1024, "Columns of a row.")
_SECONDS = flags.DEFINE_float("seconds", 15.0, "For which two exchanges take turns.")
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Rounds over the cable, in which settings take turns.")

MESHES = ((2, 4), (4, 8))  # nodes, ranks of a node
TIERS = {"one tier": None, "two tiers": contestants.NODE_AXIS}
_PROCESSES, _DEVICES, _HOSTS = 4, 2, 2
_TIMEOUT_S = 600.0


def _case(ep_size: int, tokens: int) -> Case:
    return Case(tokens, _HIDDEN.value, ep_size, num_experts=256)


def _open(case: Case, shape: tuple[int, int], node_axis: str | None) -> tuple[Any, Any, Any]:
    mesh = contestants.make_mesh_of_nodes(np.array(jax.devices()[: case.ep_size]).reshape(shape))
    inputs = make_inputs(case)
    load = measure_load(case, inputs.topk_idx)
    ours = contestants.make_ours(case, load, mesh, node_axis=node_axis)
    return ours, mesh, contestants.put(inputs, case, mesh)


def _crossing_bytes(stats: smf.Stats, node_size: int) -> int:
    """Bytes of rows that ranks have sent to ranks of other nodes."""
    return sum(
        num_bytes
        for rank in stats.ranks
        for peer, num_bytes in enumerate(rank.bytes_sent)
        if peer // node_size != rank.rank // node_size
    )


def _count_pairs(case: Case, node_size: int) -> int:
    """Distinct pairs of a token and another node that owns one of its experts."""
    owner = make_inputs(case).topk_idx // case.local_experts // node_size
    home = np.arange(owner.shape[0]) // case.tokens // node_size
    nodes = np.arange(case.ep_size // node_size)
    goes_to = (owner[:, :, None] == nodes).any(1) & (home[:, None] != nodes)
    return int(goes_to.sum())


def _print_crossing(shape: tuple[int, int]) -> None:
    case = _case(shape[0] * shape[1], 128)
    crossing = {}
    for name, node_axis in TIERS.items():
        ours, mesh, args = _open(case, shape, node_axis)
        before = _crossing_bytes(ours.buffer.stats(), shape[1])
        jax.block_until_ready(contestants.on_ranks(ours.dispatch, mesh)(*args))
        crossing[name] = _crossing_bytes(ours.buffer.stats(), shape[1]) - before
        ours.buffer.close()
    one, two = (crossing[name] / 1e6 for name in TIERS)
    pairs = _count_pairs(case, shape[1])
    print(
        f"{shape[0]} nodes x {shape[1]}: {one:8.2f} MB {two:8.2f} MB  {two / one:5.2f}   "
        f"{pairs * case.row_bytes / 1e6:8.2f} MB of {pairs} (token, other node) pairs"
    )
    if crossing["two tiers"] != pairs * case.row_bytes:
        raise AssertionError(f"expected {pairs * case.row_bytes} bytes, got {crossing}")


def _print_times() -> None:
    shape = MESHES[0]
    case = _case(shape[0] * shape[1], _TOKENS.value)
    runners: dict[str, dict[str, Any]] = {"dispatch": {}, "combine": {}}
    opened = []
    for name, node_axis in TIERS.items():
        ours, mesh, args = _open(case, shape, node_axis)
        opened.append(ours)
        grouped = contestants.on_ranks(ours.dispatch, mesh)(*args)
        back = (grouped.x, grouped.handle, grouped.weights)
        for op, fn, given in (("dispatch", ours.dispatch, args), ("combine", ours.combine, back)):
            runners[op][name] = programs.compile_one(contestants.on_ranks(fn, mesh), given)
    print(f"\nOne process, {shape[0]} nodes x {shape[1]} CPU devices, {case}; medians")
    for op, both in runners.items():
        _print_race(op, timing.race(both, _SECONDS.value, least=7, most=200))
    for ours in opened:
        ours.buffer.close()


def _print_race(op: str, times: dict[str, list[float]]) -> None:
    one, two = (1e3 * statistics.median(times[name]) for name in TIERS)
    least = [1e3 * min(times[name]) for name in TIERS]
    print(
        f"{op:10} one tier {one:8.1f} ms (least {least[0]:.1f}), two tiers {two:8.1f} ms "
        f"(least {least[1]:.1f}), ratio {two / one:.2f}"
    )


def _print_cable() -> None:
    case = _case(_PROCESSES * _DEVICES, _TOKENS.value)
    plan = process_ranks.Rounds(_ROUNDS.value, 2)
    with two_hosts.joined() as cable:
        cable.slow_down(_MEGABITS.value)
        how = {
            "num_processes": _PROCESSES,
            "num_devices": _DEVICES,
            "hosts": cable.hosts,
            "timeout_s": _TIMEOUT_S,
            "env": timing.keep_pages_of_programs(),
        }
        groups = {}
        try:
            for name, node_axis in TIERS.items():
                started = launcher.start(
                    process_ranks.time_tiers, case, plan, _HOSTS, node_axis is not None, **how
                )
                groups[name] = (started, started.__enter__())
            _take_turns([group for _, group in groups.values()], plan.rounds)
            times = {name: group.results()[0] for name, (_, group) in groups.items()}
        finally:
            for started, _ in groups.values():
                started.__exit__(None, None, None)
    print(
        f"\n{_HOSTS} hosts x {_PROCESSES // _HOSTS} processes x {_DEVICES} CPU devices, UCX over a "
        f"cable of {_MEGABITS.value} Mbit/s, {case}; medians"
    )
    for op in ("dispatch", "combine"):
        _print_race(op, {name: each[op] for name, each in times.items()})


def _take_turns(groups: list[launcher.Group], rounds: int) -> None:
    """One group runs while the other waits."""
    ready = process_ranks.READY.format
    for turn in range(rounds + 1):
        for group in groups:
            for rank in group:
                rank.wait_for(ready(turn), _TIMEOUT_S)
        for group in groups:
            for rank in group:
                rank.resume()
            if turn == rounds:
                continue
            for rank in group:
                rank.wait_for(ready(turn + 1), _TIMEOUT_S)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    timing.keep_pages()
    print(f"{report.machine()}\n{report.versions()}\n")
    print("Rows of a dispatch over the node boundary, 128 tokens a rank, top-8 of 256 experts")
    print(f"{'':12}  {'one tier':>10} {'two tiers':>11}  ratio   from the routing")
    for shape in MESHES:
        _print_crossing(shape)
    _print_times()
    if _CABLE.value:
        _print_cable()


if __name__ == "__main__":
    app.run(main)
