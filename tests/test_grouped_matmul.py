"""`grouped_matmul`: what it computes, what it chooses, and what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import support
from support import P

import jax_sm_free as smf
from jax_sm_free import mosaic_matmul

RANKS, E, K = support.SOME_RANKS, 2, 2
ON_HOPPER = not support.ON_CPU and jax.devices()[0].compute_capability == "9.0"
# Wide enough for the kernels of GPUs.
WIDTHS = (128, 256)


def received(sizes, num_rows, capacity=None):
    """What grouped_matmul looks at of a `Received`."""
    sizes = jnp.array(sizes, jnp.int32)
    weights = jnp.zeros(num_rows, jnp.float32)
    return smf.Received(None, sizes, sizes, weights, None, None, expert_capacity=capacity)


def make(num_rows, num_experts, dtype, widths=WIDTHS):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(num_rows, widths[0])), dtype)
    weights = rng.normal(size=(num_experts, *widths)) / widths[0] ** 0.5
    grads = rng.normal(size=(num_rows, widths[1]))
    return rows, jnp.asarray(weights, dtype), jnp.asarray(grads, dtype)


def with_gradients(rows, weights, grads, recv, implementation):
    fn = functools.partial(smf.grouped_matmul, implementation=implementation)
    product, pull = jax.vjp(lambda r, w: fn(r, w, recv), rows, weights)
    return product, *pull(grads)


def expected(rows, weights, grads, sizes):
    rows, weights, grads = (np.asarray(array, np.float32) for array in (rows, weights, grads))
    product, rows_grad = np.zeros_like(grads), np.zeros_like(rows)
    weights_grad = np.zeros_like(weights)
    for expert, end in enumerate(np.cumsum(sizes)):
        mine = slice(end - sizes[expert], end)
        product[mine] = rows[mine] @ weights[expert]
        rows_grad[mine] = grads[mine] @ weights[expert].T
        weights_grad[expert] = rows[mine].T @ grads[mine]
    return product, rows_grad, weights_grad


@pytest.mark.filterwarnings("ignore:grouped_matmul:UserWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["auto", "blocked", "mosaic", "ragged_dot"])
def test_each_implementation_gives_product_and_gradients(implementation, dtype):
    if implementation == "mosaic" and (dtype == jnp.float32 or not ON_HOPPER):
        pytest.skip("needs a Hopper GPU, and rows of 16 bits")
    sizes = [70, 0, 33, 1, 0]
    args = make(152, len(sizes), dtype)
    run = jax.jit(functools.partial(with_gradients, implementation=implementation))
    got = run(*args, received(sizes, 152))
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for array, want in zip(got, expected(*args, sizes), strict=True):
        assert array.dtype == dtype
        support.assert_close(np.asarray(array, np.float32), want, tolerance)
    assert not np.asarray(got[0][104:], np.float32).any(), "expected zeros past the last group"


@pytest.mark.parametrize("implementation", ["auto", "batched"])
def test_groups_of_one_size_are_a_batch(implementation):
    rows, weights, grads = make(12, 3, jnp.float32, (5, 7))
    recv = received([4, 4, 4], 12, capacity=4)
    run = functools.partial(with_gradients, implementation=implementation)
    support.assert_close(run(rows, weights, grads, recv), expected(rows, weights, grads, [4, 4, 4]))
    text = str(jax.make_jaxpr(run)(rows, weights, grads, recv))
    assert text.count("dot_general") == 3, text
    assert "platform_index" not in text


@pytest.mark.filterwarnings("ignore:grouped_matmul:UserWarning")
@pytest.mark.parametrize("mapped", [(0, None, 0), (None, 0, 0), (0, 0, 0), (1, 2, 1)])
@pytest.mark.parametrize("implementation", ["auto", "ragged_dot"])
def test_vmap_is_a_loop(implementation, mapped):
    sizes = [3, 0, 5]
    places = [make(10, 3, jnp.float32, (5, 7)), make(10, 3, jnp.float32, (5, 7))]
    places[1] = tuple(-2 * array for array in places[1])
    args = [
        places[0][i] if axis is None else jnp.stack([place[i] for place in places], axis)
        for i, axis in enumerate(mapped)
    ]
    run = functools.partial(with_gradients, recv=received(sizes, 10), implementation=implementation)
    got = jax.jit(jax.vmap(run, mapped))(*args)
    for number, place in enumerate(places):
        one = [places[0][i] if mapped[i] is None else place[i] for i in range(3)]
        support.assert_close([array[number] for array in got], list(expected(*one, sizes)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float16])
def test_rows_of_other_float_dtypes(dtype):
    """Of small whole numbers, which all these hold exactly."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-1, 2, shape) for shape in ((7, 2), (2, 2, 3), (7, 3))]
    args = [jnp.asarray(array, dtype) for array in arrays]
    got = with_gradients(*args, received([3, 2], 7), "auto")
    for array, want in zip(got, expected(*args, [3, 2]), strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array, np.float32), want)


@pytest.mark.cpu_only
def test_one_experts_weights_stay_with_its_rows():
    """What is not finite in one expert's weights or rows reaches no other expert, on CPU."""
    rows, weights, grads = make(10, 3, jnp.float32, (5, 7))
    sizes = [3, 4, 2]
    want = expected(rows, weights, grads, sizes)
    got = with_gradients(
        rows.at[4].set(jnp.inf), weights.at[1].set(jnp.nan), grads, received(sizes, 10), "auto"
    )
    others = np.array([0, 1, 2, 7, 8, 9])
    for array, exact in zip(got[:2], want[:2], strict=True):
        assert not np.isfinite(np.asarray(array[3:7])).all()
        support.assert_close(array[others], exact[others])
    support.assert_close(got[2][jnp.array([0, 2])], want[2][[0, 2]])


