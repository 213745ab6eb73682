"""Runs every kernel once, small: a program for memory checkers.

    make CUDA=1 sanitize-gpu
    python tests/every_kernel.py float32    # one dtype

Rows of whole 16-byte words and others, of all dtypes, on a float8 wire too, forward and backward,
by experts and by tokens, with and without weights, in messages that leave whole and in parts, with
few rows in common and with nearly all, in one tier and, on two devices or more, in two. It checks
no numbers: tests do that.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import conftest  # noqa: F401 - chooses the devices
import jax
import jax.numpy as jnp
import numpy as np
import sample_inputs
import sample_programs
import support
from support import Api

import jax_sm_free as smf


def loss(api: Api, program: Any, x: Any, topk_idx: Any, weights: Any, y: Any) -> Any:
    recv, out = program(api, x, topk_idx, weights, y)
    leaves = [leaf for leaf in jax.tree.leaves((recv.x, out)) if leaf.size]
    return sum(jnp.nansum(leaf.astype(jnp.float32) ** 2) for leaf in leaves)


def run(config: smf.Config) -> None:
    inputs = sample_inputs.make_inputs(config)
    with support.open_buffer(config) as buffer:
        for program in (sample_programs.round_trip, sample_programs.round_trip_tokens):
            rows = sample_programs.num_rows(config, program)
            y = np.ones((config.ep_size, rows, config.hidden), config.dtype)
            fn = functools.partial(loss, Api(buffer, smf), program)
            grad = support.on_ranks(jax.grad(fn, (0, 2, 3)), buffer.mesh)
            jax.block_until_ready(grad(*inputs, y))
        buffer.check()
    print(config.dtype, config.hidden, config.wire_dtype or "", flush=True)


def run_pair(config: smf.Config) -> None:
    """Rows of values and scales, which have no gradient."""
    x, *routing = sample_inputs.make_inputs(config)
    scales = np.ones((*x.shape[:2], 1), np.float32)
    with support.open_buffer(config) as buffer:
        dispatch = support.on_ranks(
            lambda x, scales, *routing: buffer.dispatch((x, scales), *routing).x, buffer.mesh
        )
        jax.block_until_ready(dispatch(x[..., : config.hidden // 2], scales, *routing))
        buffer.check()
    print(config.dtype, config.hidden, "with scales", flush=True)


def main() -> None:
    ranks = min(support.SOME_RANKS, jax.device_count())
    make = functools.partial(
        support.make_config, ranks, max_tokens=40, num_experts=2 * ranks, recv_capacity=60
    )
    for dtype in map(jnp.dtype, sys.argv[1:] or ("bfloat16", "float16", "float32")):
        for hidden in (7, 512, 1024):
            run(make(dtype=dtype, hidden=hidden))
            run(make(dtype=dtype, hidden=hidden, wire_dtype=jnp.float8_e4m3fn))
        for hidden in (7, 512) if ranks % 2 == 0 else ():
            run(make(dtype=dtype, hidden=hidden, num_nodes=2))
    run_pair(make(dtype=jnp.bfloat16, hidden=512))
    in_parts = functools.partial(make, dtype=jnp.bfloat16, max_tokens=1100, recv_capacity=2000)
    run(in_parts(hidden=2048))
    run(in_parts(hidden=2048, top_k=4 * ranks))
    run(in_parts(hidden=4096, wire_dtype=jnp.float8_e4m3fn))


if __name__ == "__main__":
    main()
