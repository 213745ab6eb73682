"""The GPU benchmark in one process, and in as many as there are GPUs, one each.

    python -m benchmarks.gpu_processes                  # the rows of the headline table, all GPUs
    python -m benchmarks.gpu_processes --rounds=3 -- --rows=dispatch,combine,phases --tokens=1024

Words after -- are passed to benchmarks.gpu. The two settings take turns, so that a disturbance
slows both down alike; the table has the median over the rounds. The first of several processes
gives their numbers, because its exchanges wait for all others. Tests run it on CPU devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cuda")

from absl import app, flags

from benchmarks import report
from benchmarks.cases import Case
from processes import launcher

_PROCESSES = flags.DEFINE_integer("processes", 0, "Processes of one GPU each; 0 for all GPUs.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Rounds; in each, both settings run.")
_SECONDS = flags.DEFINE_float("seconds", 600, "Limit for each run of each setting.")
_OUT = flags.DEFINE_string("out", "out", "Where the tables, the profiles and all numbers go.")

_LINE = "{:43} {:5} {:>11} {:>13} {:>6}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: values in one process and in several, of the rounds that have a value."""

    case: Case
    name: str
    unit: str
    one: list[float]
    several: list[float]

    @property
    def ratio(self) -> float | None:
        """Several processes over one; None if a value is missing, or is not positive for one."""
        one, several = map(_median, (self.one, self.several))
        if one is None or several is None or one <= 0:
            return None
        return several / one

    def line(self) -> str:
        medians = (
            f"{_median(values):.1f}" if values else "-" for values in (self.one, self.several)
        )
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        return _LINE.format(self.name, self.unit, *medians, ratio)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _run(folder: pathlib.Path, num_processes: int, words: list[str]) -> dict[str, Any]:
    """benchmarks.gpu in this many processes; what the first one wrote.

    Raises:
      launcher.LaunchError: if a process failed or did not end in time, with the output of all.
    """
    is_one = num_processes == 1
    with launcher.start(
        "benchmarks.gpu",
        f"--ep={_PROCESSES.value}",
        f"--out={folder}",
        *words,
        num_processes=num_processes,
        num_devices=_PROCESSES.value or 1 if is_one else 1,
        timeout_s=_SECONDS.value,
        distributed=None if is_one else launcher.NO_OPTIONS,
        # All see all GPUs, so that copies between processes need no SM.
        gpus="JAX_LOCAL_DEVICE_IDS",
    ) as group:
        group.results()
    found = folder if is_one else folder / "process_0"
    return json.loads((found / "bench_gpu.json").read_text())


def _values(found: dict[str, Any]) -> dict[tuple[Case, str, str], float]:
    """Our numbers by case, row and unit."""
    values = {}
    for row in found["rows"]:
        cell = row["cells"].get("ours", {})
        if cell.get("error") is not None:
            raise RuntimeError(f"expected a number for {row['row']}, got {cell['error']}")
        if cell.get("value") is not None:
            values[Case(**row["case"]), row["row"], row["unit"]] = cell["value"]
    return values


def _compare(one: list[dict[str, Any]], several: list[dict[str, Any]]) -> list[Row]:
    """A row for each number; the numbers of the runs that have it."""
    runs_of_one, runs_of_several = ([_values(found) for found in runs] for runs in (one, several))
    keys = dict.fromkeys(key for run in (*runs_of_one, *runs_of_several) for key in run)
    return [
        Row(
            *key,
            *([run[key] for run in runs if key in run] for runs in (runs_of_one, runs_of_several)),
        )
        for key in keys
    ]


def main(argv: list[str]) -> None:
    words = ["--contestants=ours", *argv[1:]]
    out = pathlib.Path(_OUT.value)
    one, several = [], []
    for turn in range(_ROUNDS.value):
        folder = out / f"round_{turn}"
        one.append(_run(folder / "one", 1, words))
        ranks = one[0]["rows"][0]["case"]["ep_size"]
        if ranks < 2:
            raise app.UsageError(f"expected at least 2 devices, got {ranks}")
        several.append(_run(folder / "several", ranks, words))
    rows = _compare(one, several)
    about = {key: one[0][key] for key in ("devices", "platform", "bandwidths")}
    about_all = {**about, "machine": report.machine(), "versions": report.versions()}
    for name, value in about_all.items():
        print(f"{name}: {value}")
    heading = _LINE.format("", "unit", "one process", f"{ranks} processes", "ratio")
    for case in dict.fromkeys(row.case for row in rows):
        print(f"\n{case}; medians of {_ROUNDS.value} rounds\n{heading}")
        for row in rows:
            if row.case == case:
                print(row.line())
    path = out / "bench_gpu_processes.json"
    report.write(path, rows, **about, processes=ranks)
    print(f"\nall numbers: {path}")


if __name__ == "__main__":
    app.run(main)
