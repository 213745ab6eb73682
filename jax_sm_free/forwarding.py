"""What the forwards of `Buffer` do, between a send and its recv."""

from __future__ import annotations

import dataclasses

from jax_sm_free import autodiff, checks
from jax_sm_free.pending import Sent
from jax_sm_free.primitives import BufferRef
from jax_sm_free.receiving import plain


def forward(ref: BufferRef, op: str, sent: Sent, kind: str) -> Sent:
    """Forwards what a send of this kind returned. In a buffer of one tier it only marks it."""
    checks.check_sent(op, sent, kind)
    checks.check_not_forwarded(op, sent.forwarded)
    token, node_topk = sent.token, sent.node_topk
    if ref.config.num_nodes > 1:
        if node_topk is None:
            token, node_topk = autodiff.dispatch_forward(ref, token)
            node_topk = plain(node_topk)
        else:
            token = autodiff.combine_forward(ref, token, node_topk)
    return dataclasses.replace(sent, token=token, node_topk=node_topk, forwarded=True)


def forwarded(ref: BufferRef, op: str, sent: Sent, kind: str) -> Sent:
    """What a recv takes: the sent value, which is forwarded here if nobody has done so."""
    checks.check_sent(op, sent, kind)
    return sent if sent.forwarded else forward(ref, op, sent, kind)
