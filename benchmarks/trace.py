"""What GPUs did, read from a profile of `jax.profiler`.

A profile holds a trace.json.gz: processes are GPUs, threads their streams, and what ran on a stream
is a complete event ("ph": "X") with times in microseconds. Times of all GPUs are of one clock.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax

Kind = Literal["ours", "gemm", "collective", "copy", "other"]
Interval = tuple[float, float]

# The phases of our kernels, by the first of these that their names contain. The long names come
# first: "PackSums" is no "Pack".
_PHASES = (
    ("ForwardRows", "forward"),
    ("ForwardSums", "forward"),
    ("PackSums", "reduce-pack"),
    ("Unpack", "unpack"),
    ("Plan", "unpack"),
    ("Begin", "route"),
    ("Count", "route"),
    ("Place", "route"),
    ("Pack", "pack"),
    ("Wait", "wait"),
    ("Spread", "spread"),
    ("Mark", "spread"),
    ("Sum", "sum"),
)
PACK_PHASES = ("pack", "reduce-pack")  # What a send ends with.

_OURS = re.compile(r"jax_sm_free::cuda::(?:\(anonymous namespace\)::)?(\w+)")
_GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|wgmma|_dot", re.IGNORECASE)
_COLLECTIVE = re.compile(r"nccl|all_?to_?all", re.IGNORECASE)
_COPY = re.compile(r"mem ?cpy ?(p2p|d2d|peer)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel or copy.

    Attributes:
      gpu: its number.
      stream: of that GPU.
      name: of the kernel, or what kind of copy.
      start_us: when it began.
      duration_us: how long it took.
      num_bytes: of a copy; 0 where the profile does not say.
      num_blocks: of a kernel's grid; 0 where the profile does not say.
    """

    gpu: int
    stream: int
    name: str
    start_us: float
    duration_us: float
    num_bytes: int = 0
    num_blocks: int = 0

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us

    @property
    def interval(self) -> Interval:
        return self.start_us, self.end_us

    @property
    def kind(self) -> Kind:
        if _OURS.search(self.name):
            return "ours"
        if _COPY.match(self.name):
            return "copy"
        if _COLLECTIVE.search(self.name):
            return "collective"
        return "gemm" if _GEMM.search(self.name) else "other"

    @property
    def short_name(self) -> str:
        ours = _OURS.search(self.name)
        return ours[1].removesuffix("Kernel") if ours else self.name.removeprefix("void ")[:40]

    @property
    def phase(self) -> str:
        """Of one of our kernels: "route", "pack", ...; "unknown" for a name that is not listed."""
        return next((phase for part, phase in _PHASES if part in self.short_name), "unknown")


def record(run: Callable[[], Any], directory: pathlib.Path) -> list[Event]:
    """Profiles `run`, which returns when its work is done, into `directory`; see `read`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        run()
    return read(directory)


def read(path: pathlib.Path) -> list[Event]:
    """The events of all GPUs by GPU and start; none if the profile is of a CPU.

    Args:
      path: a trace.json.gz, or a directory, of which the newest one is read.

    Raises:
      FileNotFoundError: if there is none.
    """
    if path.is_dir():
        found = sorted(path.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f"expected a *.trace.json.gz under {path}, got none")
        path = found[-1]
    with gzip.open(path, "rt") as file:
        entries = json.load(file)["traceEvents"]
    gpus, streams = _names(entries)
    events = [
        _event(entry, gpus[entry["pid"]], streams[entry["pid"], entry["tid"]])
        for entry in entries
        if entry.get("ph") == "X"
        and entry["pid"] in gpus
        and (entry["pid"], entry.get("tid")) in streams
    ]
    return sorted(events, key=lambda event: (event.gpu, event.start_us))


def _names(entries: list[dict]) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """The GPU of each process, and the stream of each (process, thread) that is one."""
    gpus, streams = {}, {}
    for entry in entries:
        label = str(entry.get("args", {}).get("name", "")) if entry.get("ph") == "M" else ""
        if entry.get("name") == "process_name" and (gpu := re.search(r"GPU:(\d+)", label)):
            gpus[entry["pid"]] = int(gpu[1])
        if entry.get("name") == "thread_name" and (stream := re.search(r"Stream #?(\d+)", label)):
            streams[entry["pid"], entry["tid"]] = int(stream[1])
    return gpus, streams


def _event(entry: dict, gpu: int, stream: int) -> Event:
    args = entry.get("args", {})
    size = re.search(r"\bsize:(\d+)", str(args.get("memcpy_details", "")))
    grid = re.search(r"\bgrid:(\d+),(\d+),(\d+)", str(args.get("kernel_details", "")))
    return Event(
        gpu=gpu,
        stream=stream,
        name=entry["name"],
        start_us=float(entry["ts"]),
        duration_us=float(entry.get("dur", 0)),
        num_bytes=int(size[1]) if size else 0,
        num_blocks=int(grid[1]) * int(grid[2]) * int(grid[3]) if grid else 0,
    )


# ----------------------------------------------------------------------------------------- parts


def by_gpu(events: Iterable[Event]) -> dict[int, list[Event]]:
    parts: dict[int, list[Event]] = {}
    for event in events:
        parts.setdefault(event.gpu, []).append(event)
    return parts


def exchanges(events: list[Event]) -> list[list[Event]]:
    """The events of one GPU, cut where a send of ours begins; what is before the first is left out.

    For programs in which an exchange ends before the next begins.
    """
    starts = [e.start_us for e in events if e.kind == "ours" and e.short_name.startswith("Begin")]
    ends = [*starts[1:], float("inf")]
    return [
        [event for event in events if start <= event.start_us < end]
        for start, end in zip(starts, ends, strict=True)
    ]


def peer_copies(events: list[Event]) -> list[Event]:
    """Copies on streams of their own: those of the mover, not those of XLA between its kernels."""
    computing = {event.stream for event in events if event.kind not in ("copy", "other")}
    return [event for event in events if event.kind == "copy" and event.stream not in computing]


def union(events: Iterable[Event]) -> list[Interval]:
    """When at least one of the events ran, as intervals that do not touch."""
    merged: list[Interval] = []
    for start, end in sorted(event.interval for event in events):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def common(left: Iterable[Interval], right: Iterable[Interval]) -> float:
    """Microseconds that lie in both; each side's intervals do not touch."""
    right = list(right)
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in left for b in right)
