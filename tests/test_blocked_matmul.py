"""Grouped products in blocks of rows, against a loop over groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P

from jax_sm_free.blocked_matmul import BLOCKS
from jax_sm_free.grouped_matmul import multiply

blocked_matmul = functools.partial(multiply, ("blocked", "blocked"))

LARGE, SMALL = BLOCKS
# Rows, and the groups that share them.
CASES = {
    "one group": (7, [7]),
    "no rows": (0, [0, 0]),
    "rows without a group": (40, [0, 0, 0]),
    "fewer rows than a block": (SMALL - 1, [2, 0, 5, 1]),
    "whole blocks": (LARGE + 2 * SMALL, [LARGE, 0, SMALL, SMALL]),
    "parts of blocks, to the end": (3 * LARGE - 1, [LARGE + 1, 3, 2 * LARGE - 5]),
    "parts of blocks, and rows behind": (2 * LARGE + 9, [0, SMALL + 3, LARGE + SMALL - 1, 0]),
}
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}


def inputs(num_rows, sizes, dtype, width=6, columns=5, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, width))
    weights = rng.normal(size=(len(sizes), width, columns))
    grads = rng.normal(size=(num_rows, columns))
    rows, weights, grads = (jnp.asarray(array, dtype) for array in (rows, weights, grads))
    return rows, weights, jnp.array(sizes, jnp.int32), grads


def expected(rows, weights, sizes, grads):
    """The product, and the gradients to rows and weights, in float32."""
    rows, weights, grads = (np.asarray(array, np.float32) for array in (rows, weights, grads))
    product, rows_grad = np.zeros_like(grads), np.zeros_like(rows)
    weights_grad, first = np.zeros_like(weights), 0
    for group, size in enumerate(sizes):
        mine = slice(first, first + int(size))
        product[mine] = rows[mine] @ weights[group]
        rows_grad[mine] = grads[mine] @ weights[group].T
        weights_grad[group] = rows[mine].T @ grads[mine]
        first += int(size)
    return product, rows_grad, weights_grad


def with_gradients(rows, weights, sizes, grads):
    product, pull = jax.vjp(lambda r, w: blocked_matmul(r, w, sizes), rows, weights)
    return product, *pull(grads)


def assert_close(got, want, dtype):
    for array, exact in zip(got, want, strict=True):
        assert array.dtype == dtype
        scale = np.abs(exact).max(initial=1)
        np.testing.assert_allclose(
            np.asarray(array, np.float32) / scale, exact / scale, atol=TOLERANCES[dtype], rtol=0
        )


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in CASES]
    + [(list(CASES)[-1], dtype) for dtype in (jnp.bfloat16, jnp.float16)],
)
def test_product_and_gradients(case, dtype) -> None:
    args = inputs(*CASES[case], dtype)
    got = jax.jit(with_gradients)(*args)
    assert_close(got, expected(*args), dtype)
    used = int(sum(args[2]))
    assert not np.asarray(got[0][used:], np.float32).any(), "expected zeros past the last group"
    assert not np.asarray(got[1][used:], np.float32).any(), (
        "expected gradients of zero past the last group"
    )


def test_sums_are_wide() -> None:
    """1 and 4096 times 2**-13: summed in float16, one behind the other, that would be 1."""
    rows = jnp.full((2, 4097), 2**-7, jnp.float16).at[:, 0].set(1)
    weights = jnp.full((1, 4097, 1), 2**-6, jnp.float16).at[:, 0].set(1)
    product = blocked_matmul(rows, weights, jnp.array([2], jnp.int32))
    np.testing.assert_array_equal(np.asarray(product, np.float32), 1.5)


def test_weights_of_another_dtype() -> None:
    rows, weights, sizes, grads = inputs(40, [20, 3], jnp.float32)
    rows, grads = rows.astype(jnp.bfloat16), grads.astype(jnp.bfloat16)
    product, rows_grad, weights_grad = with_gradients(rows, weights, sizes, grads)
    want = expected(rows, weights, sizes, grads)
    assert_close((product, rows_grad), want[:2], jnp.bfloat16)
    assert_close((weights_grad,), want[2:], jnp.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spoilt", ["weights", "rows", "grads", "rows past the last group"])
def test_values_that_are_not_finite_stay_in_their_group(spoilt, value) -> None:
    sizes = [SMALL + 3, 5, LARGE + 1, 4]
    args = [*inputs(sum(sizes) + 20, sizes, jnp.float32)]
    want = expected(*args)
    mine = slice(sizes[0], sizes[0] + sizes[1])
    if spoilt == "weights":
        args[1] = args[1].at[1].set(value)
    elif spoilt == "rows past the last group":
        mine = slice(sum(sizes), None)
        args[0], args[3] = args[0].at[mine].set(value), args[3].at[mine].set(value)
    else:
        place = {"rows": 0, "grads": 3}[spoilt]
        args[place] = args[place].at[mine].set(value)
    product, rows_grad, weights_grad = jax.jit(with_gradients)(*args)
    if spoilt == "rows past the last group":
        assert_close((product, rows_grad, weights_grad), want, jnp.float32)
        return
    others = [0, 2, 3]
    for got, exact in ((product, want[0]), (rows_grad, want[1])):
        assert_close(
            (jnp.delete(got, mine, axis=0),), (np.delete(exact, mine, axis=0),), jnp.float32
        )
    assert_close((weights_grad[jnp.array(others)],), (want[2][others],), jnp.float32)
    reached = product if spoilt != "grads" else rows_grad
    assert not np.isfinite(np.asarray(reached[mine])).any()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("everywhere", ["weights", "nothing"])
def test_on_ranks_in_scan_and_checkpoint(check_vma, everywhere) -> None:
    """Weights that are the same on all ranks get the sum of the ranks' gradients."""
    ranks, sizes = support.SOME_RANKS, [3, SMALL, 2]
    each = [inputs(30, np.roll(sizes, rank), jnp.float32, 6, 6, seed=rank) for rank in range(ranks)]
    rows, weights, group_sizes, _ = (jnp.stack(arrays) for arrays in zip(*each, strict=True))
    if everywhere == "weights":
        weights = weights[:1]

    def loss(rows, weights, sizes):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
        def twice(x, _):
            return jnp.sin(blocked_matmul(x, weights[0], sizes[0])), None

        x, _ = jax.lax.scan(twice, rows[0], None, length=2)
        return jax.lax.psum(x.sum(), "ep")

    specs = (P("ep"), P() if everywhere == "weights" else P("ep"), P("ep"))
    mesh = support.mesh_of(ranks)
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    got = jax.jit(jax.value_and_grad(mapped, (0, 1)))(rows, weights, group_sizes)

    def plain(rows, weights):
        total = 0.0
        for rank in range(ranks):
            x, own = rows[rank], weights[rank % weights.shape[0]]
            of = np.repeat(np.arange(3), np.roll(sizes, rank))
            for _ in range(2):
                product = jnp.einsum("ma,mab->mb", x[: len(of)], own[of])
                x = jnp.sin(jnp.zeros_like(x).at[: len(of)].set(product))
            total += x.sum()
        return total

    want = jax.value_and_grad(plain, (0, 1))(rows, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, 0, 0), (None, 0, None, None)])
def test_vmap(axes) -> None:
    each = [
        inputs(50, sizes, jnp.float32, seed=size) for size, sizes in enumerate(([9, 30], [40, 1]))
    ]
    args = [
        jnp.stack(arrays) if axis == 0 else arrays[0]
        for axis, arrays in zip(axes, zip(*each, strict=True), strict=True)
    ]
    got = jax.jit(jax.vmap(with_gradients, axes))(*args)
    for place in range(2):
        one = [array[place] if axis == 0 else array for axis, array in zip(axes, args, strict=True)]
        assert_close([array[place] for array in got], expected(*one), jnp.float32)


def test_vmap_on_ranks() -> None:
    rows, weights, sizes, grads = inputs(20, [12, 3], jnp.float32)
    mapped = jax.shard_map(
        jax.vmap(with_gradients, (0, None, None, 0)),
        mesh=support.mesh_of(support.SOME_RANKS),
        in_specs=P(),
        out_specs=P(),
    )
    got = jax.jit(mapped)(jnp.stack([rows, 2 * rows]), weights, sizes, jnp.stack([grads, grads]))
    for place in range(2):
        want = expected((1 + place) * rows, weights, sizes, grads)
        assert_close([array[place] for array in got], want, jnp.float32)