@pytest.mark.filterwarnings("ignore:grouped_matmul:UserWarning")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("expert_capacity", [None, 4])
def test_in_a_layer_with_weights_of_float32(expert_capacity, check_vma):
    """bfloat16 rows, weights that an optimizer keeps in float32, in scan and checkpoint."""
    T, H, F = 8, 128, 128
    sizes = {"hidden": H, "num_experts": E * RANKS, "top_k": K, "max_tokens": T}
    sizes |= {"expert_capacity": expert_capacity, "num_slots": 4}
    buffer = smf.buffer_for("ep", support.mesh_of(RANKS), **sizes)
    shapes = {"router": (H, E * RANKS), "up": (E * RANKS, H, F), "down": (E * RANKS, F, H)}
    rng = np.random.default_rng(0)
    params = {n: (rng.normal(size=s) / s[-2] ** 0.5).astype(np.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(RANKS * T, H)), jnp.bfloat16)

    def layer(multiply, params, x):
        weights, idx = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), K)

        def experts(recv):
            h = jax.nn.silu(multiply(recv.x, params["up"], recv))
            return multiply(h, params["down"], recv)

        return smf.moe(x, idx, weights, experts, buffer)

    def by_row(rows, weights, recv):
        return jnp.einsum("ra,rab->rb", rows, weights.astype(rows.dtype)[recv.expert])

    def layers(multiply, params, x):
        def one(x, _):
            return x + jax.checkpoint(functools.partial(layer, multiply))(params, x), None

        return jax.lax.scan(one, x, None, length=2)[0]

    def loss(multiply, params, x):
        specs = {name: P() if name == "router" else P("ep") for name in params}
        run = jax.shard_map(
            functools.partial(layers, multiply),
            mesh=buffer.mesh,
            in_specs=(specs, P("ep")),
            out_specs=P("ep"),
            check_vma=check_vma,
        )
        return jnp.sum(run(params, x).astype(jnp.float32) ** 2)

    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(loss, m)))(params, x)
        for m in (smf.grouped_matmul, by_row)
    )
    assert all(grad.dtype == jnp.float32 for grad in got[1].values())
    support.assert_close(got, want, 3e-2)


def test_what_is_received_knows_its_groups_of_one_size():
    for capacity in ({"expert_capacity": 5}, {}):
        config = support.make_config(num_experts=2 * RANKS, **capacity)
        seen = []

        def program(api, *inputs, seen=seen):
            recv = api.buffer.dispatch(*inputs)
            seen.append(recv.expert_capacity)
            return recv.x

        for run in support.runners(config, program):
            run(*sample_inputs.make_inputs(config))
        assert seen == [config.expert_capacity] * 2


def test_arguments_are_checked():
    rows, weights, _ = make(12, 3, jnp.float32, (5, 7))
    recv = received([4, 4, 4], 12)
    multiply = smf.grouped_matmul
    for args, error, words in (
        ((rows, weights, None), TypeError, "recv to be a Received, .* got NoneType"),
        ((rows[1:], weights, recv), ValueError, r"rows \[12, A\], got float32\[11, 5\]"),
        ((rows, weights[1:], recv), ValueError, r"weights \[3, 5, B\], got float32\[2, 5, 7\]"),
        ((rows, weights[:, 1:], recv), ValueError, r"weights \[3, 5, B\], got float32\[3, 4, 7\]"),
        ((rows.astype(int), weights, recv), TypeError, r"rows .* of a float dtype, got int32"),
        ((rows, [1], recv), TypeError, "weights to be an array of a float dtype, got list"),
    ):
        with pytest.raises(error, match=words):
            multiply(*args)
    with pytest.raises(ValueError, match=r"implementation to be one of .* got 'fast'"):
        multiply(rows, weights, recv, implementation="fast")
    with pytest.raises(ValueError, match="'batched': expected rows of a buffer with an expert_cap"):
        multiply(rows, weights, recv, implementation="batched")
    with pytest.raises(NotImplementedError, match="implementation 'mosaic': they need "):
        multiply(rows, weights, recv, implementation="mosaic")


class Hopper:
    compute_capability = "9.0"
    platform = "gpu"


def test_what_the_kernels_need(monkeypatch):
    rows, weights, _ = make(16, 3, jnp.bfloat16)
    monkeypatch.setattr(jax, "devices", lambda: [Hopper()])
    assert mosaic_matmul.why_not(rows, weights) is None
    assert "multiples of 128" in mosaic_matmul.why_not(rows, weights[:, :, 1:])
    assert "multiples of 8, and these are 12" in mosaic_matmul.why_not(rows[:12], weights)
    assert "bfloat16 or float16" in mosaic_matmul.why_not(rows.astype(jnp.float32), weights)
    with pytest.warns(UserWarning, match=r"slow on GPUs.*multiples of 128.*An expert_capacity"):
        smf.grouped_matmul(rows, weights[:, :, 1:], received([4, 4, 4], 16))
    monkeypatch.setattr(Hopper, "compute_capability", "8.0")
    assert "capability 9.0, and the devices of this process have 8.0" in mosaic_matmul.why_not(
        rows, weights
    )
