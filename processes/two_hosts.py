"""Two hosts in one machine: network namespaces joined by a cable, which can be slow and be cut.

Each has a name, an address and System V memory of its own: to UCX these are two hosts, and to both
the cable is all there is. Needs Linux, root, and the programs ip and tc.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

from processes.launcher import Host

_NETWORK = "10.77.0."
_CABLE = "cable"
# The host's name is its address, so that it resolves without a name service: gloo looks it up.
_ENTER = 'hostname "$0" && exec "$@"'
_NOBODY = "02:00:00:00:00:99"
_UP_S = 10.0
_TICKS = 250  # per second, at least
_pairs = itertools.count()


class TwoHosts:
    """Both ends of the cable. `hosts` is what `launcher.start` takes."""

    def __init__(self) -> None:
        pair = f"smf{os.getpid()}_{next(_pairs)}"
        self._names = [f"{pair}a", f"{pair}b"]
        self.hosts = tuple(
            _host(name, f"{_NETWORK}{number}") for number, name in enumerate(self._names, 1)
        )

    def open(self) -> None:
        a, b = self._names
        for name in self._names:
            _run("ip", "netns", "add", name)
        peer = ("type", "veth", "peer", "name", _CABLE, "netns", b)
        _run("ip", "link", "add", _CABLE, "netns", a, *peer)
        for name, host in zip(self._names, self.hosts, strict=True):
            _run("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", _CABLE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        self.mend()

    def add_dead_end(self, name: str, addresses: Sequence[str], is_silent: bool = False) -> None:
        """Gives each host a network interface that is up and leads nowhere, as bridges do.

        `is_silent`: packets vanish, as in a firewall. Otherwise the sender gets an error.
        """
        for host, address in zip(self._names, addresses, strict=True):
            other_end = ("type", "veth", "peer", "name", f"{name}_end")
            _run("ip", "-n", host, "link", "add", name, *other_end)
            for link in (name, f"{name}_end"):
                _run("ip", "-n", host, "link", "set", link, "up")
            _run("ip", "-n", host, "address", "add", address, "dev", name)
            for other in {
                each.split("/")[0] for each in addresses if each != address and is_silent
            }:
                neighbour = ("neigh", "add", other, "lladdr", _NOBODY, "dev", name)
                _run("ip", "-n", host, *neighbour)

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def slow_down(self, megabits: int) -> None:
        """From now on each direction carries so many Mbit/s."""
        # A burst holds the largest packet, and what passes between two ticks of the kernel's clock.
        burst = max(1 << 16, megabits * 1_000_000 // 8 // _TICKS)
        shape = ("rate", f"{megabits}mbit", "burst", str(burst), "latency", "400ms")
        for name in self._names:
            _run("tc", "-n", name, "qdisc", "replace", "dev", _CABLE, "root", "tbf", *shape)

    def cut(self) -> None:
        """No packet arrives any more, and no connection gets an error."""
        self._set("down")

    def mend(self) -> None:
        """Packets arrive again when this returns: UCX takes no device that is still coming up."""
        self._set("up")
        end = time.monotonic() + _UP_S
        while any(_state(name) != "UP" for name in self._names):
            if time.monotonic() > end:
                raise TimeoutError(f"the cable is not up after {_UP_S} s")
            time.sleep(0.05)

    def num_bytes(self) -> int:
        """What the first host has sent so far."""
        (link,) = json.loads(_run("ip", "-n", self._names[0], "-s", "-j", "link", "show", _CABLE))
        return int(link["stats64"]["tx"]["bytes"])

    def _set(self, state: str) -> None:
        for name in self._names:
            _run("ip", "-n", name, "link", "set", _CABLE, state)


@contextlib.contextmanager
def joined() -> Iterator[TwoHosts]:
    """Two hosts and their cable, gone at the end."""
    hosts = TwoHosts()
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


def why_not() -> str | None:
    """Why this machine cannot make two hosts of itself; None if it can."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"needs the programs {', '.join(missing)}"
    try:
        with joined() as hosts:
            # Not every kernel has the queue that slows a link down.
            hosts.slow_down(50)
            for host in hosts.hosts:
                _run(*host.prefix, "true")
    except (OSError, TimeoutError) as error:
        return f"cannot make network namespaces: {error}"
    return None


def _host(name: str, address: str) -> Host:
    # `ip netns exec` shows the namespace's devices in /sys, too, where UCX looks for them.
    enter = ("ip", "netns", "exec", name, "unshare", "--uts", "--ipc")
    return Host((*enter, "sh", "-c", _ENTER, address), address)


def _state(name: str) -> str:
    words = _run("ip", "-n", name, "-brief", "link", "show", "dev", _CABLE).split()
    return words[1]


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
