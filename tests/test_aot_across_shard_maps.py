"""What XLA:GPU makes of sends and recvs in different shard_maps, for four described H200s."""

from __future__ import annotations

import functools
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_sm_free as smf

T, H, F, E, K, CAPACITY = 1024, 1024, 2048, 8, 2, 1024
ROWS = P(("data", "expert"))
# The shared experts' weights are sharded over "data", as FSDP has it, or over "expert", as tensor
# parallelism has it. XLA adds the collectives.
SHARDED = {
    "fsdp": {"up": P("data"), "down": P(None, "data")},
    "tensor_parallel": {"up": P(None, "expert"), "down": P("expert")},
}
SHAPES = {
    "router": (H, E),
    "first": {"up": (H, F), "down": (F, H)},
    "second": {"up": (H, F), "down": (F, H)},
    "up": (E, H, F),
    "down": (E, F, H),
}


def shared(x: Any, w: Any) -> Any:
    with jax.named_scope("shared_mlp"):
        return jax.nn.silu(x @ w["up"]) @ w["down"]


def send(buffer: smf.Buffer, x: Any, router: Any) -> smf.Sent:
    weights, topk_idx = jax.lax.top_k(jax.nn.softmax((x @ router).astype(jnp.float32)), K)
    return buffer.dispatch_send(x, topk_idx, weights)


def turn_round(buffer: smf.Buffer, sent: smf.Sent, up: Any, down: Any) -> smf.Sent:
    recv = buffer.dispatch_recv(sent)
    batch = recv.x.reshape(-1, CAPACITY, H)
    y = (jax.nn.silu(batch @ up) @ down).reshape(recv.x.shape)
    return buffer.combine_send(y, recv.layout, weights=recv.weights)


def layer(buffer: smf.Buffer, x: Any, w: Any, check_vma: bool) -> Any:
    mapped = functools.partial(jax.shard_map, mesh=buffer.mesh, check_vma=check_vma)
    specs, experts = buffer.sent_specs, P("expert")
    sent = mapped(functools.partial(send, buffer), in_specs=(ROWS, P()), out_specs=specs)(
        x, w["router"]
    )
    first, sent = smf.overlap(sent, shared, x, w["first"])
    sent = mapped(
        functools.partial(turn_round, buffer), in_specs=(specs, experts, experts), out_specs=specs
    )(sent, w["up"], w["down"])
    second, sent = smf.overlap(sent, shared, x, w["second"])
    return first + second + mapped(buffer.combine_recv, in_specs=specs, out_specs=ROWS)(sent)


def num_shared(pair: Any) -> int:
    """GEMMs of shared experts between a send and its recv."""
    return sum("shared_mlp" in gemm.op_name for gemm in pair.gemms)


@pytest.mark.parametrize(
    ("how", "check_vma"),
    [
        ("fsdp", True),
        pytest.param("fsdp", False, marks=pytest.mark.long),
        pytest.param("tensor_parallel", True, marks=pytest.mark.long),
    ],
)
def test_shared_experts_outside_of_shard_map_lie_between(how: str, check_vma: bool) -> None:
    """Their two GEMMs within a pair of the forward pass, the four of their gradient backward."""
    devices = aot.mesh().devices.reshape(2, 2)
    mesh = Mesh(devices, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    buffer = smf.Buffer(
        mesh, "expert", hidden=H, num_experts=E, top_k=K, max_tokens=T, expert_capacity=CAPACITY
    )
    specs = {
        "router": P(),
        "first": SHARDED[how],
        "second": SHARDED[how],
        "up": P("expert", "data"),
        "down": P("expert", None, "data"),
    }

    def placed(shape: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    w = jax.tree.map(placed, SHAPES, specs, is_leaf=is_shape)
    x = placed((4 * T, H), ROWS)

    def loss(x: Any, w: Any) -> Any:
        return jnp.square(layer(buffer, x, w, check_vma).astype(jnp.float32)).mean()

    schedule = smf.inspect(jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile())
    assert not schedule.unmatched, str(schedule)
    assert schedule.num_slots <= buffer.config.num_slots, str(schedule)
    assert {pair.send.op: num_shared(pair) for pair in schedule.pairs} == {
        "dispatch_send": 2,
        "combine_send": 2,
        "combine_backward_send": 4,
        "dispatch_backward_send": 4,
    }, str(schedule)
