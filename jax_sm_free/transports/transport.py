"""`Transport`: what connects the devices of a mesh."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

from jax.sharding import Mesh

from jax_sm_free import bounds, identity
from jax_sm_free.config import Config
from jax_sm_free.native import Native
from jax_sm_free.transports.devices import Devices


@dataclasses.dataclass(frozen=True)
class Request:
    """What a buffer is opened with.

    Attributes:
      native: the extension for the platform of the devices.
      mesh: the devices.
      axes: the mesh axes along which the ranks are.
      config: the sizes.
      description: the name of the buffer in programs, without its number at the end.
    """

    native: Native
    mesh: Mesh
    axes: tuple[str, ...]
    config: Config
    description: str


class Opened(NamedTuple):
    """A buffer that has been opened.

    Attributes:
      native: the extension that holds the buffer; None for devices that are only described.
      buffer_id: the number by which the extension knows the buffer.
      program_name: the name by which compiled programs find the buffer.
    """

    native: Native | None
    buffer_id: int
    program_name: str


class Transport(abc.ABC):
    """One way to connect devices. A subclass without abstract methods is one transport.

    Attributes:
      name: how users call it.
      platform: of the devices that it connects: "cpu" or "cuda".
      spans_processes: whether it connects devices of several processes, or those of this one.
      names_calls: whether each send carries a name that is the same in all processes. GPUs issue
        calls in one order, so that their transports need no names.
    """

    name: ClassVar[str]
    platform: ClassVar[str]
    spans_processes: ClassVar[bool]
    names_calls: ClassVar[bool] = False

    def why_not(self, devices: Devices) -> str | None:
        """Why the transport does not connect these devices, or None if it does."""
        if (devices.platform, devices.span_processes) == (self.platform, self.spans_processes):
            return None
        kind = {"cpu": "CPU devices", "cuda": "GPUs"}[self.platform]
        processes = "several processes" if self.spans_processes else "one process"
        return f"{self.name!r} connects {kind} of {processes}"

    @abc.abstractmethod
    def open(self, mesh: Mesh, axes: tuple[str, ...], config: Config, name: str | None) -> Opened:
        """Opens a buffer. Collective where the transport connects processes.

        Args:
          mesh: the devices.
          axes: the mesh axes along which the ranks are.
          config: the sizes.
          name: what tells the buffer from equal ones, or None.

        Raises:
          ValueError: for sizes that the platform does not support.
        """

    def request(
        self, mesh: Mesh, axes: tuple[str, ...], config: Config, name: str | None
    ) -> Request:
        """The arguments of `open`, checked, with the extension and a description."""
        self.check(config)
        description = self.describe(mesh, axes, config, name)
        return Request(Native(self.platform), mesh, axes, config, description)

    def check(self, config: Config) -> None:
        """Raises ValueError for sizes that the platform does not support."""
        if self.platform == "cuda":
            bounds.check_gpus(config)

    def describe(self, mesh: Mesh, axes: tuple[str, ...], config: Config, name: str | None) -> str:
        """The text that the name of a buffer over this transport begins with."""
        return identity.describe(name, mesh, axes, self.name, config)
