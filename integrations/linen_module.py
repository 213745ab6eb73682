"""`moe_layer` as a module of flax.linen. Copy it into your project."""

from flax import linen
from jax import Array
from moe_layer import MoeConfig, moe_layer


class Moe(linen.Module):
    """Initialise and apply it under `jax.set_mesh(mesh)`, of a mesh with AxisType.Auto."""

    config: MoeConfig

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """X [batch, ..., hidden] -> the same shape; sows `dropped` as an intermediate."""
        weights = {}
        for name, shape in self.config.shapes().items():
            stacked = () if name == "router" else (0,)
            init = linen.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=stacked)
            names = (self.config.axis if name != "router" else None, *(None,) * (len(shape) - 1))
            weights[name] = self.param(name, linen.with_partitioning(init, names), shape)
        y, dropped = moe_layer(self.config, x, weights)
        self.sow("intermediates", "dropped", dropped)
        return y
