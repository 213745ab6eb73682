"""A mixture-of-experts layer as a function, for modules of any library. Copy it into your project.

The mesh is the one in force: call what uses it under `jax.set_mesh(mesh)`.
"""

import dataclasses

import jax
from jax import Array, P

import jax_sm_free as smf


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Sizes of a layer; `axis` is the axis of the mesh whose ranks share tokens and experts.

    `capacity_factor` is a rank's room for rows over its share of them; as many as there are ranks
    is enough for any routing.
    """

    hidden: int
    width: int
    num_experts: int
    top_k: int
    capacity_factor: float = 2.0
    axis: str = "expert"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The layer's arrays. The first axis of all but `router` is sharded over `axis`."""
        wide = self.num_experts, self.hidden, self.width
        narrow = self.num_experts, self.width, self.hidden
        return {
            "router": (self.hidden, self.num_experts),
            "gate": wide,
            "up": wide,
            "down": narrow,
        }


def moe_layer(config: MoeConfig, x: Array, weights: dict[str, Array]) -> tuple[Array, Array]:
    """X [batch, ..., hidden], its batch sharded over `axis`, through top_k of the experts.

    An expert is (silu(x @ gate) * (x @ up)) @ down. Returns the same shape, and how many rows found
    no room, summed over the ranks.
    """
    specs = {name: P() if name == "router" else P(config.axis) for name in config.shapes()}

    def on_rank(x: Array, weights: dict[str, Array]) -> tuple[Array, Array]:
        topk_weights, topk_idx = jax.lax.top_k(jax.nn.softmax(x @ weights["router"]), config.top_k)
        topk_weights = topk_weights / topk_weights.sum(-1, keepdims=True)
        buffer = smf.buffer_for(
            config.axis,
            hidden=config.hidden,
            num_experts=config.num_experts,
            top_k=config.top_k,
            max_tokens=x.size // config.hidden,
            capacity_factor=config.capacity_factor,
            dtype=x.dtype,
        )

        def experts(recv: smf.Received) -> tuple[Array, Array]:
            gate, up = (smf.grouped_matmul(recv.x, weights[w], recv) for w in ("gate", "up"))
            y = smf.grouped_matmul(jax.nn.silu(gate) * up, weights["down"], recv)
            return y, jax.lax.psum(recv.dropped, config.axis)

        return smf.moe(x, topk_idx, topk_weights, experts, buffer, has_aux=True)

    spec = P(config.axis)
    # The kernels that grouped_matmul has for GPUs do not say how their results vary.
    mapped = jax.shard_map(on_rank, in_specs=(spec, specs), out_specs=(spec, P()), check_vma=False)
    return mapped(x, weights)
