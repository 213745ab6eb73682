"""Models that people train: layers with experts that are MLPs, and what stands around such layers.

A program is a function of (api, w, x): `w` are the weights of NUM_LAYERS layers of one rank, each
leaf with a leading layer axis; `x` is [T, hidden]. It returns [T, hidden]. What a program needs of
its buffer, and what the gradient of it is taken of, is in its `Program`.

The experts keep what they received for the gradient of their weights, as those that are trained do.
A row has a multiple of 256 bytes: XLA:GPU fuses slices of such sizes alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NUM_LAYERS, NUM_MICROBATCHES = 4, 2
TOKENS, HIDDEN, WIDTH, TOP_K, LOCAL_EXPERTS, CAPACITY = 64, 128, 256, 2, 2, 96

SIZES = {
    "hidden": HIDDEN,
    "top_k": TOP_K,
    "max_tokens": TOKENS,
    "expert_capacity": CAPACITY,
    "num_slots": 4,
}


# ---------------------------------------------------------------------------------------- layers


def experts(w: Any, rows: Any) -> Any:
    """A gated MLP for each expert, all in one batch."""
    batch = rows.reshape(LOCAL_EXPERTS, CAPACITY, HIDDEN)
    gate = jnp.einsum("ech,ehf->ecf", batch, w["gate"])
    up = jnp.einsum("ech,ehf->ecf", batch, w["up"])
    return jnp.einsum("ecf,efh->ech", jax.nn.silu(gate) * up, w["down"]).reshape(rows.shape)


def route(w: Any, x: Any) -> tuple[Any, Any]:
    scores = jax.nn.softmax((x @ w["router"]).astype(jnp.float32))
    weights, topk_idx = jax.lax.top_k(scores, TOP_K)
    return topk_idx.astype(jnp.int32), weights


def layer(api: Any, w: Any, x: Any) -> Any:
    recv = api.buffer.dispatch(x, *route(w, x))
    y = experts(w, recv.x)
    return x + api.buffer.combine(y, recv.layout, weights=recv.weights)


def layer_beside_shared(api: Any, w: Any, x: Any) -> Any:
    """With a shared expert, computed while rows travel."""

    def shared_expert(x: Any, up: Any, down: Any) -> Any:
        return jax.nn.silu(x @ up) @ down

    sent = api.buffer.dispatch_send(x, *route(w, x))
    shared, sent = api.overlap(sent, shared_expert, x, w["shared_up"], w["shared_down"])
    recv = api.buffer.dispatch_recv(sent)
    sent = api.buffer.combine_send(experts(w, recv.x), recv.layout, recv.weights)
    shared, sent = api.overlap(sent, jnp.tanh, shared)
    return x + shared + api.buffer.combine_recv(sent)


# -------------------------------------------------------------------------------------- programs


def in_scan(layer: Any, api: Any, w: Any, x: Any, **kwargs: Any) -> Any:
    return jax.lax.scan(lambda x, w: (layer(api, w, x), None), x, w, **kwargs)[0]


def with_remat(layer: Any) -> Any:
    return lambda api, w, x: jax.checkpoint(functools.partial(layer, api))(w, x)


def first(w: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], w)


def scan(api: Any, w: Any, x: Any) -> Any:
    return in_scan(layer, api, w, x)


def scan_beside_shared(api: Any, w: Any, x: Any) -> Any:
    return in_scan(layer_beside_shared, api, w, x)


def scan_with_remat(api: Any, w: Any, x: Any) -> Any:
    return in_scan(with_remat(layer), api, w, x)


def scan_unrolled(api: Any, w: Any, x: Any) -> Any:
    return in_scan(layer, api, w, x, unroll=2)


def nested_scan(api: Any, w: Any, x: Any) -> Any:
    """Two blocks of layers, each under remat, as for models of many layers."""
    blocks = jax.tree.map(lambda leaf: leaf.reshape(2, NUM_LAYERS // 2, *leaf.shape[1:]), w)
    return in_scan(with_remat(scan), api, blocks, x)


def unrolled_layers(api: Any, w: Any, x: Any) -> Any:
    for number in range(NUM_LAYERS):
        x = layer(api, jax.tree.map(lambda leaf, i=number: leaf[i], w), x)
    return x


def scan_with_cond(api: Any, w: Any, x: Any) -> Any:
    """Every other layer is dense: a branch that all ranks take alike."""

    def dense(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w["shared_up"] @ w["shared_down"])

    def body(state: Any, w: Any) -> Any:
        x, is_sparse = state
        x = jax.lax.cond(is_sparse, lambda x, w: layer(api, w, x), dense, x, w)
        return (x, ~is_sparse), None

    return jax.lax.scan(body, (x, jnp.asarray(True)), w)[0][0]


def while_loop(api: Any, w: Any, x: Any) -> Any:
    """Runs a layer until its result has become small, on all ranks together, at most five times."""

    def goes_on(state: Any) -> Any:
        size, rounds, _ = state
        return (size > 1e-6) & (rounds < 5)

    def body(state: Any) -> Any:
        _, rounds, x = state
        x = (layer(api, first(w), x) * 0.1).astype(x.dtype)
        return jax.lax.pmax(jnp.abs(x).max(), "ep").astype(jnp.float32), rounds + 1, x

    return jax.lax.while_loop(goes_on, body, (jnp.float32(1), 0, x))[2]


def unrolled_microbatches(api: Any, w: Any, x: Any) -> Any:
    """Halves of the tokens one after the other: static slices, without any loop."""
    return jnp.concatenate([layer(api, first(w), half) for half in jnp.split(x, 2)])


def scanned_microbatches(api: Any, w: Any, x: Any) -> Any:
    """A scan over microbatches, in each a scan over layers."""
    batches = x.reshape(NUM_MICROBATCHES, -1, HIDDEN)
    body = lambda _, batch: (None, scan(api, w, batch))  # noqa: E731
    return jax.lax.scan(body, None, batches)[1].reshape(x.shape)


def two_buffers(api: Any, w: Any, x: Any) -> Any:
    """Layers that take turns with two buffers."""
    pairs = jax.tree.map(lambda leaf: leaf.reshape(NUM_LAYERS // 2, 2, *leaf.shape[1:]), w)

    def body(x: Any, w: Any) -> Any:
        x = layer(api, jax.tree.map(lambda leaf: leaf[0], w), x)
        return layer(api.second, jax.tree.map(lambda leaf: leaf[1], w), x), None

    return jax.lax.scan(body, x, pairs)[0]


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the programs, and how it is to be run.

    Attributes:
      run: the function of (api, w, x).
      sizes: of its buffer, besides SIZES.
      has_gradient: whether it can be differentiated.
      is_repeated: whether the program calls an op several times in one loop of Python.
    """

    run: Callable[..., Any]
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_gradient: bool = True
    is_repeated: bool = False

    def step(self, api: Any, w: Any, x: Any) -> Any:
        """The loss of this rank's tokens, and the gradients of all weights and of x."""
        if not self.has_gradient:
            return self.run(api, w, x)

        def loss(w: Any, x: Any) -> Any:
            return jnp.square(self.run(api, w, x).astype(jnp.float32)).mean()

        return jax.value_and_grad(loss, (0, 1))(w, x)


