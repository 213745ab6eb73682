"""The picture of the GPU benchmark's table."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.cases import Case
from benchmarks.table import COLUMNS, Table

_COLORS = dict(zip(COLUMNS, ("tab:blue", "tab:orange", "tab:green", "0.6"), strict=True))


def draw(table: Table, headline: Case, path: pathlib.Path) -> None:
    """Bars of the headline's times that more than one contestant has; lines over the tokens."""
    cases = [case for case in table.cases() if _but_tokens(case) == _but_tokens(headline)]
    num_panels = 2 if len(cases) > 1 else 1
    figure, panels = plt.subplots(1, num_panels, figsize=(9 * num_panels, 10), squeeze=False)
    _bars(panels[0][0], table, headline)
    if num_panels > 1:
        _sweep(panels[0][1], table, sorted(cases, key=lambda case: case.tokens))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _but_tokens(case: Case) -> tuple:
    return case.hidden, case.ep_size, case.dtype, case.num_experts, case.wire_dtype


def _bars(panel: Axes, table: Table, case: Case) -> None:
    rows = [row for row in table.rows if row.case == case and row.unit == "us"]
    rows = [row for row in rows if sum(row.value(who) is not None for who in COLUMNS) > 1]
    height = 0.8 / len(COLUMNS)
    for place, who in enumerate(COLUMNS):
        at = [(y + place * height, row.value(who)) for y, row in enumerate(rows)]
        at = [(y, value) for y, value in at if value is not None]
        if at:
            ys, values = zip(*at, strict=True)
            panel.barh(ys, values, height, label=who, color=_COLORS[who])
    panel.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], [row.name for row in rows])
    panel.invert_yaxis()
    panel.set_xlabel("microseconds")
    panel.set_title(str(case))
    if panel.has_data():
        panel.legend()


def _sweep(panel: Axes, table: Table, cases: list[Case]) -> None:
    for name, style in (("dispatch", "-o"), ("combine", "--s")):
        for who in COLUMNS:
            found = [(case.tokens, table.find(case, name)) for case in cases]
            points = [(t, row.value(who)) for t, row in found if row and row.value(who)]
            if points:
                panel.plot(
                    *zip(*points, strict=True), style, label=f"{name}, {who}", color=_COLORS[who]
                )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens of a rank")
    panel.set_ylabel("microseconds")
    if panel.has_data():
        panel.legend()
