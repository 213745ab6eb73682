"""The transports, and which of them connects the devices of a mesh.

Each transport is one object, of a class in a file of its own. A new transport is a new file here,
and one more entry of `_TRANSPORTS`.
"""

from __future__ import annotations

import logging

from jax.sharding import Mesh

from jax_sm_free.transports.cuda_peer import CudaPeer
from jax_sm_free.transports.described import Described
from jax_sm_free.transports.devices import Devices, ordinal
from jax_sm_free.transports.in_process import InProcess
from jax_sm_free.transports.nvshmem import Nvshmem
from jax_sm_free.transports.transport import Opened, Transport
from jax_sm_free.transports.ucx import Ucx

__all__ = ["Opened", "Transport", "choose", "ordinal"]

_log = logging.getLogger(__name__)

# In order of preference: "auto" takes the first one that connects the devices.
_TRANSPORTS: tuple[Transport, ...] = (InProcess(), Ucx(), CudaPeer(), Nvshmem())


def choose(mesh: Mesh, name: str) -> Transport:
    """The transport for a mesh.

    Args:
      mesh: the devices. They may be described only, to compile for.
      name: "auto", or the name of the transport that the caller expects.

    Raises:
      ValueError: for an unknown name, and for devices that the transport does not connect.
      NotImplementedError: for devices of a platform that has no transport.
    """
    choices = ("auto", *(each.name for each in _TRANSPORTS))
    if name not in choices:
        raise ValueError(f"expected transport to be one of {choices}, got {name!r}")
    devices = Devices.of(mesh)
    if devices.are_described:
        return Described(_for_real(devices))
    wanted = [each for each in _TRANSPORTS if name in ("auto", each.name)]
    chosen = next((each for each in wanted if each.why_not(devices) is None), None)
    if chosen is None:
        raise ValueError(_refusal(name, devices))
    if name == "auto":
        _log.info("transport %r: %d %s", chosen.name, mesh.devices.size, devices)
    return chosen


def _refusal(name: str, devices: Devices) -> str:
    """The text of an error: the transport of this name does not connect the devices."""
    why_not = {each.name: each.why_not(devices) for each in _TRANSPORTS}
    fitting = [repr(each) for each, reason in why_not.items() if reason is None]
    if fitting:
        return (
            f"expected transport {' or '.join(fitting)} for {devices}, got {name!r}: "
            f"{why_not[name]}"
        )
    reasons = "; ".join(
        str(why_not[each.name])
        for each in _TRANSPORTS
        if name == each.name or (name == "auto" and each.platform == devices.platform)
    )
    return f"expected devices that a transport connects, got {devices}: {reasons}"


def _for_real(devices: Devices) -> Transport:
    """The transport of the devices as they are where the program will run.

    How many devices a process has there is not known: a description counts hosts as processes.
    """
    kind = devices.platform, devices.span_processes
    return next(each for each in _TRANSPORTS if (each.platform, each.spans_processes) == kind)