PROGRAMS = {
    "scan": Program(scan),
    "scan_beside_shared": Program(scan_beside_shared),
    "scan_with_remat": Program(scan_with_remat),
    "scan_unrolled": Program(scan_unrolled, is_repeated=True),
    "nested_scan": Program(nested_scan),
    "unrolled_layers": Program(unrolled_layers, is_repeated=True),
    "scan_with_cond": Program(scan_with_cond),
    "while_loop": Program(while_loop, has_gradient=False),
    "unrolled_microbatches": Program(unrolled_microbatches, is_repeated=True),
    "scanned_microbatches": Program(scanned_microbatches),
    "float8_wire": Program(scan, {"wire_dtype": jnp.float8_e4m3fn}),
    "two_buffers": Program(two_buffers),
}


# --------------------------------------------------------------------------------------- weights


def weight_shapes(num_experts: int) -> dict[str, tuple[int, ...]]:
    """Of one rank, with the layer axis."""
    shapes = {
        "router": (HIDDEN, num_experts),
        "gate": (LOCAL_EXPERTS, HIDDEN, WIDTH),
        "up": (LOCAL_EXPERTS, HIDDEN, WIDTH),
        "down": (LOCAL_EXPERTS, WIDTH, HIDDEN),
        "shared_up": (HIDDEN, WIDTH),
        "shared_down": (WIDTH, HIDDEN),
    }
    return {name: (NUM_LAYERS, *shape) for name, shape in shapes.items()}


def make_arguments(num_ranks: int, dtype: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """W and x of all ranks, each with a leading axis of ranks."""
    rng = np.random.default_rng(7)
    shapes = weight_shapes(num_ranks * LOCAL_EXPERTS)
    w = {
        name: (rng.normal(size=(num_ranks, *shape)) / np.sqrt(shape[-2])).astype(dtype)
        for name, shape in shapes.items()
    }
    w["router"][:] = w["router"][:1]  # the same on all ranks
    x = rng.normal(size=(num_ranks, TOKENS, HIDDEN)).astype(dtype)
    return w, x
