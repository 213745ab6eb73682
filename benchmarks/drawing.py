"""Draws what GPUs did, from the events of a profile."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks import profiled_exchanges, trace
from benchmarks.trace import Event

_COLORS = {
    "gemm": "tab:green",
    "other": "0.75",
    "collective": "tab:red",
    "send": "tab:blue",
    "recv": "tab:purple",
    "copy": "tab:orange",
}
_LABELS = {
    "gemm": "GEMM",
    "other": "other kernels of XLA",
    "collective": "collective kernels",
    "send": "our kernels, send",
    "recv": "our kernels, recv (waiting included)",
    "copy": "copies to other GPUs",
}


def one_layer(events: list[Event]) -> list[Event]:
    """Those of one GPU from a dispatch to before the next one: the last but one that is there.

    Raises:
      ValueError: if there are no two dispatches.
    """
    starts = [
        e.send[0].start_us for e in profiled_exchanges.exchanges(events) if e.op == "dispatch"
    ]
    if len(starts) < 2:
        raise ValueError(f"expected at least two dispatches in the profile, got {len(starts)}")
    begin, end = starts[-2:]
    return [event for event in events if begin <= event.start_us < end]


def draw(events: list[Event], gpus: list[int], path: pathlib.Path) -> None:
    """Writes a picture with one layer of each of these GPUs.

    Raises:
      ValueError: for a GPU without at least two dispatches in the events.
    """
    parts = trace.by_gpu(events)
    draw_parts({gpu: one_layer(parts.get(gpu, [])) for gpu in gpus}, path)


def draw_parts(layers: dict[int, list[Event]], path: pathlib.Path) -> None:
    """Writes a picture of these events of each GPU."""
    gpus = list(layers)
    begin = min(part[0].start_us for part in layers.values())
    size = (14, 0.8 + 2.6 * len(gpus))
    figure, panels = plt.subplots(len(gpus), 1, figsize=size, squeeze=False, sharex=True)
    for panel, (gpu, part) in zip(panels[:, 0], layers.items(), strict=True):
        _draw_gpu(panel, part, begin)
        panel.set_title(f"GPU {gpu}", loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("microseconds")
    shown = {_color_of(event, _sends(part)) for part in layers.values() for event in part}
    handles = [Patch(color=_COLORS[key], label=_LABELS[key]) for key in _COLORS if key in shown]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=9)
    figure.tight_layout(rect=(0, 0.3 / size[1] + 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _sends(events: list[Event]) -> set[Event]:
    """Our kernels that belong to a send."""
    return {kernel for exchange in profiled_exchanges.exchanges(events) for kernel in exchange.send}


def _color_of(event: Event, sends: set[Event]) -> str:
    if event.kind == "ours":
        return "send" if event in sends else "recv"
    return event.kind


def _draw_gpu(panel: Axes, events: list[Event], begin: float) -> None:
    """The streams that compute in one lane each, and below them those that copy."""
    copies = trace.peer_copies(events)
    copying = sorted({event.stream for event in copies})
    computing = sorted({event.stream for event in events} - set(copying))
    lanes = {stream: place for place, stream in enumerate([*computing, *copying])}
    sends = _sends(events)
    for event in events:
        panel.broken_barh(
            [(event.start_us - begin, event.duration_us)],
            (lanes[event.stream] - 0.4, 0.8),
            color=_COLORS[_color_of(event, sends)],
            linewidth=0,
        )
    names = [f"stream {s}" for s in computing] + [f"copies, stream {s}" for s in copying]
    panel.set_yticks(range(len(lanes)), names, fontsize=8)
    panel.set_ylim(len(lanes) - 0.4, -1.3)
    for exchange in profiled_exchanges.exchanges(events):
        for half, kernels in (("send", exchange.send), ("recv", exchange.recv)):
            if kernels:
                _mark(panel, f"{exchange.op} {half}", kernels, begin, _COLORS[half])


def _mark(panel: Axes, text: str, kernels: list[Event], begin: float, color: str) -> None:
    """A bracket above the first lane, over all of the kernels."""
    left = kernels[0].start_us - begin
    right = max(kernel.end_us for kernel in kernels) - begin
    panel.plot([left, right], [-0.55, -0.55], color=color, linewidth=2)
    panel.text((left + right) / 2, -0.7, text, ha="center", va="bottom", fontsize=8, color=color)
