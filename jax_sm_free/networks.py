"""Finds out by trying which network interfaces lead from host to host.

UCX uses every interface that is up and has a route to the address of the peer. Some such interfaces
do not lead to the peer: a bridge that several hosts have under one address (docker0), or a second
network that is not connected.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

# Seconds that a host may take to answer.
_ANSWER_S = 2.0
_AT_ONCE = 64

_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 0x1, 0x8, 0x40


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One interface of another host, tried from this one.

    Attributes:
      host, interface: the number of the other host, and the name of its interface.
      by: the interface of this host by which the other one was reached; empty if it was not.
      error: why the other interface was not reached.
    """

    host: int
    interface: str
    by: str
    error: str


@dataclasses.dataclass(frozen=True)
class Host:
    """Processes that share their network interfaces.

    Attributes:
      name: of the host.
      interfaces: IPv4 addresses of the interfaces that are up and lead out of the host, by name.
      attempts: of this host, to reach other hosts.
    """

    name: str
    interfaces: dict[str, str]
    attempts: list[Attempt]


class Networks:
    """What the processes found out together. It is the same in all of them."""

    def __init__(self, host_of: list[int], hosts: list[Host]) -> None:
        """`host_of` has for each process the place of its host in `hosts`."""
        self._host_of = host_of
        self._hosts = hosts

    def num_here(self, process: int) -> int:
        """Processes on the host of `process`, itself included."""
        return self._host_of.count(self._host_of[process])

    def useless(self, process: int) -> list[str]:
        """Interfaces of the process's host that lead to no other host, in either direction.

        The list is empty if no interface leads to another host, because then it is not known which
        ones are useless.
        """
        here = self._host_of[process]
        useful = {attempt.by for attempt in self._hosts[here].attempts}
        for host in self._hosts:
            useful |= {a.interface for a in host.attempts if a.host == here and a.by}
        names = self._hosts[here].interfaces
        return sorted(set(names) - useful) if useful & set(names) else []

    def describe(self, process: int, other: int) -> str:
        """The attempts to reach process `other` from `process`, and their outcomes, as text."""
        here, there = self._hosts[self._host_of[process]], self._host_of[other]
        if here is self._hosts[there]:
            return f"both on host {here.name}"
        texts = [
            f"{a.interface} {self._hosts[there].interfaces[a.interface]} "
            + (f"answers by {a.by}" if a.by else f"does not: {a.error}")
            for a in here.attempts
            if a.host == there
        ]
        tried = "; ".join(texts) or "it has no network interface that is up"
        return f"from host {here.name} to host {self._hosts[there].name}: {tried}"


def explore(tell: Callable[[Any], Sequence[Any]], process: int) -> Networks:
    """Tries all interfaces of all hosts. Collective.

    Args:
      tell: gives something to all processes and returns what all gave, by process.
      process: the number of this process.
    """
    with _Listener() as listener:
        told = tell(
            {
                "place": _place(),
                "name": socket.gethostname(),
                "interfaces": interfaces(),
                "port": listener.port,
                "answer": listener.answer,
            }
        )
        places = [each["place"] for each in told]
        # The first process of each host speaks for it.
        speakers = [number for number, place in enumerate(places) if places.index(place) == number]
        attempts: list[Attempt] = []
        if process in speakers and len(speakers) > 1:
            others = [(i, told[s]) for i, s in enumerate(speakers) if s != process]
            attempts = _try(others, told[process]["interfaces"])
        # No process stops listening before all have tried.
        tried = tell([dataclasses.astuple(attempt) for attempt in attempts])
    hosts = [
        Host(told[s]["name"], told[s]["interfaces"], [Attempt(*attempt) for attempt in tried[s]])
        for s in speakers
    ]
    return Networks([speakers.index(places.index(place)) for place in places], hosts)


def interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that is up and leads out of the host, by name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                (flags,) = struct.unpack_from("H", fcntl.ioctl(asked, _SIOCGIFFLAGS, request), 16)
                address = fcntl.ioctl(asked, _SIOCGIFADDR, request)[20:24]
            except OSError:  # It has no such address, or has just gone.
                continue
            if flags & (_IFF_UP | _IFF_LOOPBACK | _IFF_RUNNING) == _IFF_UP | _IFF_RUNNING:
                found[name] = socket.inet_ntoa(address)
    return found


def _place() -> list[str]:
    """The same text in processes that have the same interfaces. A sandbox may hide some of it."""
    place = [socket.gethostname()]
    with contextlib.suppress(OSError):
        place.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        place.append(os.readlink("/proc/self/ns/net"))
    return place


def _try(others: Sequence[tuple[int, Any]], own: dict[str, str]) -> list[Attempt]:
    names = {address: name for name, address in own.items()}

    def attempt(target: tuple[int, Any, str]) -> Attempt:
        number, host, interface = target
        try:
            address = _ask(host["interfaces"][interface], host["port"], host["answer"])
        except OSError as error:
            return Attempt(number, interface, "", str(error))
        return Attempt(number, interface, names.get(address, address), "")

    targets = [(number, host, name) for number, host in others for name in host["interfaces"]]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(attempt, targets))


def _ask(address: str, port: int, answer: str) -> str:
    """The address by which this host reaches a listener. Raises OSError if it does not."""
    with socket.create_connection((address, port), _ANSWER_S) as connection:
        got = b""
        while len(got) < len(answer) and (more := connection.recv(len(answer) - len(got))):
            got += more
        if got != answer.encode():
            raise ConnectionError("another program answers")
        return str(connection.getsockname()[0])


class _Listener:
    """Answers all connections, on all interfaces, inside of its `with` block."""

    def __init__(self) -> None:
        self.answer = secrets.token_hex(8)
        self._server = socket.create_server(("", 0), backlog=256)
        self.port = int(self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> _Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # ends accept
        self._thread.join()
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(self.answer.encode())
