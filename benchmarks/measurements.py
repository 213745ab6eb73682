"""What the GPU benchmark measures of one contestant and one case, each row on its own.

A failure is written down as the error of its row, and the next row is measured.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contestants, layer, phases, programs, timing, trace
from benchmarks.setting import SHORT_GEMMS, Setting, count_of
from benchmarks.table import Table
from benchmarks.variants import Variant

OPS = ("dispatch", "combine")
# A phase that only the exchanges of the backward pass have.
_BACKWARD = {"dispatch": "sum", "combine": "spread"}
# The phases whose floor is known.
_PHASES = ("route + pack", "unpack", "reduce-pack", "sum", "spread")
_LEAST_ROUNDS = 5


def describe(error: Exception) -> str:
    """What went wrong, in one line that fits below a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _close(one: Any) -> None:
    if isinstance(one, contestants.Ours):
        try:
            one.buffer.check()
        finally:
            one.buffer.close()


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
        """The phases of a dispatch or a combine, from a profile."""
        self._put_phases(op, self._trace(op, self._run(op)))

    def gradient(self, op: str) -> None:
        """A dispatch or a combine with its gradients, and the phases of the backward exchange."""
        name = f"{op} + gradient"
        fn, args = self._with_gradient(op)
        run = programs.compile_one(*self._loop(programs.chained(fn), args))
        self._put(name, self._race({name: run})[name])
        if self.who == "ours":
            label = f"{op} gradient"
            _put_floors_of_phases(self.setting, self.table, label, label)
            events = self._trace(f"{op}_gradient", run)
            self._put_phases(label, events, having=_BACKWARD[op], details=False)

    def exposed(self, op: str) -> None:
        """What communication adds to a step with GEMMs between send and recv."""
        setting = self.setting
        alone = {num: setting.alone(num) for num in self.plan.num_gemms}
        beside = programs.compile_all(
            {num: self._beside(op, count_of(num), num) for num in self.plan.num_gemms}
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
            run = programs.compile_one(*self._beside(op, SHORT_GEMMS, 1 / SHORT_GEMMS))
            events = self._trace(f"{op}_gemms", run)
            slowdown = phases.gemm_slowdown(setting.short_gemms, events)
            self._put(name, None if slowdown is None else 100 * slowdown, unit="%")
            label = f"{op} beside GEMMs"
            _put_floors_of_phases(setting, self.table, label, op)
            self._put_phases(label, events, details=False)

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
        """Writes an exception of its body down as the error of the row."""
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

    def _with_gradient(self, op: str) -> tuple[Callable[..., Any], tuple]:
        if op == "dispatch":
            grouped, _, weights = self._combine_inputs
            args = (*self.setting.inputs, (grouped, weights))
            return contestants.dispatch_and_back(self.one), args
        args = (*self._combine_inputs, self.setting.inputs[0])
        return contestants.combine_and_back(self.one), args

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
        # All processes have to run the same number of rounds.
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

    def _put_phases(
        self,
        label: str,
        events: list[trace.Event],
        having: str | None = None,
        details: bool = True,
    ) -> None:
        """Phases of exchanges with the phase `having`; without `details` those with a floor."""
        num_sms = self.setting.num_sms
        ours = self.who == "ours"
        found = (
            phases.of_ours(events, num_sms, having)
            if ours
            else phases.of_peer(events, self.plan.steps, num_sms)
        )
        if found is None:  # A profile of a CPU.
            self._put(f"{label}: wire", None)
            return
        times = dict(found.kernels_us)
        if {"route", "pack"} <= set(times):
            times["route + pack"] = times["route"] + times["pack"]
        for phase, value in times.items():
            if details or phase in _PHASES:
                self._put(f"{label}: {phase}", value)
        self._put(f"{label}: wire", found.wire_us)
        if ours:
            self._put(f"{label}: egress while copying", found.egress, unit="GB/s")
        if details:
            self._put(f"{label}: wire, while copying", found.busy_us)
            self._put(f"{label}: SM time", found.sm_us)


def put_floors(setting: Setting, table: Table) -> None:
    """The floors of the rows that do not depend on a contestant."""
    for op in OPS:
        table.put(setting.case, op, "floor", setting.floors.end_to_end(op))
        _put_floors_of_phases(setting, table, op, op)


def _put_floors_of_phases(setting: Setting, table: Table, label: str, exchange: str) -> None:
    for phase, value in setting.floors.phases[exchange].items():
        table.put(setting.case, f"{label}: {phase}", "floor", value)
    if setting.bandwidths.link:
        egress = setting.bandwidths.link / 1e9
        table.put(setting.case, f"{label}: egress while copying", "floor", egress, unit="GB/s")
