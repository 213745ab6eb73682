"""Experts of padding, where the ranks cannot share the experts evenly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P

import jax_sm_free as smf


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "padded"), [(10, 4, 12), (12, 4, 12), (1, 8, 8), (7, 1, 7)]
)
def test_number_of_experts(num_experts: int, ep_size: int, padded: int) -> None:
    assert smf.padded_num_experts(num_experts, ep_size) == padded


def test_weights_and_their_gradient() -> None:
    weights = {"up": jnp.ones((5, 2, 3)), "bias": jnp.arange(5.0)}
    padded = smf.pad_experts(weights, 4)
    assert jax.tree.map(jnp.shape, padded) == {"up": (8, 2, 3), "bias": (8,)}
    np.testing.assert_array_equal(padded["bias"], [0, 1, 2, 3, 4, 0, 0, 0])
    grads = jax.grad(lambda w: sum(x.sum() for x in jax.tree.leaves(smf.pad_experts(w, 4))))(
        weights
    )
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(grads))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_experts must be at least 1, got 0"):
        smf.padded_num_experts(0, 4)
    with pytest.raises(TypeError, match=r"ep_size must be an integer at least 1, got 2.0"):
        smf.padded_num_experts(4, 2.0)
    for wrong in (jnp.float32(1), [1.0, 2.0]):
        with pytest.raises(ValueError, match=r"pytree of arrays \[num_experts, ...\], got .*1"):
            smf.pad_experts(wrong, 4)


def test_padding_of_scales_that_have_no_zero() -> None:
    padded = smf.pad_experts(jnp.ones((3, 2), jnp.float8_e8m0fnu), 4)
    np.testing.assert_array_equal(np.asarray(padded).view(np.uint8)[:, 0], [127, 127, 127, 0])


@pytest.mark.skipif(support.MAX_RANKS < 2, reason="every number is divisible by 1")
def test_buffer_says_what_number_would_do() -> None:
    with pytest.raises(ValueError, match=r"padded_num_experts gives \d+$"):
        support.make_config(2, num_experts=7)


@pytest.mark.skipif(support.MAX_RANKS < 2, reason="one rank has fewer experts than a token names")
def test_layer_with_experts_of_padding() -> None:
    """The same as the experts one by one, without ranks; those of padding get no rows."""
    ranks, tokens, hidden, real = support.SOME_RANKS, 6, 5, 2 * support.SOME_RANKS - 1
    num_experts = smf.padded_num_experts(real, ranks)
    buffer = support.open_buffer(
        support.make_config(
            ranks, num_experts=num_experts, hidden=hidden, top_k=2, max_tokens=tokens
        )
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ranks * tokens, hidden)).astype(np.float32)
    scores, topk_idx = jax.lax.top_k(rng.random((ranks * tokens, real)).astype(np.float32), 2)
    matrices = rng.normal(size=(real, hidden, hidden)).astype(np.float32)

    def layer(x, topk_idx, scores, matrices):
        recv = buffer.dispatch(x, topk_idx, scores)
        y = jax.lax.ragged_dot(recv.x, matrices, recv.group_sizes)
        return buffer.combine(y, recv.layout, weights=recv.weights), recv.counts

    mapped = jax.shard_map(layer, mesh=buffer.mesh, in_specs=P("ep"), out_specs=P("ep"))
    padded = smf.pad_experts(matrices, ranks)
    got, counts = jax.jit(mapped)(x, topk_idx.astype(jnp.int32), scores, padded)
    each = np.einsum("th,ehf->tef", x, matrices)
    want = np.einsum(
        "tkf,tk->tf", np.take_along_axis(each, np.asarray(topk_idx)[..., None], 1), scores
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(counts, np.bincount(np.ravel(topk_idx), minlength=num_experts))
