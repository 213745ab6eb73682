"""One case of the GPU benchmark as it is run: sizes of the loops, mesh, inputs and floors."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, P
from jax.sharding import Mesh, NamedSharding

from benchmarks import contestants, floors, layer, programs, trace
from benchmarks.cases import Case, make_inputs, measure_load
from jax_sm_free.doctor.bandwidth import Bandwidths

# GEMMs so short that some have a copy beside all of them, and some none.
SHORT_GEMMS = 8


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


def count_of(num_gemms: float) -> int:
    """Products that are run for that many GEMMs: below 1, one of fewer rows."""
    return max(1, int(num_gemms))


class Setting:
    """One case: mesh, inputs on the devices, and floors."""

    def __init__(self, case: Case, plan: Plan, bandwidths: Bandwidths) -> None:
        self.case, self.plan, self.bandwidths = case, plan, bandwidths
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
            self._alone[num_gemms] = self._gemms(count_of(num_gemms), self.gemm_args(num_gemms))
        return self._alone[num_gemms]

    @functools.cached_property
    def short_gemms(self) -> list[trace.Event]:
        run = self._gemms(SHORT_GEMMS, self.gemm_args(1 / SHORT_GEMMS))
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
