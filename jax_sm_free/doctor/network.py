"""Network devices, shared memory, and the limits of both."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator

from jax_sm_free import limits
from jax_sm_free.doctor.findings import Finding, note, ok

_GIB = 2**30
# Less than this is small: containers that do not set a size often have 64 MiB.
_SMALL_SHM = _GIB


def check_nics(sys: pathlib.Path = pathlib.Path("/sys/class")) -> Iterator[Finding]:
    """Network interfaces that are up, and RDMA devices."""
    up = [found for path in _folders(sys / "net") if (found := _describe_interface(path))]
    yield ok(f"network interfaces: {', '.join(up)}") if up else note("no network interface is up")
    rdma = [_describe_rdma(path) for path in _folders(sys / "infiniband")]
    if not rdma:
        yield note("no RDMA device: GPUs of several hosts cannot reach each other, CPUs use TCP")
        return
    yield ok(f"RDMA devices: {', '.join(rdma)}")
    if little := limits.why_little_locked_memory():
        yield note(little)
    modules = {path.name for path in pathlib.Path("/sys/module").glob("*")}
    if not modules & {"nvidia_peermem", "nv_peer_mem"}:
        yield note("the module nvidia_peermem is not loaded: NICs may not reach the memory of GPUs")


def check_shared_memory() -> Iterator[Finding]:
    """The shared memory by which processes of one host exchange: /dev/shm and System V's."""
    usage = shutil.disk_usage("/dev/shm")
    text = f"/dev/shm has {usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB free"
    small = usage.free < _SMALL_SHM
    yield note(f"{text}: little for NCCL") if small else ok(text)
    if missing := limits.why_no_shared_memory():
        yield note(f"UCX uses TCP between processes of this host: {missing}")


def _folders(parent: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir())


def _describe_interface(path: pathlib.Path) -> str | None:
    """Name and speed of an interface that is up and leads out of the host."""
    if path.name == "lo" or _read(path / "operstate") not in ("up", "unknown"):
        return None
    speed = _read(path / "speed")
    return f"{path.name} ({speed} Mbit/s)" if speed.isdecimal() else path.name


def _describe_rdma(path: pathlib.Path) -> str:
    ports = [
        f"{_read(port / 'link_layer')} {_read(port / 'rate')} {_read(port / 'state')}"
        for port in _folders(path / "ports")
    ]
    return f"{path.name} ({'; '.join(ports)})"


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # An interface that is down has no speed, for one.
        return ""
