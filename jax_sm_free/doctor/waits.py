"""Whether all ranks wait for one of them, because it is slow or has a slow link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_sm_free.doctor.findings import Finding, note
from jax_sm_free.stats import BufferStats

# A rank stands out if the others wait for it for at least this share of the time, and at least so
# many times as long as for any other rank. Ranks that are equally fast wait for each other in turn.
_SHARE, _TIMES = 0.25, 2.0


def of_all_ranks(stats: BufferStats, mesh: Mesh) -> np.ndarray:
    """Seconds that each rank has waited for each other: f32 [ranks, ranks]. Collective.

    Args:
      stats: of the ranks of this process.
      mesh: a mesh of one group.
    """
    here = {rank.rank: np.array([rank.waited_s], np.float32) for rank in stats.ranks}

    def waits_of(index: Any) -> np.ndarray:
        return here[index[0].start or 0]

    by_rank = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    waited = jax.make_array_from_callback((mesh.size, mesh.size), by_rank, waits_of)
    everywhere = NamedSharding(mesh, PartitionSpec())
    gathered: Any = jax.jit(lambda waited: waited, out_shardings=everywhere)(waited)
    return np.asarray(gathered)


def who_stands_out(waited: np.ndarray, seconds: float) -> Iterator[Finding]:
    """A note about the rank for which the others wait, if there is one.

    Args:
      waited: seconds that each rank has waited for each other, [ranks, ranks].
      seconds: how long the exchanges took.
    """
    others = ~np.eye(len(waited), dtype=bool)
    late = np.array([np.median(waited[others[:, rank], rank]) for rank in range(len(waited))])
    next_one, last = np.argsort(late)[-2:]
    if late[last] < _SHARE * seconds or late[last] < _TIMES * late[next_one]:
        return
    yield note(
        f"the other ranks wait for rank {last}: {late[last] / seconds:.0%} of the time, and "
        f"{late[next_one] / seconds:.0%} for the next\none, rank {next_one}: rank {last} is slow, "
        "or its links are slow, or it runs other work, too"
    )
