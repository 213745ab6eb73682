"""The table, the JSON file, and a description of the machine that was measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Protocol

from benchmarks.cases import Case
from benchmarks.memcpy import num_cores


@dataclasses.dataclass(frozen=True)
class Row:
    """Times of one operation of one case: seconds by contestant ("ours", "pure", "memcpy")."""

    case: Case
    operation: str
    times: dict[str, list[float]]

    def ms(self, who: str) -> float | None:
        """The median in milliseconds, None if `who` did not run."""
        return 1e3 * statistics.median(self.times[who]) if who in self.times else None

    def ratio(self, who: str) -> float | None:
        """Our median over another's."""
        other = self.ms(who)
        return self.ms("ours") / other if other else None

    def as_json(self) -> dict:
        return {
            "case": dataclasses.asdict(self.case),
            "operation": self.operation,
            "median_ms": {who: self.ms(who) for who in self.times},
            "times_ms": {who: [1e3 * t for t in times] for who, times in self.times.items()},
        }


_COLUMNS = ("case", "operation", "ours ms", "pure JAX ms", "memcpy ms", "ours/pure", "ours/memcpy")
_WIDTHS = (24, 22, 9, 12, 10, 10, 12)


def _line(cells: tuple[str, ...]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], _WIDTHS[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], _WIDTHS[2:], strict=True)]
    return " ".join(left + right)


def header() -> str:
    return _line(_COLUMNS)


def line(row: Row) -> str:
    def text(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    ms = (text(row.ms(who), 2) for who in ("ours", "pure", "memcpy"))
    ratios = (text(row.ratio(who), 2) for who in ("pure", "memcpy"))
    return _line((str(row.case), row.operation, *ms, *ratios))


def linearity(rows: list[Row]) -> list[str]:
    """Our time per token, where only the number of tokens differs."""
    lines = []
    for operation in ("dispatch", "combine"):
        found = [row for row in rows if row.operation == operation]
        found.sort(key=lambda row: row.case.tokens)
        per_token = [
            f"{row.case.tokens}: {1e3 * row.ms('ours') / row.case.tokens / row.case.ep_size:.2f}"
            for row in found
        ]
        lines.append(f"{operation}, us for each token, by tokens of a rank: {', '.join(per_token)}")
    return lines


def _cpu_name() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [entry.split(":")[1].strip() for entry in text.splitlines() if "model name" in entry]
    return names[0] if names else platform.processor()


def machine() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "load_average": os.getloadavg(),
    }


def versions() -> dict:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"python": platform.python_version(), **packages}


class HasJson(Protocol):
    """A row of some table."""

    def as_json(self) -> dict: ...


def write(path: pathlib.Path, rows: Sequence[HasJson], **more: object) -> None:
    """Writes all times and what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "versions": versions(),
        "command": " ".join(sys.orig_argv),
        **more,
        "rows": [row.as_json() for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
