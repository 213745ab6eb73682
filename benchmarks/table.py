"""The table of the GPU benchmark: rows by what was measured, columns by contestant."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from benchmarks import report
from benchmarks.cases import Case

CONTESTANTS = ("ours", "all_to_all", "ragged")
COLUMNS = (*CONTESTANTS, "floor")
_PEERS = ("all_to_all", "ragged")
_HEADINGS = ("", "unit", *COLUMNS, "ours/floor", "ours/peers")
_WIDTHS = (43, 5, 9, 10, 9, 9, 10, 10)


@dataclasses.dataclass
class Cell:
    """A number, or why there is none."""

    value: float | None
    error: str | None = None
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        if self.error is not None:
            return "error"
        if self.value is None:
            return "-"
        return f"{self.value:.3f}" if abs(self.value) < 1 else f"{self.value:.1f}"


@dataclasses.dataclass
class Row:
    """One line of the table."""

    case: Case
    name: str
    unit: str
    cells: dict[str, Cell] = dataclasses.field(default_factory=dict)

    def value(self, who: str) -> float | None:
        return self.cells[who].value if who in self.cells else None

    def ratio(self, others: tuple[str, ...]) -> float | None:
        """Ours over the least of the others."""
        ours = self.value("ours")
        values = [value for who in others if (value := self.value(who))]
        return ours / min(values) if ours is not None and values else None

    def as_json(self) -> dict[str, Any]:
        cells = {who: dataclasses.asdict(cell) for who, cell in self.cells.items()}
        return {
            "case": dataclasses.asdict(self.case),
            "row": self.name,
            "unit": self.unit,
            "cells": cells,
        }


class Table:
    """Rows in the order in which they were first filled. Every change is written to a file."""

    def __init__(self, path: pathlib.Path, **about: Any) -> None:
        self.rows: list[Row] = []
        self.path = path
        self._about = about

    def about(self, **more: Any) -> None:
        """Adds what the numbers were measured on or with."""
        self._about.update(more)
        self._write()

    def put(
        self,
        case: Case,
        name: str,
        who: str,
        value: float | None,
        *,
        unit: str = "us",
        error: str | None = None,
        **detail: Any,
    ) -> None:
        """Fills a cell; value None and no error for what does not apply."""
        self._row(case, name, unit).cells[who] = Cell(value, error, detail)
        self._write()

    def find(self, case: Case, name: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.name) == (case, name)), None)

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def text(self) -> str:
        lines = []
        for case in self.cases():
            lines += ["", str(case), _line(_HEADINGS)]
            lines += [_row_line(row) for row in self.rows if row.case == case]
        errors = [
            f"{row.case}, {row.name}, {who}: {cell.error}"
            for row in self.rows
            for who, cell in row.cells.items()
            if cell.error is not None
        ]
        return "\n".join([*lines, "", *errors])

    def _row(self, case: Case, name: str, unit: str) -> Row:
        row = self.find(case, name)
        if row is None:
            row = Row(case, name, unit)
            self.rows.append(row)
        return row

    def _write(self) -> None:
        report.write(self.path, self.rows, **self._about)


def _line(cells: tuple[str, ...]) -> str:
    name, *rest = (
        cell.rjust(width) if place else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    )
    return " ".join([name, *rest])


def _row_line(row: Row) -> str:
    cells = [row.cells[who].text() if who in row.cells else "-" for who in COLUMNS]
    ratios = [row.ratio(("floor",)), row.ratio(_PEERS)]
    texts = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    return _line((row.name, row.unit, *cells, *texts))
