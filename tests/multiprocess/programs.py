"""What the ranks of the launcher's own tests run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from processes import rank


def add_up(value: int) -> tuple[int, int, list[float]]:
    """(process, devices of all, the sum over all devices on this process's devices)."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    spec = jax.P("all")
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jax.make_array_from_callback(
        (mesh.size,),
        jax.NamedSharding(mesh, spec),
        lambda index: np.full(1, value + (index[0].start or 0), np.float32),
    )
    out = jax.jit(total)(x)
    sums = [float(shard.data[0]) for shard in out.addressable_shards]
    return jax.process_index(), jax.device_count(), sums


def add_up_announced() -> Any:
    """Pauses, and then runs `add_up`."""
    rank.pause("ready")
    return add_up(0)


def fail_in(failing: int) -> None:
    """Raises in one rank when it is told to; the others wait for what never comes."""
    if rank.number() == failing:
        rank.pause("about to fail")
        raise ValueError("no such luck")
    rank.announce("waits")
    time.sleep(600)


def hang_with_child() -> None:
    """Starts a process that outlives its parent, and waits for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    rank.announce(f"child {child.pid}")
    time.sleep(600)


def wait_between() -> int:
    """Pauses, and then counts to 29 in three seconds."""
    rank.pause("before")
    for count in range(30):
        rank.announce(f"count {count}")
        time.sleep(0.1)
    return count


def gather_without_the_last() -> list[list[str]]:
    """The texts that the doctor's processes gather, where the last one says nothing."""
    import jax

    from jax_sm_free.doctor import processes
    from jax_sm_free.doctor.findings import ok

    if rank.number() == jax.process_count() - 1:
        rank.pause("silent")
        return []
    every = processes.gather([ok(f"this is {rank.number()}")], 1.0)
    return [[finding.text for finding in findings] for findings in every]


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    print("as a script", sys.argv[1:], os.environ[rank.PROCESS_ID])
