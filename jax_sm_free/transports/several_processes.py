"""What the transports have in common that connect devices of several processes."""

from __future__ import annotations

import abc
import dataclasses

from jax.sharding import Mesh

from jax_sm_free import identity
from jax_sm_free.bootstrap import Bootstrap, facts_of
from jax_sm_free.config import Config
from jax_sm_free.transports.devices import by_rank
from jax_sm_free.transports.transport import Opened, Request, Transport


@dataclasses.dataclass(frozen=True)
class Meeting:
    """The processes of a mesh while they open a buffer together, and what they have agreed on.

    Attributes:
      bootstrap: exchanges bytes among the processes.
      buffer_id: the number of the buffer, the same in all processes.
      program_name: the name of the buffer in programs, the same in all processes.
      process_of_rank: the place of each rank's process in `bootstrap.processes`, by [group][rank].
    """

    bootstrap: Bootstrap
    buffer_id: int
    program_name: str
    process_of_rank: list[list[int]]


class SeveralProcesses(Transport):
    """A transport over which each process opens its own part of a buffer."""

    spans_processes = True

    def open(self, mesh: Mesh, axes: tuple[str, ...], config: Config, name: str | None) -> Opened:
        request = self.request(mesh, axes, config, name)
        native, description = request.native, request.description
        buffer_id = None
        try:
            with Bootstrap(mesh, config.timeout_s) as bootstrap:
                bootstrap.compare(facts_of(mesh, axes, config, self.name, description))
                buffer_id, program_name = identity.agree(
                    bootstrap.exchange, description, native.lowest_free_id()
                )
                index = bootstrap.processes.index
                processes = by_rank(mesh, axes, lambda device, _: index(device.process_index))
                self._open_part(request, Meeting(bootstrap, buffer_id, program_name, processes))
        except BaseException:
            if buffer_id is not None:
                native.close_buffer(buffer_id)
            raise
        return Opened(native, buffer_id, program_name)

    @abc.abstractmethod
    def _open_part(self, request: Request, meeting: Meeting) -> None:
        """Opens this process's part of the buffer, and connects it. Collective.

        Where it raises in one process, the other processes raise at their next step, too.
        """
