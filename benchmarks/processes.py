"""Two processes of four CPU devices each, over shared memory and over a cable, beside one of eight.

    python -m benchmarks.processes            # needs root, for the two hosts of the cable

All settings run on this machine and take turns, so that a disturbance slows all of them alike.
Each link is also measured by ucx_perftest, both directions at once, in the same run. Two rates are
compared with it: the rate of the whole operation, which packs and unpacks rows, and over a cable
the rate of TCP while it had bytes to send. Then four processes are started: how long does the
first result take? And of two processes that exchange all the time one is killed: how long does the
other take to raise an error?
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from absl import app, flags

from benchmarks import perftest, process_ranks, report, sockets, timing
from benchmarks.cases import Case, make_inputs, measure_load
from processes import launcher, pair, two_hosts

_TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens of a rank.")
_HIDDEN = flags.DEFINE_integer("hidden", 1024, "Columns of a row.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds; in each, the settings take turns.")
_RUNS = flags.DEFINE_integer("runs", 3, "Runs of each operation in a round.")
_MEGABITS = flags.DEFINE_integer("megabits", 400, "Mbit/s of the slow cable.")
_GEMMS = flags.DEFINE_integer("gemms", 3, "GEMMs of 1024 rows a rank, between send and recv.")
_STARTS = flags.DEFINE_integer("starts", 3, "How often four processes are started.")
_KILLS = flags.DEFINE_integer("kills", 3, "How often one of two processes is killed, each way.")
_OUT = flags.DEFINE_string("out", "out/bench_processes.json", "Where all times go.")

_PROCESSES, _DEVICES = 2, 4
_ALONE, _SHARED = "1 process x 8", "2 x 4, shared memory"
_HERE = (launcher.Host(), launcher.Host())
_STARTED = 4  # processes, to see how long the first result takes
_KILL_TIMEOUT_S = 5.0
_COLUMNS = ("ms", "least ms", "/ alone", "MB/s", "wire MB/s", "ucx_perftest", "ratio", "wire ratio")
_LINE = "{:24} {:10} {:>9} {:>9} {:>9} {:>9} {:>10} {:>13} {:>6} {:>11}"
_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation in one setting.

    `link` is what ucx_perftest moves there, `wire` what TCP moved in all runs: bytes/s each way.
    """

    setting: str
    operation: str
    times: list[float]
    num_bytes: int
    alone_s: float
    wire: float | None
    link: float | None

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    @property
    def rate(self) -> float:
        """Bytes per second from process to process, each way, over the whole operation."""
        return self.num_bytes / self.seconds

    def line(self) -> str:
        link = self.link
        rates = (link and self.rate, self.wire, link)
        cells = [f"{rate / 1e6:.0f}" if rate else "-" for rate in rates]
        cells += [f"{rate / link:.2f}" if rate and link else "-" for rate in rates[:2]]
        times = (f"{1e3 * self.seconds:.1f}", f"{1e3 * min(self.times):.1f}")
        times = (*times, f"{self.seconds / self.alone_s:.2f}")
        return _LINE.format(self.setting, self.operation, *times, *cells)

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


