"""Transport "abstract": of GPUs that are only described, to compile programs for them."""

from __future__ import annotations

from jax.sharding import Mesh

from jax_sm_free import identity
from jax_sm_free.config import Config
from jax_sm_free.native import register_cuda
from jax_sm_free.transports.transport import Opened, Transport


class Described(Transport):
    """Takes no memory. Checks and names a buffer as the transport of the real devices does."""

    name = "abstract"

    def __init__(self, real: Transport) -> None:
        """`real` is the transport for the devices where the program will run."""
        self._real = real

    def open(self, mesh: Mesh, axes: tuple[str, ...], config: Config, name: str | None) -> Opened:
        self._real.check(config)
        register_cuda()
        description = self._real.describe(mesh, axes, config, name)
        return Opened(None, -1, identity.take_name(description, is_abstract=True))
