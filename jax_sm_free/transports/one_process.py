"""What the transports have in common that connect the devices of this process."""

from __future__ import annotations

from jax.sharding import Mesh

from jax_sm_free import identity
from jax_sm_free.config import Config
from jax_sm_free.transports.devices import places
from jax_sm_free.transports.transport import Opened, Transport


class OneProcess(Transport):
    """A transport for which the extension needs to know the devices, and nothing else."""

    spans_processes = False

    def open(self, mesh: Mesh, axes: tuple[str, ...], config: Config, name: str | None) -> Opened:
        request = self.request(mesh, axes, config, name)
        program_name = identity.take_name(request.description)
        buffer_id = request.native.open_buffer(config, places(mesh, axes), program_name)
        return Opened(request.native, buffer_id, program_name)
