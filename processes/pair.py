"""What a pair of processes runs, on one host or two: plain TCP, and exchanges until one fails."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from processes import rank

_CHUNK = 1 << 16


def transfer(port: int, num_bytes: int) -> float:
    """Sends `num_bytes` from process 1 to process 0; process 0 returns the seconds, 1 returns 0."""
    address = (os.environ[rank.ADDRESS].rsplit(":", 1)[0], port)
    if rank.number() == 0:
        with socket.create_server(address) as server:
            rank.announce("listens")
            with server.accept()[0] as connection:
                return _receive(connection, num_bytes)
    rank.pause("to connect")
    with socket.create_connection(address) as connection:
        connection.sendall(bytes(num_bytes))
        connection.recv(1)
    return 0.0


def _receive(connection: socket.socket, num_bytes: int) -> float:
    left, begin = num_bytes, time.monotonic()
    while left:
        left -= len(connection.recv(min(left, _CHUNK)))
        rank.announce(f"{100 * (num_bytes - left) // num_bytes} percent")
    return time.monotonic() - begin


def exchange_for_ever(timeout_s: float, tokens: int, hidden: int) -> tuple[float, str]:
    """Dispatches until a dispatch fails, and returns the time of day and the error then.

    Every token goes to the other rank. Announces each step as it begins.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_sm_free as smf
    from processes import together

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
    spec = jax.P("ep")
    buffer = smf.Buffer(
        mesh,
        "ep",
        hidden=hidden,
        num_experts=2,
        top_k=1,
        max_tokens=tokens,
        dtype=jnp.float32,
        timeout_s=timeout_s,
    )

    def received(x: Any) -> Any:
        other = jnp.full((tokens, 1), 1 - jax.lax.axis_index("ep"), jnp.int32)
        return buffer.dispatch(x, other, jnp.ones((tokens, 1))).x

    run = jax.jit(jax.shard_map(received, mesh=mesh, in_specs=spec, out_specs=spec))
    own = np.full((tokens, hidden), rank.number(), np.float32)
    x = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, spec), own)
    together.compile_and_meet(run, mesh, x)
    for step in range(1_000_000):
        rank.announce(f"step {step}.")
        try:
            out = jax.block_until_ready(run(x))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            return time.time(), str(error)
        got = np.asarray(out.addressable_shards[0].data)
        np.testing.assert_array_equal(got[:tokens], 1.0 - rank.number())
    raise AssertionError("nothing failed")
