"""What people train gives on this machine's devices what the reference gives."""

from __future__ import annotations

import functools
from typing import Any

import everyday
import jax
import jax.numpy as jnp
import pytest
import support
from everyday import PROGRAMS, Program

import jax_sm_free as smf
from jax_sm_free import reference


class TwoApis:
    """An `Api` with a second buffer, for programs that use two."""

    def __init__(self, first: support.Api, second: support.Api) -> None:
        self.buffer, self.overlap, self.second = first.buffer, first.overlap, second


def apis_for(program: Program, dtype: Any) -> tuple[TwoApis, TwoApis]:
    config = support.make_config(
        num_experts=support.SOME_RANKS * everyday.LOCAL_EXPERTS,
        **(everyday.SIZES | {"dtype": dtype} | program.sizes),
    )
    opened = [
        [support.Api(support.open_buffer(config, module=module), module) for _ in range(2)]
        for module in (smf, reference)
    ]
    return TwoApis(*opened[0]), TwoApis(*opened[1])


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_training_step(name: str, dtype: Any) -> None:
    program = PROGRAMS[name]
    apis = apis_for(program, dtype)
    arguments = everyday.make_arguments(support.SOME_RANKS, dtype)
    mesh = support.mesh_of(support.SOME_RANKS)
    ours, theirs = (support.on_ranks(functools.partial(program.step, api), mesh) for api in apis)
    got = [ours(*arguments) for _ in range(2)]
    support.assert_same_bits(got[0], got[1])
    # XLA rounds the products of both programs at other places.
    tolerance = 1e-4 if dtype == jnp.float32 else 5e-2
    support.assert_close(got[0], jax.block_until_ready(theirs(*arguments)), tolerance)
