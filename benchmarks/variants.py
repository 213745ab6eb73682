"""The ways to run each contestant on GPUs, of which the fastest one is compared.

Options are XLA's debug options, given to the compiler for this contestant's programs alone: what a
version does not know is an error of that program and not the end of the process, as it is in
XLA_FLAGS.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from benchmarks import contestants
from benchmarks.cases import Case, Load

Options = dict[str, bool | int | str]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run one contestant.

    Attributes:
      name: of the variant.
      make: (case, load, mesh) to an object with the interface of `PureJax`.
      options: of the compiler.
      make_for_layers: the same, as a whole layer runs it; None for `make`.
    """

    name: str
    make: Callable[[Case, Load, Mesh], Any]
    options: Options = dataclasses.field(default_factory=dict)
    make_for_layers: Callable[[Case, Load, Mesh], Any] | None = None

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name} [{options}]" if options else self.name


# Without it, XLA may run a collective beside nothing.
_SCHEDULED: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}


def _dense(name: str, options: Options) -> Variant:
    make = lambda case, load, mesh: contestants.make_peer(case, load)  # noqa: E731
    return Variant(name, make, {**_SCHEDULED, **options})


def _ragged(name: str, options: Options, num_updates: int) -> Variant:
    make = lambda case, load, mesh: contestants.make_ragged(case, load, num_updates)  # noqa: E731
    return Variant(f"{name}, {num_updates} updates a rank", make, {**_SCHEDULED, **options})


_IN_BATCHES = functools.partial(contestants.make_ours, in_batches=True)

OURS = (Variant("jax_sm_free", contestants.make_ours, make_for_layers=_IN_BATCHES),)
ALL_TO_ALL = (_dense("NCCL", {}),)
# Not over NCCL, xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel=false with
# xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true: of jax 0.11.2, on 2 H200s, the first
# or the second run does not end.
RAGGED = (
    _ragged("one-shot kernel", {}, 256),
    _ragged("one-shot kernel", {}, 1),
)
# One copy of a token goes to a rank, as with ours.
DESCRIPTIONS = {
    "ours": "jax_sm_free: send, GEMMs between by overlap(), recv",
    "all_to_all": "one row for each (token, rank), messages padded to the fullest, "
    "lax.all_to_all, sort, gather; sums before and after the way back",
    "ragged": "the same with lax.ragged_all_to_all for the rows: no padding travels",
}


def of(contestant: str, ragged_options: Options | None, ragged_updates: int) -> tuple[Variant, ...]:
    """The variants of "ours", "all_to_all" or "ragged"; with options given, ragged has one."""
    if contestant == "ragged" and ragged_options is not None:
        return (_ragged("as given", ragged_options, ragged_updates),)
    return {"ours": OURS, "all_to_all": ALL_TO_ALL, "ragged": RAGGED}[contestant]


def parse_options(text: str) -> Options:
    """Reads "name=value,name=value" with true, false, integers or text.

    Raises:
      ValueError: for an entry without "=".
    """
    options: Options = {}
    for entry in filter(None, text.split(",")):
        name, equals, value = entry.strip().lstrip("-").partition("=")
        if not equals:
            raise ValueError(f"expected name=value, got {entry!r}")
        if value.lower() in ("true", "false"):
            options[name] = value.lower() == "true"
        else:
            options[name] = int(value) if value.lstrip("-").isdigit() else value
    return options