def _take_turns(
    groups: list[launcher.Group], rounds: int, measure_links: Callable[[], None]
) -> None:
    """One group runs while the others wait, and one link is measured at a time."""
    ready = process_ranks.READY.format
    for turn in range(rounds):
        for group in groups:
            for rank in group:
                rank.wait_for(ready(turn), _TIMEOUT_S)
        measure_links()
        for group in groups:
            for rank in group:
                rank.resume()
            for rank in group:
                rank.wait_for(ready(turn + 1), _TIMEOUT_S)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured, by setting."""

    times: dict[str, dict[str, list[float]]]  # Seconds of each run by operation.
    wires: dict[str, float | None]  # What TCP moved, bytes/s each way.
    links: dict[str, list[float]]  # What ucx_perftest moved in each round, bytes/s each way.


def _measure(
    case: Case, settings: dict[str, dict[str, Any]], num_gemms: dict[str, int]
) -> Measured:
    plan = process_ranks.Rounds(_ROUNDS.value, _RUNS.value)
    links: dict[str, list[float]] = {name: [] for name in settings if name != _ALONE}

    def measure_links() -> None:
        for name, rates in links.items():
            ports = [launcher.free_port() for _ in range(2)]
            rates.append(perftest.both_ways(settings[name].get("hosts", _HERE), ports))

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
        _take_turns(list(groups.values()), plan.rounds, measure_links)
        wires = {
            name: sockets.wire_rate(how["hosts"])
            for name, how in settings.items()
            if "hosts" in how
        }
        for group in groups.values():
            for rank in group:
                rank.resume()
        times = {name: group.results()[0] for name, group in groups.items()}
    return Measured(times, wires, links)


def _time_starts() -> list[float]:
    """Seconds to the first result of four processes, the latest of them, each time."""
    times = []
    for _ in range(_STARTS.value):
        start = launcher.start(process_ranks.start_up, num_processes=_STARTED, timeout_s=_TIMEOUT_S)
        with start as group:
            for rank in group:
                rank.wait_for(process_ranks.READY.format(0), _TIMEOUT_S)
            for rank in group:
                rank.resume()
            times.append(max(group.results()))
    return times


def _time_kills(how: dict[str, Any]) -> list[float]:
    """Seconds from killing one of two processes to the other's error, each time."""
    times = []
    for _ in range(_KILLS.value):
        with launcher.start(
            pair.exchange_for_ever,
            _KILL_TIMEOUT_S,
            64,  # tokens
            256,  # hidden
            num_processes=2,
            **how,
        ) as group:
            for rank in group:
                rank.wait_for("step 2.")
            begin = time.time()
            group[1].kill()
            end, error = group.wait(shutdown=False)[0].result
        if "peer rank 1" not in error:
            raise RuntimeError(f"expected an error that names rank 1, got {error}")
        times.append(end - begin)
    return times


def _hidden(name: str, times: dict[str, list[float]], num_bytes: int, link: float) -> str:
    """How much of the time on the wire is hidden by products between send and recv."""
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
    """Arguments of `launcher.start` for each setting."""
    both = {"num_processes": _PROCESSES, "num_devices": _DEVICES}
    return {
        _ALONE: {"num_processes": 1, "num_devices": _PROCESSES * _DEVICES},
        _SHARED: both,
        "2 x 4, cable": both | {"hosts": cable.hosts},
        f"2 x 4, {_MEGABITS.value} Mbit/s": both | {"hosts": slow.hosts},
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
        num_gemms = {name: _GEMMS.value if name == slow_name else 0 for name in settings}
        measured = _measure(case, settings, num_gemms)
        kills = {
            "on a host": _time_kills({}),
            "over the cable": _time_kills({"hosts": cable.hosts}),
        }
    times = measured.times
    links = {name: statistics.median(rates) for name, rates in measured.links.items()}
    rows = [
        Row(
            name,
            operation,
            times[name][operation],
            num_bytes,
            statistics.median(times[_ALONE][operation]),
            measured.wires.get(name),
            links.get(name),
        )
        for operation in ("dispatch", "combine")
        for name in settings
    ]
    print(_LINE.format("setting", "operation", *_COLUMNS))
    for row in rows:
        print(row.line())
    summary = _hidden(slow_name, times[slow_name], num_bytes, links[slow_name])
    print(f"\n{summary}")
    starts = _time_starts()
    print(
        f"{_STARTED} processes: {statistics.median(starts):.1f} s from Buffer(...) to the first "
        f"result of a dispatch, {max(starts):.1f} s at most"
    )
    for where, seconds in kills.items():
        print(
            f"a process killed {where}: the other raises {statistics.median(seconds):.2f} s later, "
            f"{max(seconds):.2f} s at most, with timeout_s={_KILL_TIMEOUT_S:g}"
        )
    path = pathlib.Path(_OUT.value)
    report.write(
        path,
        rows,
        links=links,
        rates=measured.links,
        summary=summary,
        times=times,
        starts=starts,
        kills=kills,
    )
    print(f"all times: {path}")


if __name__ == "__main__":
    app.run(main)
