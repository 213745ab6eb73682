"""Two processes of four CPU devices each, over shared memory and over a cable, beside one of eight.

    python -m benchmarks.processes            # needs root, for the two hosts of the cable

All run on this machine, and take turns: what disturbs it disturbs them alike. The yardstick of the
link is ucx_perftest, both directions at once, in the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import statistics
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "multiprocess"))

import launcher
import numpy as np
import two_hosts
from absl import app, flags

from benchmarks import perftest, process_ranks, report, timing
from benchmarks.cases import Case, make_inputs, measure_load

_TOKENS = flags.DEFINE_integer("tokens", 1024, "Of a rank.")
_HIDDEN = flags.DEFINE_integer("hidden", 1024, "Columns of a row.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "In which all settings take turns.")
_RUNS = flags.DEFINE_integer("runs", 3, "Of each operation in a round.")
_MEGABITS = flags.DEFINE_integer("megabits", 400, "Of the slow cable, per second.")
_GEMMS = flags.DEFINE_integer("gemms", 3, "Between send and recv, 1024 rows on each rank.")
_OUT = flags.DEFINE_string("out", "out/bench_processes.json", "Where all times go.")

_PROCESSES, _DEVICES = 2, 4
_ALONE, _SHARED = "1 process x 8", "2 x 4, shared memory"
_LINE = "{:24} {:10} {:>9} {:>9} {:>9} {:>9} {:>13} {:>6}"
_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation in one setting; `link` is what the yardstick moves there, bytes/s each way."""

    setting: str
    operation: str
    times: list[float]
    num_bytes: int
    alone_s: float
    link: float | None

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    @property
    def rate(self) -> float:
        """Bytes per second from process to process, each way, over the whole operation."""
        return self.num_bytes / self.seconds

    def line(self) -> str:
        link = ("-", "-", "-")
        if self.link:
            rates = (f"{rate / 1e6:.0f}" for rate in (self.rate, self.link))
            link = (*rates, f"{self.rate / self.link:.2f}")
        times = (f"{1e3 * self.seconds:.1f}", f"{1e3 * min(self.times):.1f}")
        times = (*times, f"{self.seconds / self.alone_s:.2f}")
        return _LINE.format(self.setting, self.operation, *times, *link)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _case() -> Case:
    return Case(_TOKENS.value, _HIDDEN.value, _PROCESSES * _DEVICES)


def _bytes_each_way(case: Case) -> int:
    """Rows from one process to the other, the mean of both directions."""
    pairs = measure_load(case, make_inputs(case).topk_idx).pairs
    process = np.arange(case.ep_size) // _DEVICES
    crossing = pairs[process[:, None] != process[None, :]].sum()
    return int(crossing) // 2 * case.row_bytes


def _take_turns(groups: list[launcher.Group], rounds: int) -> None:
    """One group runs while the others wait."""
    ready = process_ranks.READY.format
    for turn in range(rounds):
        for group in groups:
            for rank in group:
                rank.wait_for(ready(turn), _TIMEOUT_S)
            for rank in group:
                rank.resume()
            then = ready(turn + 1) if turn + 1 < rounds else launcher.rank_lib.ENDED
            for rank in group:
                rank.wait_for(then, _TIMEOUT_S)


def _time_all(
    case: Case, settings: dict[str, dict[str, Any]], num_gemms: dict[str, int]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each run by setting and operation."""
    plan = process_ranks.Rounds(_ROUNDS.value, _RUNS.value)
    with contextlib.ExitStack() as stack:
        groups = {
            name: stack.enter_context(
                launcher.start(
                    process_ranks.time_all,
                    case,
                    plan,
                    num_gemms[name],
                    timeout_s=_TIMEOUT_S,
                    env=timing.keep_pages_of_programs(),
                    **how,
                )
            )
            for name, how in settings.items()
        }
        _take_turns(list(groups.values()), plan.rounds)
        return {name: group.results()[0] for name, group in groups.items()}


def _hidden(name: str, times: dict[str, list[float]], num_bytes: int, link: float) -> str:
    """What of the wire's time disappears behind compute between send and recv."""
    median = {operation: statistics.median(each) for operation, each in times.items()}
    wire = num_bytes / link
    hidden = median["dispatch"] + median["compute"] - median["beside"]
    return (
        f"{name}: dispatch {1e3 * median['dispatch']:.0f} ms, products "
        f"{1e3 * median['compute']:.0f} ms, dispatch with the products between send and recv "
        f"{1e3 * median['beside']:.0f} ms; of {1e3 * wire:.0f} ms on the wire "
        f"{100 * hidden / wire:.0f} % are hidden"
    )


def _settings(cable: Any, slow: Any) -> dict[str, dict[str, Any]]:
    """What `launcher.start` gets, by name."""
    both = {"num_processes": _PROCESSES, "num_devices": _DEVICES}
    return {
        _ALONE: {"num_processes": 1, "num_devices": _PROCESSES * _DEVICES},
        _SHARED: both,
        "2 x 4, cable": both | {"hosts": cable.hosts},
        f"2 x 4, {_MEGABITS.value} Mbit/s": both | {"hosts": slow.hosts},
    }


def _measure_links(settings: dict[str, dict[str, Any]]) -> dict[str, float]:
    """By setting, what ucx_perftest moves, bytes per second each way."""
    here = (launcher.Host(), launcher.Host())
    return {
        name: perftest.both_ways(how.get("hosts", here))
        for name, how in settings.items()
        if how["num_processes"] > 1
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    case, slow_name = _case(), f"2 x 4, {_MEGABITS.value} Mbit/s"
    num_bytes = _bytes_each_way(case)
    print(f"{report.machine()}\n{report.versions()}")
    print(
        f"{case}, top-{case.top_k} of {case.num_experts}; medians; {num_bytes / 1e6:.1f} MB from "
        "process to process each way\n"
    )
    with two_hosts.joined() as cable, two_hosts.joined() as slow:
        slow.slow_down(_MEGABITS.value)
        settings = _settings(cable, slow)
        before = _measure_links(settings)
        num_gemms = {name: _GEMMS.value if name == slow_name else 0 for name in settings}
        times = _time_all(case, settings, num_gemms)
        links = {
            name: (before[name] + after) / 2 for name, after in _measure_links(settings).items()
        }
    rows = [
        Row(
            name,
            operation,
            times[name][operation],
            num_bytes,
            statistics.median(times[_ALONE][operation]),
            links.get(name),
        )
        for operation in ("dispatch", "combine")
        for name in settings
    ]
    print(
        _LINE.format(
            "setting", "operation", "ms", "least ms", "/ alone", "MB/s", "ucx_perftest", "ratio"
        )
    )
    for row in rows:
        print(row.line())
    summary = _hidden(slow_name, times[slow_name], num_bytes, links[slow_name])
    print(f"\n{summary}")
    path = pathlib.Path(_OUT.value)
    report.write(path, rows, links=links, summary=summary, times=times)
    print(f"all times: {path}")


if __name__ == "__main__":
    app.run(main)
