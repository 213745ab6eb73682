"""Who waits for whom: whether all ranks wait for one of them, which is slow or has a slow link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_sm_free.doctor.findings import Finding, note
from jax_sm_free.stats import BufferStats

# A rank stands out if the others wait for it for so much of the time, and so many times as long as
# for any other: ranks that are equally fast wait for each other in turn.
_SHARE, _TIMES = 0.25, 2.0


def of_all_ranks(stats: BufferStats, mesh: Mesh) -> np.ndarray:
    """Seconds that each rank has waited for each: f32 [ranks, ranks]. Collective.

    Args:
      stats: of the ranks of this process.
      mesh: of one axis, and one group.
    """
    here = {rank.rank: np.array([rank.waited_s], np.float32) for rank in stats.ranks}

    def waits_of(index: Any) -> np.ndarray:
        return here[index[0].start or 0]

    by_rank = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    waited = jax.make_array_from_callback((mesh.size, mesh.size), by_rank, waits_of)
    everywhere = NamedSharding(mesh, PartitionSpec())
    gathered: Any = jax.jit(lambda waited: waited, out_shardings=everywhere)(waited)
    return np.asarray(gathered)


def who_stands_out(waited: np.ndarray, seconds: float) -> Iterator[Finding]:
    """Names the rank that the others wait for, if there is one.

    Args:
      waited: seconds that each rank has waited for each, [ranks, ranks].
      seconds: how long all of it took.
    """
    others = ~np.eye(len(waited), dtype=bool)
    late = np.array([np.median(waited[others[:, rank], rank]) for rank in range(len(waited))])
    next_one, last = np.argsort(late)[-2:]
    if late[last] < _SHARE * seconds or late[last] < _TIMES * late[next_one]:
        return
    yield note(
        f"the other ranks wait for rank {last}: {late[last] / seconds:.0%} of the time, and "
        f"{late[next_one] / seconds:.0%} for the next\none, rank {next_one}: rank {last} is slow, "
        "or its links are, or it runs something else, too"
    )
