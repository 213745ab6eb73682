"""What the GPU benchmark measures of one contestant and one case, each row on its own.

What fails becomes the row's error, and the next row goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, P
from jax.sharding import Mesh, NamedSharding

from benchmarks import contestants, floors, layer, phases, programs, timing, trace
from benchmarks.cases import Case, make_inputs, measure_load
from benchmarks.table import Table
from benchmarks.variants import Variant
from jax_sm_free.doctor.bandwidth import Bandwidths

OPS = ("dispatch", "combine")
# GEMMs so short that some have a copy beside all of them, and some none.
_SHORT_GEMMS = 8
_LEAST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
      num_gemms: how many GEMMs lie between send and recv, for each exposed row; below 1 one of
        fewer rows.
      gemm_rows: rows of a whole GEMM.
      steps: of a loop of exchanges.
      layer_steps: of a loop of layers.
      seconds: of a race, at most, after its least number of rounds.
      widths: of the layer's experts.
      traces: a directory for profiles.
    """

    num_gemms: tuple[float, ...]
    gemm_rows: int
    steps: int
    layer_steps: int
    seconds: float
    widths: layer.Widths
    traces: pathlib.Path


def describe(error: Exception) -> str:
    """What went wrong, in one line that fits below a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _close(one: Any) -> None:
    if isinstance(one, contestants.Ours):
        try:
            one.buffer.check()
        finally:
            one.buffer.close()


def _count(num_gemms: float) -> int:
    return max(1, int(num_gemms))


class Setting:
    """One case: mesh, inputs on the devices, and floors."""

    def __init__(self, case: Case, plan: Plan, bandwidths: Bandwidths) -> None:
        self.case, self.plan = case, plan
        self.mesh: Mesh = contestants.make_mesh(case.ep_size)
        inputs = make_inputs(case)
        self.topk_idx = inputs.topk_idx
        self.load = measure_load(case, inputs.topk_idx)
        self.inputs = contestants.put(inputs, case, self.mesh)
        self.floors = floors.of_case(case, self.load, bandwidths)
        self.num_sms = int(getattr(self.mesh.devices.flat[0], "core_count", 0) or 0)
        self._gemm_inputs: dict[int, Array] = {}
        self._alone: dict[float, Callable[[], Any]] = {}

    @functools.cached_property
    def _matrix(self) -> Array:
        return self._random(self.case.hidden, self.case.hidden**-0.5)

    def gemm_args(self, num_gemms: float) -> tuple[Array, Array]:
        """[rows, hidden] and [hidden, hidden] of each rank; below 1, a part of the rows."""
        rows = max(1, int(self.plan.gemm_rows * min(1.0, num_gemms)))
        if rows not in self._gemm_inputs:
            self._gemm_inputs[rows] = self._random(rows, 1.0)
        return self._gemm_inputs[rows], self._matrix

    def alone(self, num_gemms: float) -> Callable[[], Any]:
        """Runs a loop of the GEMMs alone. The same for all contestants."""
        if num_gemms not in self._alone:
            self._alone[num_gemms] = self._gemms(_count(num_gemms), self.gemm_args(num_gemms))
        return self._alone[num_gemms]

    @functools.cached_property
    def short_gemms(self) -> list[trace.Event]:
        run = self._gemms(_SHORT_GEMMS, self.gemm_args(1 / _SHORT_GEMMS))
        return trace.record(run, self.plan.traces / "gemms")

    def _gemms(self, count: int, args: tuple[Array, Array]) -> Callable[[], Any]:
        run = programs.loop(programs.gemms(count), self.plan.steps)
        return programs.compile_one(contestants.on_ranks(run, self.mesh), args)

    def _random(self, rows: int, scale: float) -> Array:
        """[rows, hidden] on each rank."""
        shape = (self.case.ep_size * rows, self.case.hidden)
        sharding = NamedSharding(self.mesh, P(contestants.AXIS))
        make = lambda: (scale * jax.random.normal(jax.random.key(3), shape)).astype(  # noqa: E731
            self.case.dtype
        )
        return jax.jit(make, out_shardings=sharding)()


class Runs:
    """One contestant in one setting; each method fills rows of the table."""

    def __init__(self, setting: Setting, who: str, variant: Variant, table: Table) -> None:
        self.setting, self.who, self.variant, self.table = setting, who, variant, table
        self.case, self.plan = setting.case, setting.plan
        self.one: Any = variant.make(setting.case, setting.load, setting.mesh)
        self._runs: dict[str, Callable[[], Any]] = {}

    def close(self) -> None:
        """Frees what the contestant holds; raises the fault that it met, if there was one."""
        _close(self.one)

    # -------------------------------------------------------------------------------- exchanges

    def time(self, op: str) -> float:
        """Microseconds of "dispatch" or "combine"."""
        return self._race({op: self._run(op)})[op]

    def end_to_end(self, op: str) -> None:
        """A dispatch or a combine, with nothing beside it."""
        self._put(op, self.time(op))

    def phases(self, op: str) -> None:
        """The same by phase, from a profile."""
        self._put_phases(op, self._trace(op, self._run(op)))

    def exposed(self, op: str) -> None:
        """What communication adds to a step with GEMMs between send and recv."""
        setting = self.setting
        alone = {num: setting.alone(num) for num in self.plan.num_gemms}
        beside = programs.compile_all(
            {num: self._beside(op, _count(num), num) for num in self.plan.num_gemms}
        )
        for num in self.plan.num_gemms:
            name = f"{op} exposed, {num:g} GEMMs"
            with self.row(name):
                times = self._race({"beside": beside[num], "alone": alone[num]})
                self._put(name, times["beside"] - times["alone"], times_us=times)
                if self.who == "ours":
                    floor = setting.floors.exposed(op, times["alone"])
                    self.table.put(self.case, name, "floor", floor)
        name = f"{op} slows GEMMs by"
        with self.row(name):
            run = programs.compile_one(*self._beside(op, _SHORT_GEMMS, 1 / _SHORT_GEMMS))
            slowdown = phases.gemm_slowdown(setting.short_gemms, self._trace(f"{op}_gemms", run))
            self._put(name, None if slowdown is None else 100 * slowdown, unit="%")

    # ------------------------------------------------------------------------------------ layer

    def layer(self) -> None:
        """A whole layer, forward, and forward and backward."""
        setting, case, steps = self.setting, self.case, self.plan.layer_steps
        params = layer.make_params(case, setting.mesh, self.plan.widths)
        bias = layer.make_bias(case, setting.topk_idx, setting.mesh)
        args = (params, setting.inputs[0], bias)
        make = self.variant.make_for_layers or self.variant.make
        one = make(case, setting.load, setting.mesh)
        for name, step_of in (
            ("layer forward", layer.forward),
            ("layer forward + backward", layer.forward_and_backward),
        ):
            with self.row(name):
                step = step_of(one, case, setting.load)
                run = programs.compile_one(*self._loop(step, args, steps))
                self._put(name, self._race({name: run}, steps)[name])
        _close(one)

    # ----------------------------------------------------------------------------------- inside

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Writes down what goes wrong within, as the row's error."""
        try:
            yield
        except Exception as error:
            self.table.put(self.case, name, self.who, None, error=describe(error))

    def _loop(self, step: programs.Step, args: tuple, steps: int | None = None) -> tuple:
        run = programs.loop(step, steps or self.plan.steps)
        return contestants.on_ranks(run, self.setting.mesh, self.variant.options), args

    @functools.cached_property
    def _combine_inputs(self) -> tuple:
        mesh, options = self.setting.mesh, self.variant.options
        dispatch = contestants.on_ranks(self.one.dispatch, mesh, options)
        grouped = dispatch(*self.setting.inputs)
        overflow = int(jnp.sum(grouped.overflow))
        if overflow:
            raise AssertionError(f"expected no row to be dropped, got {overflow}")
        return grouped.x, grouped.handle, grouped.weights

    def _inputs(self, op: str) -> tuple:
        return self.setting.inputs if op == "dispatch" else self._combine_inputs

    def _run(self, op: str) -> Callable[[], Any]:
        if op not in self._runs:
            step = {"dispatch": programs.dispatch, "combine": programs.combine}[op](self.one)
            self._runs[op] = programs.compile_one(*self._loop(step, self._inputs(op)))
        return self._runs[op]

    def _beside(self, op: str, count: int, size: float) -> tuple:
        """A loop of exchanges with `count` GEMMs between send and recv, of `size` if below 1."""
        make = {
            "dispatch": programs.dispatch_beside_gemms,
            "combine": programs.combine_beside_gemms,
        }[op]
        args = (*self.setting.gemm_args(size), *self._inputs(op))
        return self._loop(make(self.one, count), args)

    def _race(self, runs: dict[str, Any], steps: int | None = None) -> dict[str, float]:
        """Median microseconds of a step."""
        for run in runs.values():
            if isinstance(run, Exception):
                raise run
        # Processes have to agree on how often.
        most = 15 if jax.process_count() == 1 else _LEAST_ROUNDS
        times = timing.race(runs, self.plan.seconds, least=_LEAST_ROUNDS, most=most)
        num = steps or self.plan.steps
        return {name: statistics.median(each) / num * 1e6 for name, each in times.items()}

    def _trace(self, name: str, run: Any) -> list[trace.Event]:
        if isinstance(run, Exception):
            raise run
        return trace.record(run, self.plan.traces / f"{self.who}_{name}")

    def _put(self, name: str, value: float | None, *, unit: str = "us", **detail: Any) -> None:
        self.table.put(self.case, name, self.who, value, unit=unit, **detail)

    def _put_phases(self, op: str, events: list[trace.Event]) -> None:
        ours = self.who == "ours"
        num_sms = self.setting.num_sms
        found = (
            phases.of_ours(events, num_sms)
            if ours
            else phases.of_peer(events, self.plan.steps, num_sms)
        )
        if found is None:  # A profile of a CPU.
            self._put(f"{op}: wire", None)
            return
        times = dict(found.kernels_us)
        if {"route", "pack"} <= set(times):
            times["route + pack"] = times["route"] + times["pack"]
        for phase, value in times.items():
            self._put(f"{op}: {phase}", value)
        self._put(f"{op}: wire", found.wire_us)
        if ours:
            self._put(f"{op}: wire, while copying", found.busy_us)
            self._put(f"{op}: egress while copying", found.egress, unit="GB/s")
        self._put(f"{op}: SM time", found.sm_us)


def put_floors(setting: Setting, bandwidths: Bandwidths, table: Table) -> None:
    """The floors of the rows that do not depend on a contestant."""
    found = setting.floors
    phases_of = {
        "dispatch": {"route + pack": found.route_pack, "unpack": found.unpack},
        "combine": {"reduce-pack": found.reduce_pack, "sum": found.sum},
    }
    for op in OPS:
        put = functools.partial(table.put, setting.case, who="floor")
        put(name=op, value=found.end_to_end(op))
        for phase, value in {**phases_of[op], "wire": found.wire(op)}.items():
            put(name=f"{op}: {phase}", value=value)
        if bandwidths.link:
            put(name=f"{op}: egress while copying", value=bandwidths.link / 1e9, unit="GB/s")
