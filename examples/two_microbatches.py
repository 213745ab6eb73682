"""Two microbatches interleaved, so that each exchange travels under the other one's compute.

A transformer block: attention, router, shared and routed experts. With one microbatch there is
little that may run while an exchange travels: the shared expert. With two, there is all of the
other microbatch:

    A  attention | dispatch ............. | experts   | combine ........... |
    B            | attention | dispatch ..............| experts | combine ..| + shared experts
                   of A's dispatch: attention of B      of A's combine: experts of B
                               of B's dispatch: experts of A      of B's: shared experts of both

The backward pass is split in the same places. Runs on 8 CPU devices, or on this machine's GPUs with
JAX_PLATFORMS=cuda; then it also prints what the compiled schedule has between send and recv.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import functools

import jax
import jax.numpy as jnp
from jax import P

import jax_sm_free as smf

# ------------------------------------------------------------------------- a block, part by part


def rms_norm(x):
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6)
    return (x * scale).astype(x.dtype)


def attention(params, x, implementation=None):
    """[batch, sequence, hidden] to the same."""
    heads = params["queries"].shape[1] // HEAD_WIDTH
    h = rms_norm(x)
    q, k, v = (
        (h @ params[name]).reshape(*x.shape[:2], heads, HEAD_WIDTH)
        for name in ("queries", "keys", "values")
    )
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return out.reshape(*x.shape[:2], -1) @ params["attention_out"]


HEAD_WIDTH = 128


def attend_and_route(params, x, top_k, implementation=None):
    """The block's part before the experts: what they get, and by whom each token is handled."""
    x = x + attention(params, x, implementation)
    h = rms_norm(x).reshape(-1, x.shape[-1])
    scores = jax.nn.softmax((h @ params["router"]).astype(jnp.float32))
    weights, idx = jax.lax.top_k(scores, top_k)
    return x, h, idx, weights


def shared_expert(params, h):
    return jax.nn.gelu(h @ params["shared_up"]) @ params["shared_down"]


def routed_experts(params, recv):
    """Rows that are multiplied by their weights already, in the narrow part of the expert.

    So combine has no weights, and the backward pass need not keep what experts return.
    """
    h = jax.nn.gelu(smf.grouped_matmul(recv.x, params["up"], recv))
    h = (h * recv.weights[:, None]).astype(h.dtype)
    return smf.grouped_matmul(h, params["down"], recv)


# ------------------------------------------------------------------------------- the same, placed


def shared_beside_dispatch(buffer, before, params, *x):
    """[batch, sequence, hidden] to the same: the shared expert runs beside the dispatch.

    `before` is `attend_and_route`, or a function like it, which `x` are arguments of.
    """
    x, h, *routing = before(params, *x)
    sent = buffer.dispatch_send(h, *routing)
    shared, sent = smf.overlap(sent, shared_expert, params, h)
    recv = buffer.dispatch_recv(sent)
    out = buffer.combine(routed_experts(params, recv), recv.layout)
    return x + (out + shared).reshape(x.shape)


def interleave(buffer, before, params, a, b):
    """The same of two microbatches; one exchange of a kind is in flight at a time."""
    a, h_a, *routing_a = before(params, *a)
    dispatch_a = buffer.dispatch_send(h_a, *routing_a)
    (b, h_b, *routing_b), dispatch_a = smf.overlap(dispatch_a, before, params, *b)
    recv_a = buffer.dispatch_recv(dispatch_a)

    dispatch_b = buffer.dispatch_send(h_b, *routing_b)
    y_a, dispatch_b = smf.overlap(dispatch_b, routed_experts, params, recv_a)
    recv_b = buffer.dispatch_recv(dispatch_b)

    combine_a = buffer.combine_send(y_a, recv_a.layout)
    y_b, combine_a = smf.overlap(combine_a, routed_experts, params, recv_b)
    out_a = buffer.combine_recv(combine_a)

    combine_b = buffer.combine_send(y_b, recv_b.layout)
    shared_a, combine_b = smf.overlap(combine_b, shared_expert, params, h_a)
    shared_b, combine_b = smf.overlap(combine_b, shared_expert, params, h_b)
    out_b = buffer.combine_recv(combine_b)
    return (
        a + (out_a + shared_a).reshape(a.shape),
        b + (out_b + shared_b).reshape(b.shape),
    )


# ----------------------------------------------------------------------------------------- a step


def make_params(key, hidden, num_experts, expert_width, shared_width, num_heads, dtype):
    """Parameters, and for each how it is split over the ranks."""
    shapes = dict.fromkeys(("queries", "keys", "values"), (hidden, num_heads * HEAD_WIDTH)) | {
        "attention_out": (num_heads * HEAD_WIDTH, hidden),
        "router": (hidden, num_experts),
        "shared_up": (hidden, shared_width),
        "shared_down": (shared_width, hidden),
        "up": (num_experts, hidden, expert_width),
        "down": (num_experts, expert_width, hidden),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: (jax.random.normal(k, shape) * shape[-2] ** -0.5).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params, {name: P("ep") if len(shape) == 3 else P() for name, shape in shapes.items()}


def step_of(block, mesh, specs):
    """Loss and gradients of a block of two microbatches, [ranks * batch, sequence, hidden] each."""

    def of_rank(params, a, b):
        out = block(params, a, b)
        squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in out]
        return jax.lax.psum(sum(squares), "ep")

    loss = jax.shard_map(
        of_rank, mesh=mesh, in_specs=(specs, P("ep"), P("ep")), out_specs=P(), check_vma=False
    )
    return jax.jit(jax.value_and_grad(loss))


def main():
    on_cpu = jax.default_backend() == "cpu"
    batch, sequence, hidden, num_experts, top_k = (
        (2, 16, 64, 16, 2) if on_cpu else (2, 512, 1024, 32, 4)
    )
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    ranks = jax.device_count()
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    sizes = {"hidden": hidden, "num_experts": num_experts, "top_k": top_k, "dtype": dtype}
    tokens = batch * sequence
    # One group of rows for each expert, four times as large as if all got as many.
    capacity = {"expert_capacity": 4 * tokens * ranks * top_k // num_experts}
    buffer = smf.Buffer(mesh, "ep", max_tokens=tokens, **sizes, **capacity)

    params, specs = make_params(
        jax.random.key(0), hidden, num_experts, 2 * hidden, hidden, 2, dtype
    )
    a, b = jax.random.normal(jax.random.key(1), (2, ranks * batch, sequence, hidden), dtype)

    before = functools.partial(attend_and_route, top_k=top_k)

    def in_turn(params, a, b):
        return [shared_beside_dispatch(buffer, before, params, x) for x in (a, b)]

    def at_once(params, a, b):
        return interleave(buffer, before, params, (a,), (b,))

    saved = jax.checkpoint_policies.save_only_these_names(smf.DISPATCHED)
    for name, block in (
        ("one after the other", in_turn),
        ("interleaved", at_once),
        ("interleaved, with remat", jax.checkpoint(at_once, policy=saved)),
    ):
        step = step_of(block, mesh, specs).lower(params, a, b).compile()
        loss, grads = step(params, a, b)
        norm = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
        print(f"{name:24} loss {loss:.6e}, norm of the gradients {jnp.sqrt(norm):.6e}")
        if not on_cpu:
            print(smf.inspect(step))
    buffer.check()


if __name__ == "__main__":
    main()
