"""Opening a buffer over CPU devices of several processes: the wire between them, and its limits."""

from __future__ import annotations

import importlib.util
import json
import logging
import pathlib
from typing import Any

from jax.sharding import Mesh

from jax_sm_free import identity, limits, networks
from jax_sm_free.bootstrap import Bootstrap, facts_of
from jax_sm_free.config import Config
from jax_sm_free.native import Native

_log = logging.getLogger(__name__)

# How long a process may take to be heard of once all have connected: TCP asks four times in it.
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


def open_buffer(
    native: Native,
    mesh: Mesh,
    axes: tuple[str, ...],
    config: Config,
    places: list[tuple[int, int, int] | None],
    process_of_rank: list[list[int]],
    description: str,
) -> tuple[int, str]:
    """Opens this process's part of a buffer. Collective.

    Buffers of the same processes and the same `timeout_s` share one wire for as long as one of them
    is open.

    Args:
      native: the extension.
      mesh: the devices.
      axes: of the mesh, along which the ranks are.
      config: the sizes.
      places: of this process's devices, as for `Native.open_buffer`.
      process_of_rank: JAX's index of each rank's process, by [group][rank].
      description: what the name of the buffer begins with.

    Returns:
      The number and the name of the buffer, the same in all processes.

    Raises:
      RuntimeError: in all processes, if one cannot open it or cannot be reached by another.
    """
    buffer_id = wire = None
    try:
        with Bootstrap(mesh, config.timeout_s) as bootstrap:
            bootstrap.compare(facts_of(mesh, axes, config, "ucx", description))
            key = f"{bootstrap.processes} {config.timeout_s}"
            wire = native.find_wire(key)
            wire_id = None if wire is None else native.wire_id(wire)
            offers = _tell(bootstrap, wire_id)
            buffer_id, name = identity.agree(
                bootstrap.exchange, description, native.lowest_free_id()
            )
            found: networks.Networks | None = None
            if wire is None or any(wire_id != offered for offered in offers):
                found = networks.explore(lambda what: _tell(bootstrap, what), bootstrap.index)
                wire = _open_wire(native, bootstrap, found, buffer_id, key, config.timeout_s)
            native.open_ucx_buffer(
                buffer_id,
                name,
                config,
                places,
                bootstrap.index,
                len(bootstrap.processes),
                [[bootstrap.processes.index(p) for p in ranks] for ranks in process_of_rank],
                wire,
            )
            addresses = bootstrap.exchange(native.address(buffer_id))
            unreached = native.connect(buffer_id, addresses, _CONNECT_S)
            if unreached:
                raise RuntimeError(_describe(bootstrap, unreached, found))
    except BaseException:
        if buffer_id is not None:
            native.close_buffer(buffer_id)
        raise
    finally:
        del wire  # The traceback of an error would keep it open.
    return buffer_id, name


def _open_wire(
    native: Native,
    bootstrap: Bootstrap,
    found: networks.Networks,
    wire_id: int,
    key: str,
    timeout_s: float,
) -> Any:
    path = library()
    num_processes = len(bootstrap.processes)
    limits.check_descriptors(num_processes - 1)
    settings = _settings(found, bootstrap.index)
    if has_rdma(path) and (little := limits.why_little_locked_memory()):
        _log.warning("transport 'ucx': %s", little)
    return native.open_wire(wire_id, key, bootstrap.index, num_processes, path, timeout_s, settings)


def _settings(found: networks.Networks, index: int) -> dict[str, str]:
    """What UCX is told because of this host. The variables of the environment go before it."""
    settings = {}
    if useless := found.useless(index):
        # Names what UCX shall not use, so that RDMA devices stay.
        settings["NET_DEVICES"] = "^" + ",".join(useless)
        _log.info("transport 'ucx' leaves out %s: no other host answers there", ", ".join(useless))
    if missing := limits.why_no_shared_memory():
        settings["TLS"] = "^cuda,posix,sysv"  # UCX would not start.
        if found.num_here(index) > 1:
            _log.warning("transport 'ucx': processes of this host exchange by TCP: %s", missing)
    return settings


def _tell(bootstrap: Bootstrap, what: Any) -> list[Any]:
    """What all processes tell, in their order; tuples become lists. Collective."""
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
        f"did not reach {'; '.join(texts)}. UCX_NET_DEVICES=eth0, for one, chooses the network, "
        "UCX_TLS=tcp the transport, and UCX_LOG_LEVEL=info shows what UCX chose"
    )
