"""The floor: bytes that have to move, over bandwidths measured in the same run."""

from __future__ import annotations

import dataclasses

import numpy as np

import jax_sm_free as smf
from benchmarks.cases import Case, Load
from jax_sm_free.doctor.bandwidth import Bandwidths

FORMULAS = """\
floors (rows counted from the routing, of the rank that has most):
  route + pack  (token rows read + rows written, one for each message a token is in) / local
  wire          rows for other ranks / link
  unpack        (rows received, read + recv_capacity rows written) / local
  reduce-pack   (expert rows of tokens in messages read + rows written) / local
  sum           (rows received and own expert rows, read + token rows written) / local
                no rank has a message for itself, but with a wire_dtype and in gradients
  spread        (rows received and expert rows, read + recv_capacity rows written) / local
  end to end    the longer of the wire and of all the others together
  exposed       all the others, and what the wire is longer than the GEMMs"""


@dataclasses.dataclass(frozen=True)
class Floors:
    """The least that exchanges take.

    Attributes:
      phases: microseconds of each phase, by exchange: "dispatch", "combine", and the ones for the
        gradients of both, "dispatch gradient" and "combine gradient".
    """

    phases: dict[str, dict[str, float]]

    def sms(self, op: str) -> float:
        """All that SMs have to do for "dispatch" or "combine"."""
        return sum(self.phases[op].values()) - self.wire(op)

    def wire(self, op: str) -> float:
        return self.phases[op]["wire"]

    def end_to_end(self, op: str) -> float:
        return max(self.sms(op), self.wire(op))

    def exposed(self, op: str, gemms_us: float) -> float:
        return self.sms(op) + max(0.0, self.wire(op) - gemms_us)


def of_case(case: Case, load: Load, bandwidths: Bandwidths) -> Floors:
    """By `FORMULAS`; without a link, its times are 0."""
    sent, received = load.pairs.sum(1), load.pairs.sum(0)
    own, own_expert_rows = np.diag(load.pairs), np.diag(load.expert_pairs)
    expert_rows = load.expert_pairs.sum(0)

    row, dispatched = case.row_bytes, _dispatched_row_bytes(case)

    def local(num_bytes: np.ndarray) -> float:
        return float(num_bytes.max()) / bandwidths.local * 1e6

    def wire(num_bytes: np.ndarray) -> float:
        return float(num_bytes.max()) / bandwidths.link * 1e6 if bandwidths.link else 0.0

    def there(packed: np.ndarray, sent_row: int) -> dict[str, float]:
        return {
            "route + pack": local(case.tokens * row + packed * sent_row),
            "wire": wire((sent - own) * sent_row),
        }

    def back(reduced: np.ndarray, packed: np.ndarray, added: np.ndarray) -> dict[str, float]:
        return {
            "reduce-pack": local((reduced + packed) * row),
            "wire": wire((received - own) * row),
            "sum": local((added + case.tokens) * row),
        }

    unpack = local(received * dispatched + load.recv_capacity * row)
    spread = local((received + expert_rows + load.recv_capacity) * row)
    return Floors(
        {
            "dispatch": {
                **there(sent if case.wire_dtype else sent - own, dispatched),
                "unpack": unpack,
            },
            "combine": back(
                expert_rows - own_expert_rows, received - own, sent - own + own_expert_rows
            ),
            "dispatch gradient": back(expert_rows, received, sent),
            "combine gradient": {**there(sent, row), "spread": spread},
        }
    )


def _dispatched_row_bytes(case: Case) -> int:
    """Of a row on its way to an expert."""
    config = smf.Config(
        ep_size=case.ep_size,
        hidden=case.hidden,
        num_experts=case.num_experts,
        top_k=case.top_k,
        max_tokens=case.tokens,
        dtype=case.dtype,
        wire_dtype=case.wire_dtype,
    )
    return config.dispatched_row_bytes
