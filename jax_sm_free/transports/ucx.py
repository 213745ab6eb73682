"""Transport "ucx": messages between processes, over what UCX finds between them."""

from __future__ import annotations

import importlib.util
import json
import logging
import pathlib
from typing import Any

from jax_sm_free import limits, networks
from jax_sm_free.bootstrap import Bootstrap
from jax_sm_free.transports.devices import places
from jax_sm_free.transports.several_processes import Meeting, SeveralProcesses
from jax_sm_free.transports.transport import Request

_log = logging.getLogger(__name__)

# Seconds in which this process must hear of each other one, once all have connected. TCP tries four
# times within them.
_CONNECT_S = 20.0


def library() -> str:
    """The path of libucp.so.0, of the pip package libucx-cu13."""
    spec = importlib.util.find_spec("libucx")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "expected the package libucx-cu13 for transport 'ucx', which connects CPU devices of "
            "several processes, but it is not installed: pip install 'jax_sm_free[ucx]'"
        )
    return str(pathlib.Path(spec.submodule_search_locations[0], "lib", "libucp.so.0"))


def has_rdma(path: str) -> bool:
    """Whether the UCX at `path` was built with RDMA; its modules lie beside it."""
    modules = pathlib.Path(path).parent / "ucx"
    return not modules.is_dir() or any(modules.glob("libuct_ib*"))


class Ucx(SeveralProcesses):
    """Connects CPU devices of several processes: by shared memory, TCP or RDMA, as UCX chooses.

    Buffers of the same processes and the same `timeout_s` share one wire for as long as one of them
    is open.
    """

    name = "ucx"
    platform = "cpu"
    names_calls = True

    def _open_part(self, request: Request, meeting: Meeting) -> None:
        """Opens this process's part, and connects it.

        Raises:
          RuntimeError: in all processes, if one of them cannot reach another one.
        """
        native, bootstrap = request.native.module, meeting.bootstrap
        key = f"{bootstrap.processes} {request.config.timeout_s}"
        # A wire that was opened with `key`, has all its peers and is still open; else None. It
        # stays open for as long as a buffer uses it or `wire` refers to it.
        wire = native.find_wire(key)
        try:
            wire_id = None if wire is None else native.wire_id(wire)
            offers = _tell(bootstrap, wire_id)
            found: networks.Networks | None = None
            if wire is None or any(wire_id != offered for offered in offers):
                found = networks.explore(lambda what: _tell(bootstrap, what), bootstrap.index)
                wire = _open_wire(request, meeting, found, key)
            native.open_ucx_buffer(
                meeting.buffer_id,
                meeting.program_name,
                request.config.sizes(),
                places(request.mesh, request.axes),
                bootstrap.index,
                len(bootstrap.processes),
                meeting.process_of_rank,
                wire,
            )
            addresses = bootstrap.exchange(native.address(meeting.buffer_id))
            unreached = native.connect(meeting.buffer_id, addresses, _CONNECT_S)
            if unreached:
                raise RuntimeError(_describe(bootstrap, unreached, found))
        finally:
            del wire  # The traceback of an error would keep the wire open.


def _open_wire(request: Request, meeting: Meeting, found: networks.Networks, key: str) -> Any:
    """Makes this process's end of a wire. Later buffers find the wire by `key`."""
    bootstrap, path = meeting.bootstrap, library()
    num_processes = len(bootstrap.processes)
    limits.check_descriptors(num_processes - 1)
    settings = _settings(found, bootstrap.index)
    if has_rdma(path) and (little := limits.why_little_locked_memory()):
        _log.warning("transport 'ucx': %s", little)
    return request.native.module.open_wire(
        meeting.buffer_id,  # No other wire has it, and it is the same in all processes.
        key,
        bootstrap.index,
        num_processes,
        path,
        request.config.timeout_s,  # A host that does not answer for so long is lost.
        list(settings.items()),
    )


def _settings(found: networks.Networks, index: int) -> dict[str, str]:
    """UCX's settings for this host. Variables of the environment take precedence over them."""
    settings = {}
    if useless := found.useless(index):
        # Names the interfaces that UCX shall not use, so that it still uses RDMA devices.
        settings["NET_DEVICES"] = "^" + ",".join(useless)
        _log.info("transport 'ucx' leaves out %s: no other host answers there", ", ".join(useless))
    if missing := limits.why_no_shared_memory():
        settings["TLS"] = "^cuda,posix,sysv"  # With shared memory, UCX would not start.
        if found.num_here(index) > 1:
            _log.warning("transport 'ucx': processes of this host exchange by TCP: %s", missing)
    return settings


def _tell(bootstrap: Bootstrap, what: Any) -> list[Any]:
    """What all processes tell, in the order of the processes. Tuples become lists. Collective."""
    return [json.loads(told) for told in bootstrap.exchange(json.dumps(what).encode())]


def _describe(
    bootstrap: Bootstrap, unreached: list[tuple[int, str]], found: networks.Networks | None
) -> str:
    texts = []
    for index, reason in unreached:
        text = f"process {bootstrap.processes[index]}: {reason}"
        if found is not None:
            text += f" ({found.describe(bootstrap.index, index)})"
        texts.append(text)
    return (
        f"expected process {bootstrap.processes[bootstrap.index]} to reach all others by UCX, but "
        f"did not reach {'; '.join(texts)}. Set UCX_NET_DEVICES=eth0, for example, to choose the "
        "network, UCX_TLS=tcp to choose the transport, and UCX_LOG_LEVEL=info to see UCX's choice"
    )
