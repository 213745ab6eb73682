"""A mixture-of-experts layer and its gradients on 8 CPU devices: the shortest complete use."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax import P

import jax_sm_free as smf

# Tokens of a rank, hidden, hidden of an expert, experts, experts of a token.
T, H, F, E, K = 128, 64, 128, 16, 2

mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
sizes = {"hidden": H, "num_experts": E, "top_k": K, "max_tokens": T}
# A rank has room for twice the rows of a balanced load. What does not fit is dropped.
sizes["capacity_factor"] = 2.0
buffer = smf.Buffer(mesh, "ep", **sizes, dtype=jnp.float32)


def shared_expert(x, up, down):
    return jax.nn.gelu(x @ up) @ down


def layer(params, x):
    """Runs on every rank: x is [T, H], the experts' weights are those of this rank's experts."""
    weights, topk_idx = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), K)
    sent = buffer.dispatch_send(x, topk_idx, weights)
    # While the rows travel: the expert that every token goes to.
    shared, sent = smf.overlap(sent, shared_expert, x, params["shared_up"], params["shared_down"])
    recv = buffer.dispatch_recv(sent)
    h = jax.nn.gelu(jax.lax.ragged_dot(recv.x, params["up"], recv.group_sizes))
    y = jax.lax.ragged_dot(h, params["down"], recv.group_sizes)
    sent = buffer.combine_send(y, recv.layout, weights=recv.weights)
    return shared + buffer.combine_recv(sent)


shapes = {"router": (H, E), "shared_up": (H, F), "shared_down": (F, H)}
shapes |= {"up": (E, H, F), "down": (E, F, H)}
specs = {name: P("ep") if len(shape) == 3 else P() for name, shape in shapes.items()}
keys = iter(jax.random.split(jax.random.key(0), 6))
params = {n: jax.random.normal(next(keys), s) / s[-2] ** 0.5 for n, s in shapes.items()}


@jax.jit
@jax.value_and_grad
def loss_and_grads(params, x):
    out = jax.shard_map(layer, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))(params, x)
    return jnp.mean((out - x) ** 2)


x = jax.random.normal(next(keys), (8 * T, H))
for i in range(5):
    loss, grads = loss_and_grads(params, x)
    params = jax.tree.map(lambda p, g: p - 5.0 * g, params, grads)
    print(f"step {i}: loss {loss:.4f}, router gradient {jnp.abs(grads['router']).max():.5f}")
buffer.close()
