"""`moe_layer` as a module of flax.nnx. Copy it into your project."""

from flax import nnx
from jax import Array
from moe_layer import MoeConfig, moe_layer


class Moe(nnx.Module):
    """Make it under `jax.set_mesh(mesh)`: then the experts' weights are made where they belong."""

    def __init__(self, config: MoeConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dropped = nnx.Intermediate(0)  # rows that found no room in the last call
        for name, shape in config.shapes().items():
            stacked = () if name == "router" else (0,)
            init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=stacked)
            sharding = () if name == "router" else (config.axis,)
            setattr(self, name, nnx.Param(init(rngs.params(), shape), out_sharding=sharding))

    def __call__(self, x: Array) -> Array:
        """X [batch, ..., hidden] -> the same shape."""
        weights = {name: getattr(self, name)[...] for name in self.config.shapes()}
        y, self.dropped[...] = moe_layer(self.config, x, weights)
        return y
