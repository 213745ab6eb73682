"""`BufferStats`: what ranks have exchanged, and for which ranks they have waited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jax_sm_free import transports
from jax_sm_free.native import Native


@dataclasses.dataclass(frozen=True)
class RankStats:
    """What one rank has counted since its buffer was opened. No number ever falls.

    Entry p of a tuple is about rank p of the same group. Bytes are those of token rows as they
    travel, without headers and routing. With a `wire_dtype` these are values and scales. Rows that
    a rank has for itself are counted, too, although they never leave the rank.

    A recv *waits* while it can do nothing because the message that it needs next has not come.
    Time runs for each rank whose message the recv still needs, from the beginning of the wait until
    the recv finds that message. So if a recv waits for several ranks at once, the last rank to come
    gets the most time. A rank whose message was there before the recv gets none. A wait counts when
    it has ended, also if it ended with a fault.

    On CPU a recv waits once, for all messages. On GPUs it may wait several times. It waits for
    notices, which go ahead of the rows and say how many there are. It then waits for the rows.
    Large messages come in parts, and the recv unpacks between two waits. The waits add up. Waiting
    for other groups of the mesh, which a recv does on CPU, counts for no rank. Nor does the compute
    that XLA puts between a send and its recv.

    Attributes:
      device: the rank's device, as JAX prints it.
      group: number of the group, the position along the mesh axes that are not the buffer's.
      rank: in the group.
      exchanges: how many exchanges of each kind a recv of this rank has taken. The kinds are
        "dispatch" and "combine", and their gradients "dispatch_backward" and "combine_backward".
      bytes_sent: to each rank; counted when a send packs them.
      bytes_received: from each rank; counted when a recv takes the exchange.
      rows_dropped: expert rows that had no place here: the sum of all `Received.dropped`.
      waited_s: seconds that recvs of this rank have waited for each rank.
    """

    device: str
    group: int
    rank: int
    exchanges: dict[str, int]
    bytes_sent: tuple[int, ...]
    bytes_received: tuple[int, ...]
    rows_dropped: int
    waited_s: tuple[float, ...]

    def __sub__(self, before: RankStats) -> RankStats:
        """What this rank has counted since `before`."""
        ours, theirs = ((each.device, each.group, each.rank) for each in (self, before))
        if ours != theirs:
            raise ValueError(f"expected stats of one rank, got those of {ours} and {theirs}")
        kinds = self.exchanges
        return dataclasses.replace(
            self,
            exchanges={kind: kinds[kind] - before.exchanges[kind] for kind in kinds},
            bytes_sent=_difference(self.bytes_sent, before.bytes_sent),
            bytes_received=_difference(self.bytes_received, before.bytes_received),
            rows_dropped=self.rows_dropped - before.rows_dropped,
            waited_s=_difference(self.waited_s, before.waited_s),
        )


@dataclasses.dataclass(frozen=True)
class BufferStats:
    """A snapshot of what the ranks of this process have counted since the buffer was opened.

    Subtract two snapshots, `after - before`, to get what was counted between them. `str()` gives a
    table, and `as_dict()` gives data for a dashboard.

    Attributes:
      ranks: by group and rank; empty for devices that are only described.
    """

    ranks: tuple[RankStats, ...]

    def __sub__(self, before: BufferStats) -> BufferStats:
        """What was counted since `before`, a snapshot of the same buffer."""
        if len(self.ranks) != len(before.ranks):
            raise ValueError(
                f"expected two snapshots of the same ranks, got {len(self.ranks)} and "
                f"{len(before.ranks)} of them"
            )
        pairs = zip(self.ranks, before.ranks, strict=True)
        return BufferStats(tuple(rank - earlier for rank, earlier in pairs))

    def as_dict(self) -> dict[str, Any]:
        """The snapshot as dictionaries, tuples, strings and numbers, which `json.dumps` takes."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.ranks:
            return "no ranks"
        tables = [_table(("exchanges", *_SHORT_KINDS.values(), "dropped"), self.ranks, _exchanges)]
        peers = tuple(map(str, range(len(self.ranks[0].waited_s))))
        for title, cells in _BY_PEER.items():
            tables.append(_table((title, *peers), self.ranks, cells))
        return "\n\n".join(tables)


def read(native: Native, buffer_id: int, mesh: Mesh) -> BufferStats:
    """The stats of the ranks of this process."""
    ranks = []
    for device in mesh.devices.flat:
        if device.process_index != jax.process_index():
            continue
        counted = native.stats(buffer_id, transports.ordinal(device))
        ranks.append(
            RankStats(
                device=str(device),
                group=counted["group"],
                rank=counted["rank"],
                exchanges=counted["exchanges"],
                bytes_sent=tuple(counted["bytes_sent"]),
                bytes_received=tuple(counted["bytes_received"]),
                rows_dropped=counted["rows_dropped"],
                waited_s=tuple(ns / 1e9 for ns in counted["waited_ns"]),
            )
        )
    return BufferStats(tuple(sorted(ranks, key=lambda rank: (rank.group, rank.rank))))


# The names of the kinds in a table.
_SHORT_KINDS = {
    "dispatch": "dispatch",
    "combine": "combine",
    "dispatch_backward": "dispatch'",
    "combine_backward": "combine'",
}


def _exchanges(rank: RankStats) -> list[str]:
    return [*(str(rank.exchanges[kind]) for kind in _SHORT_KINDS), str(rank.rows_dropped)]


def _megabytes(counts: tuple[int, ...]) -> list[str]:
    return [f"{count / 1e6:.2f}" for count in counts]


_BY_PEER: dict[str, Callable[[RankStats], list[str]]] = {
    "MB sent to": lambda rank: _megabytes(rank.bytes_sent),
    "MB received from": lambda rank: _megabytes(rank.bytes_received),
    "seconds waited for": lambda rank: [f"{seconds:.3f}" for seconds in rank.waited_s],
}


def _table(
    head: tuple[str, ...], ranks: tuple[RankStats, ...], cells: Callable[[RankStats], list[str]]
) -> str:
    """A line for each rank: its name, and right-aligned columns behind it."""
    many = len({rank.group for rank in ranks}) > 1
    lines = [list(head)]
    for rank in ranks:
        group = f"group {rank.group} " if many else ""
        lines.append([f"{group}rank {rank.rank}", *cells(rank)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _difference(after: tuple[Any, ...], before: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a - b for a, b in zip(after, before, strict=True))
