"""What the processes of `benchmarks.processes` run, round by round as they are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contestants, programs, timing
from benchmarks.cases import Case, make_inputs, measure_load
from processes import rank

READY = "ready for round {}."
_GEMM_ROWS = 1024
# In 60 runs the heap grew by so many results of all ranks.
_WARM_RESULTS = 16


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often each operation runs: `runs` times in a row in each of `rounds` rounds."""

    rounds: int
    runs: int


def time_all(case: Case, plan: Rounds, num_gemms: int) -> dict[str, list[float]]:
    """Seconds of each run, by operation.

    "dispatch" and "combine"; with `num_gemms`, also so many products on each rank ("compute"), and
    dispatch with the products between send and recv ("beside").
    """
    mesh = contestants.make_mesh(case.ep_size)
    inputs = make_inputs(case)
    load = measure_load(case, inputs.topk_idx)
    timing.warm_heap(_WARM_RESULTS * len(mesh.local_devices) * load.recv_capacity * case.row_bytes)
    ours = contestants.make_ours(case, load, mesh)
    args = contestants.put(inputs, case, mesh)
    times = _time_rounds(_make_runners(case, mesh, ours, args, num_gemms), plan)
    ours.buffer.close()
    return times


def time_tiers(case: Case, plan: Rounds, num_hosts: int, has_tiers: bool) -> dict[str, list[float]]:
    """Seconds of each "dispatch" and "combine"; with two tiers, a node is a host.

    Processes take the hosts in turn. With and without tiers a rank is the same device.
    """
    by_host = np.array(jax.devices()).reshape(jax.process_count() // num_hosts, num_hosts, -1)
    mesh = contestants.make_mesh_of_nodes(by_host.transpose(1, 0, 2).reshape(num_hosts, -1))
    inputs = make_inputs(case)
    load = measure_load(case, inputs.topk_idx)
    node_axis = contestants.NODE_AXIS if has_tiers else None
    ours = contestants.make_ours(case, load, mesh, node_axis=node_axis)
    args = contestants.put(inputs, case, mesh)
    times = _time_rounds(_make_runners(case, mesh, ours, args, 0), plan)
    ours.buffer.close()
    return times


def _time_rounds(runners: dict[str, Callable[[], Any]], plan: Rounds) -> dict[str, list[float]]:
    """Seconds of each run, in rounds that begin when this process is told to."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()
        run()
    for turn in range(plan.rounds):
        rank.pause(READY.format(turn))
        for name, run in runners.items():
            for _ in range(plan.runs):
                begin = perf_counter()
                run()
                times[name].append(perf_counter() - begin)
    rank.pause(READY.format(plan.rounds))
    return times


def start_up() -> float:
    """Seconds from opening a buffer to the first result of a dispatch, compiled meanwhile."""
    case = Case(tokens=64, hidden=256, ep_size=jax.device_count())
    mesh = contestants.make_mesh(case.ep_size)
    inputs = make_inputs(case)
    load = measure_load(case, inputs.topk_idx)
    args = contestants.put(inputs, case, mesh)
    rank.pause(READY.format(0))
    begin = perf_counter()
    ours = contestants.make_ours(case, load, mesh)
    programs.compile_one(contestants.on_ranks(ours.dispatch, mesh), args)()
    seconds = perf_counter() - begin
    ours.buffer.close()
    return seconds


def _make_runners(
    case: Case, mesh: Any, ours: contestants.Ours, args: tuple, num_gemms: int
) -> dict[str, Callable[[], Any]]:
    grouped = contestants.on_ranks(ours.dispatch, mesh)(*args)
    fns = {
        "dispatch": (ours.dispatch, args),
        "combine": (ours.combine, (grouped.x, grouped.handle, grouped.weights)),
    }
    if num_gemms:
        gemms = _make_gemms(case, mesh)
        compute = lambda a, b: programs.multiply(a, b, num_gemms)  # noqa: E731
        beside = lambda a, b, *inputs: ours.dispatch_beside(compute, (a, b), *inputs)  # noqa: E731
        fns |= {"compute": (compute, gemms), "beside": (beside, (*gemms, *args))}
    return {
        name: programs.compile_one(contestants.on_ranks(fn, mesh), args)
        for name, (fn, args) in fns.items()
    }


def _make_gemms(case: Case, mesh: Any) -> tuple[Any, Any]:
    """[rows, hidden] and [hidden, hidden] of each rank, f32."""
    sharding = jax.NamedSharding(mesh, jax.P(contestants.AXIS))
    rng = np.random.default_rng(0)

    def make(rows: int) -> Any:
        shape = (case.ep_size * rows, case.hidden)
        block = rng.standard_normal((rows, case.hidden), np.float32) * case.hidden**-0.5
        return jax.make_array_from_callback(shape, sharding, lambda _: jnp.asarray(block))

    return make(_GEMM_ROWS), make(case.hidden)
