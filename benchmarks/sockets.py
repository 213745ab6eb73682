"""How fast TCP was while it had bytes to send, from what the kernel counts for each socket."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Any

_ACKNOWLEDGED = re.compile(r"\bbytes_acked:(\d+)")
_BUSY = re.compile(r"\bbusy:(\d+)ms")
_LEAST_BYTES = 1 << 20  # A connection that has sent less carries no rows; it coordinates.


def wire_rate(hosts: Sequence[Any]) -> float | None:
    """Bytes per second from host to host, the mean over the hosts, over all that was sent so far.

    The clock runs while bytes wait to be sent or to be acknowledged. What hosts do before and after
    does not count, but what they do meanwhile disturbs.

    Args:
      hosts: each with the `prefix` of a command.

    Returns:
      None if no connection that is open has carried rows.
    """
    rates = [_rate(_run(*host.prefix, "ss", "-tinH")) for host in hosts]
    found = [rate for rate in rates if rate is not None]
    return sum(found) / len(found) if found else None


def _rate(report: str) -> float | None:
    sent, busy = 0, 0.0
    for line in report.splitlines():
        acknowledged, clock = _ACKNOWLEDGED.search(line), _BUSY.search(line)
        if acknowledged and clock and int(acknowledged[1]) >= _LEAST_BYTES:
            sent += int(acknowledged[1])
            busy = max(busy, int(clock[1]) / 1e3)
    return sent / busy if busy else None


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
