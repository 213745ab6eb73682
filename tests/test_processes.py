"""Several JAX processes, each with a buffer over its own devices."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import pytest

import jax_sm_free

# Every rank sends its number to the other one of its process.
PROGRAM = """
import sys
import jax
address, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, num_processes=2, process_id=process)
import jax.numpy as jnp
import numpy as np
import jax_sm_free as smf

mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("ep",))
with smf.Buffer(
    mesh, "ep", hidden=1, num_experts=2, top_k=1, max_tokens=1, dtype=jnp.float32, timeout_s=20.0
) as buffer:
    def received(x):
        other = 1 - jax.lax.axis_index("ep").astype(jnp.int32).reshape(1, 1)
        return buffer.dispatch(x, other, jnp.ones((1, 1))).x[:1]

    spec = jax.P("ep")
    run = jax.jit(jax.shard_map(received, mesh=mesh, in_specs=spec, out_specs=spec))
    x = 10.0 * process + np.arange(2, dtype=np.float32).reshape(2, 1)
    print(np.asarray(run(x)).reshape(-1).tolist(), buffer.message_bytes(jax.local_devices()[1]) > 0)
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


@pytest.mark.cpu_only
def test_a_buffer_over_the_devices_of_each_process():
    root = pathlib.Path(jax_sm_free.__file__).parents[1]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-c", PROGRAM, address]
    running = [
        subprocess.Popen(
            [*command, str(process)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        ended = [(process.communicate(timeout=120), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    for (_, errors), status in ended:
        assert status == 0, errors
    assert [out.strip() for (out, _), _ in ended] == ["[1.0, 0.0] True", "[11.0, 10.0] True"]
