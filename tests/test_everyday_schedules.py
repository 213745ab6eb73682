"""What XLA:GPU makes of the programs that people train, with the flags that they set.

Each token is received exactly once, and each exchange of the program is one in what is compiled.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import aot
import everyday
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from everyday import PROGRAMS, Program
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_sm_free as smf

NUM_RANKS = 4
KINDS = ("dispatch", "combine", "dispatch_backward", "combine_backward")


def pipelined(*collectives: str) -> dict[str, Any]:
    """Options that make XLA start a collective of a loop in the iteration before."""
    if jaxlib.version.__version_info__ < (0, 11, 2):
        return {f"xla_gpu_enable_pipelined_{name}": True for name in collectives}
    return {f"xla_gpu_pipeline_{name}": "COLLECTIVE_PIPELINING_MODE_ON" for name in collectives}


# What MaxText and TransformerEngine recommend on GPUs, and what single flags of theirs change.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "slice_fusion": {"xla_gpu_enable_dynamic_slice_fusion": True},
    "double_buffering": {"xla_gpu_enable_while_loop_double_buffering": True},
    "unrolled_loops": {"xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_FULL_UNROLL"},
    "maxtext": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_enable_command_buffer": "",
        "xla_gpu_enable_highest_priority_async_stream": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": 134217728,
        "xla_gpu_all_gather_combine_threshold_bytes": 134217728,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 67108864,
        "xla_gpu_enable_while_loop_double_buffering": True,
        **pipelined("all_gather", "reduce_scatter", "all_reduce"),
    },
    "transformer_engine": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION",
        "xla_gpu_graph_min_graph_size": 1,
        **pipelined("all_gather", "reduce_scatter", "all_reduce"),
    },
}

# With these a program may have more exchanges than were written.
COPYING = ("double_buffering", "unrolled_loops", "maxtext", "transformer_engine")


def option_set(name: str) -> Any:
    """What all versions of JAX are tested with, and what 0.10.2 alone is."""
    of_all = ("default", "maxtext")
    return pytest.param(name, marks=() if name in of_all else pytest.mark.long)


class TwoApis:
    """Buffers for GPUs that are not there."""

    overlap = staticmethod(smf.overlap)

    def __init__(self, mesh: Mesh, program: Program, dtype: Any) -> None:
        sizes = everyday.SIZES | {"dtype": dtype} | program.sizes
        self.buffer = smf.Buffer(
            mesh, "ep", num_experts=mesh.shape["ep"] * everyday.LOCAL_EXPERTS, **sizes
        )
        self.second = self if program.run is not everyday.two_buffers else None
        if self.second is None:
            self.second = TwoApis(mesh, PROGRAMS["scan"], dtype)


def compile_step(program: Program, options: dict[str, Any], dtype: Any = jnp.bfloat16) -> Any:
    mesh = aot.mesh(num_gpus=NUM_RANKS)
    api = TwoApis(mesh, program, dtype)
    shapes = everyday.weight_shapes(NUM_RANKS * everyday.LOCAL_EXPERTS)
    w = {name: jax.ShapeDtypeStruct((NUM_RANKS, *s), dtype) for name, s in shapes.items()}
    x = jax.ShapeDtypeStruct((NUM_RANKS, everyday.TOKENS, everyday.HIDDEN), dtype)

    def step(w: Any, x: Any) -> Any:
        out = program.step(api, *jax.tree.map(lambda leaf: leaf[0], (w, x)))
        return jax.tree.map(lambda leaf: leaf[None], out)

    return aot.compile_for(mesh, step, (P("ep"), P("ep")), P("ep"), w, x, options=options)


def num_calls(text: str) -> Counter[str]:
    """How often each op stands in a compiled program: counted without smf.inspect."""
    return Counter(re.findall(r'custom_call_target="smf_(\w+)"', text))


def check_once(compiled: Any) -> smf.Schedule:
    """Each send has one recv, and smf.inspect sees all of them."""
    schedule = smf.inspect(compiled)
    calls = num_calls(compiled.as_text())
    for kind in KINDS:
        assert calls[f"{kind}_send"] == calls[f"{kind}_recv"], (calls, str(schedule))
    assert calls["dispatch_send"], f"expected dispatches in the compiled program, got {calls}"
    assert schedule.counts == calls
    assert not schedule.unmatched, str(schedule)
    assert not schedule.repeated, str(schedule)
    return schedule


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("options", [option_set(name) for name in OPTIONS])
def test_each_token_is_received_once(options: str, name: str) -> None:
    program = PROGRAMS[name]
    schedule = check_once(compile_step(program, OPTIONS[options]))
    if options not in COPYING and not program.is_repeated:
        assert not schedule.copied, str(schedule)


# --------------------------------------------------------------- pipelined all-gathers, by tensors


def columns_gathered(buffer: smf.Buffer, w: Any, x: Any) -> Any:
    """A layer whose ranks move a part of the columns each, as tensor parallelism has it.

    Under remat its dispatch starts from what the forward pass has saved, not from the state of the
    backward loop. That is what lets XLA pipeline the all-gather, and so copy the exchange.
    """
    topk_idx = jnp.broadcast_to(
        jnp.arange(everyday.TOP_K, dtype=jnp.int32), (x.shape[0], everyday.TOP_K)
    )
    recv = buffer.dispatch(x, topk_idx, jnp.ones(topk_idx.shape))
    rows = jax.lax.all_gather(recv.x, "tp", axis=1, tiled=True)
    y = jnp.tanh(rows @ w)
    y = jax.lax.psum_scatter(y, "tp", scatter_dimension=1, tiled=True)
    return x + buffer.combine(y, recv.layout, weights=recv.weights)


def gathered_schedule(options: dict[str, Any]) -> smf.Schedule:
    devices = aot.mesh(num_gpus=NUM_RANKS).devices.reshape(2, 2)
    mesh = Mesh(np.array(devices), ("ep", "tp"))
    sizes = everyday.SIZES | {"hidden": everyday.HIDDEN // 2, "num_slots": 8}
    buffer = smf.Buffer(mesh, "ep", num_experts=2 * everyday.LOCAL_EXPERTS, **sizes)

    def loss(w: Any, x: Any) -> Any:
        layer = jax.checkpoint(lambda w, x: columns_gathered(buffer, w, x), prevent_cse=False)
        out = jax.lax.scan(lambda x, w: (layer(w, x), None), x, w)[0]
        return jax.lax.pmean(jnp.square(out.astype(jnp.float32)).mean(), ("ep", "tp"))

    w = jax.ShapeDtypeStruct((everyday.NUM_LAYERS, everyday.HIDDEN, everyday.HIDDEN), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2 * everyday.TOKENS, everyday.HIDDEN), jnp.bfloat16)
    specs = (P(), P("ep", "tp"))
    step = jax.value_and_grad(loss, (0, 1))
    compiled = aot.compile_for(mesh, step, specs, (P(), specs), w, x, options=options)
    return check_once(compiled)


def test_pipelined_all_gather_keeps_pairs() -> None:
    plain = gathered_schedule({})
    assert not plain.copied, str(plain)
    schedule = gathered_schedule(pipelined("all_gather"))
    assert schedule.counts["dispatch_send"] > plain.counts["dispatch_send"], "XLA pipelined nothing"
    # The exchange that is copied runs twice in each round: `inspect` says which it is.
    copied = {step.op for copies in schedule.copied for step in copies}
    assert copied >= {"dispatch_send", "dispatch_recv"}, str(schedule)
    assert "calls in" in str(schedule)


def test_pipelined_all_gather_of_a_sum() -> None:
    """Without barriers XLA would remove the original combine_recv here, and keep its send."""
    mesh = aot.mesh(num_gpus=NUM_RANKS)
    sizes = everyday.SIZES | {"num_experts": NUM_RANKS * everyday.LOCAL_EXPERTS, "num_slots": 8}
    buffer = smf.Buffer(mesh, "ep", **sizes)

    def program(w: Any, x: Any) -> Any:
        def body(state: Any, w: Any) -> Any:
            topk_idx = jnp.zeros((x.shape[0], everyday.TOP_K), jnp.int32)
            recv = buffer.dispatch(x * w, topk_idx, jnp.ones(topk_idx.shape))
            y = buffer.combine(jnp.sin(recv.x), recv.layout, weights=recv.weights)
            gathered = jax.lax.all_gather(y, "ep", tiled=True)
            return jnp.tanh(state) + gathered[: x.shape[0]], None

        return jax.lax.scan(body, x, w)[0]

    w = jax.ShapeDtypeStruct((everyday.NUM_LAYERS,), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((NUM_RANKS * everyday.TOKENS, everyday.HIDDEN), jnp.bfloat16)
    options = pipelined("all_gather")
    compiled = aot.compile_for(mesh, program, (P(), P("ep")), P("ep"), w, x, options=options)
    assert check_once(compiled).counts["combine_recv"] > 1, "XLA pipelined nothing"
