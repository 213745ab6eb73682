"""`moe_layer` as a module of Equinox. Copy it into your project."""

import equinox as eqx
import jax
from jax import Array, P
from moe_layer import MoeConfig, moe_layer


class Moe(eqx.Module):
    """Make and call it under `jax.set_mesh(mesh)`."""

    config: MoeConfig = eqx.field(static=True)
    weights: dict[str, Array]

    def __init__(self, config: MoeConfig, *, key: Array) -> None:
        self.config = config
        self.weights = {}
        for name, shape in config.shapes().items():
            key, own = jax.random.split(key)
            spec = P() if name == "router" else P(config.axis)
            array = jax.random.normal(own, shape) * shape[-2] ** -0.5
            self.weights[name] = jax.device_put(array, spec)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """X [batch, ..., hidden] -> the same shape, and how many rows found no room."""
        return moe_layer(self.config, x, self.weights)
