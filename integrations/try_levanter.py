"""levanter's `moe_mlp` over jax_sm_free, beside its own exchanges: check or time.

Needs requirements/integrations/levanter.txt.
"""

from collections.abc import Callable
from typing import Any

import comparing  # first: it chooses the devices
import jax
import jax.numpy as jnp
import levanter_exchange
from jax import Array, P
from jax.sharding import Mesh, NamedSharding
from levanter.grug import grug_moe
from levanter.grug.sharding import compact_grug_mesh

import jax_sm_free as smf

OURS = "deepep"  # what `install` has given us
TOKENS = P(("replica_dcn", "data", "context", "expert"))
Arguments = dict[str, Array]


def arguments(
    mesh: Mesh,
    *,
    tokens: int = 512,
    hidden: int = 32,
    width: int = 48,
    experts: int = 16,
    top_k: int = 4,
    dtype: Any = jnp.float32,
) -> Arguments:
    """Random tokens, a tenth of them invalid, with a router's choice, and weights."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Array:
        return scale * jax.random.normal(next(keys), shape)

    scores, topk_idx = jax.lax.top_k(normal((tokens, experts)), top_k)
    arrays = {
        "x": (normal((tokens, hidden)).astype(dtype), TOKENS),
        "topk_idx": (topk_idx, TOKENS),
        "topk_weights": (jax.nn.softmax(scores).astype(dtype), TOKENS),
        "valid": (jax.random.uniform(next(keys), (tokens,)) < 0.9, TOKENS),
        "w13": (normal((experts, hidden, 2 * width), hidden**-0.5).astype(dtype), P("expert")),
        "w2": (normal((experts, width, hidden), width**-0.5).astype(dtype), P("expert")),
        "cotangent": (normal((tokens, hidden)).astype(dtype), TOKENS),
    }
    return {k: jax.device_put(a, NamedSharding(mesh, spec)) for k, (a, spec) in arrays.items()}


def layer(implementation: str, capacity_factor: float) -> Callable[..., Any]:
    """The layer, with its counts of what was dropped."""

    def apply(x: Array, topk_weights: Array, w13: Array, w2: Array, rest: Arguments) -> Any:
        return grug_moe.moe_mlp(
            x,
            rest["topk_idx"],
            topk_weights,
            w13,
            w2,
            token_valid=rest["valid"],
            implementation=implementation,
            capacity_factor=capacity_factor,
            report_capacity_overflow=True,
        )

    return apply


def with_gradients(apply: Callable[..., Any]) -> Callable[[Arguments], Any]:
    """A program: gradients to x, topk_weights, w13 and w2; result, counts."""

    def program(args: Arguments) -> Any:
        names = ("x", "topk_weights", "w13", "w2")
        rest = {name: array for name, array in args.items() if name not in names}

        def loss(*of: Array) -> Any:
            y, counts = apply(*of, rest)
            by_cotangent = y.astype(jnp.float32) * rest["cotangent"].astype(jnp.float32)
            return by_cotangent.sum(), (y, counts)

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*(args[name] for name in names))

    return jax.jit(program)


def check() -> None:
    """The result and all gradients are those of levanter's ring; so is what is dropped."""
    checks = comparing.Checks()
    for dtype, bound in ((jnp.float32, 2e-6), (jnp.bfloat16, 3e-2)):
        for expert, model in ((8, 1), (4, 1), (4, 2), (2, 2)):
            mesh = compact_grug_mesh(expert_axis_size=expert, model_axis_size=model)
            what = f"{dtype.__name__} expert={expert} model={model} data={8 // expert // model}"
            with jax.set_mesh(mesh):
                args = arguments(mesh, dtype=dtype)
                ring = with_gradients(layer("ring", float(expert)))(args)
                grads, (y, counts) = with_gradients(layer(OURS, float(expert)))(args)
            names = ("dx", "dweights", "dw13", "dw2")
            pairs = zip(names, grads, ring[0], strict=True)
            errors = {name: comparing.error(got, want) for name, got, want in pairs}
            checks.near(what, bound, out=comparing.error(y, ring[1][0]), **errors)
            checks.equal(what + " dropped, skipped", *(_counts(c) for c in (counts, ring[1][1])))
    check_capacity(checks)
    check_remat(checks)
    checks.end()


def check_capacity(checks: comparing.Checks) -> None:
    """Where a capacity drops rows, levanter's ring drops as many or more.

    Its capacity is a share of the valid tokens, and ours of all tokens, as memory is.
    """
    mesh = compact_grug_mesh(expert_axis_size=8)
    with jax.set_mesh(mesh):
        args = arguments(mesh)
        for factor in (1.25, 1.0):
            ring, ours = (
                _counts(with_gradients(layer(name, factor))(args)[1][1])[0]
                for name in ("ring", OURS)
            )
            print(f"capacity factor {factor}: ring drops {ring} rows of 2048, jax_sm_free {ours}")
            checks.equal(f"capacity factor {factor}: no more dropped", ours <= ring, True)


def check_remat(checks: comparing.Checks) -> None:
    """Policies of `jax.checkpoint` give the same gradients; one saves the dispatch."""
    mesh = compact_grug_mesh(expert_axis_size=8)
    apply = layer(OURS, 8.0)
    named = jax.checkpoint_policies.save_only_these_names
    policies = {
        "nothing saved": (jax.checkpoint_policies.nothing_saveable, 2),
        "levanter's names": (named(*grug_moe.MOE_REMAT_SAVE_NAMES), 2),
        "levanter's names and ours": (named(*levanter_exchange.REMAT_SAVE_NAMES), 1),
    }
    with jax.set_mesh(mesh):
        args = arguments(mesh)
        want, _ = with_gradients(apply)(args)
        for what, (policy, dispatches) in policies.items():
            program = with_gradients(jax.checkpoint(apply, policy=policy)).lower(args).compile()
            checks.near(f"remat, {what}", 2e-6, gradients=comparing.error(program(args)[0], want))
            counts = smf.inspect(program).counts
            checks.equal(f"remat, {what}: dispatches", counts["dispatch_send"], dispatches)


def _counts(counts: grug_moe.MoeDispatchCounts) -> tuple[int, int]:
    return int(counts.dropped), int(counts.padding_skipped)


def time() -> None:
    """Forward, and with gradients; 8 ranks, 256 tokens of each, 32 experts, top-4."""
    mesh = compact_grug_mesh(expert_axis_size=8)
    with jax.set_mesh(mesh):
        args = arguments(mesh, tokens=2048, hidden=256, width=256, experts=32)
        programs = {}
        for name in ("ring", "ring_gather_combine", OURS):
            apply, shown = layer(name, 1.25), "jax_sm_free" if name == OURS else name
            both = with_gradients(apply)
            forward = jax.jit(
                lambda a, apply=apply: apply(a["x"], a["topk_weights"], a["w13"], a["w2"], a)
            )
            programs[f"{shown}, forward"] = lambda f=forward: f(args)
            programs[f"{shown}, with gradients"] = lambda f=both: f(args)
        comparing.take_times(programs)


if __name__ == "__main__":
    levanter_exchange.install()
    comparing.main(check=check, time=time)
