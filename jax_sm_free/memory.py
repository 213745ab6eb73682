"""`estimate_memory`: the bytes that a buffer takes, before anything is allocated."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_sm_free.config import Config


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank; `total` is their sum.

    Attributes:
      messages: messages to this rank of `num_slots` exchanges in flight, all of the largest size:
        one from each rank, and with several nodes another one from each other node.
        The rows are counted in `dtype`, whatever the `wire_dtype`, because combine sends rows in
        `dtype`. Messages live outside XLA's memory. On CPU a buffer takes only the memory of rows
        that are really sent. And each of the four kinds of exchange (dispatch, combine and the
        gradients of both) has `num_slots` of its own there, so that a program with all of them in
        flight at once can take more. On GPUs the buffer takes all of this memory when it opens.
      stage: the same for messages that leave this rank. Only GPUs need it: on CPU a rank hands its
        packed message over.
      recv: the result of one `dispatch_recv(output="experts")`, in XLA's memory. These are rows,
        weights, group sizes, counts and the layout.
    """

    messages: int
    stage: int
    recv: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.messages + self.stage + self.recv


def _check_config(op: str, config: Any) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"{op}: expected a Config, got {type(config).__name__}")


def estimate_memory(config: Config) -> MemoryEstimate:
    """The bytes that a rank needs, before anything is allocated. Not collective.

    Args:
      config: the sizes; `Buffer(...).config`, or a `Config` made by hand.

    Returns:
      An estimate that follows from the sizes alone, whatever the tokens name.

    Raises:
      TypeError: if `config` is no `Config`.
    """
    _check_config("estimate_memory", config)
    recv = (
        config.recv_capacity * (config.hidden * config.dtype.itemsize + 4)  # rows, their weights
        + 4 * (2 * config.num_local_experts + 1)  # group_sizes, counts, dropped
        + 4 * (config.max_recv_tokens * config.top_k + config.ep_size)  # layout
    )
    if config.num_nodes > 1:
        recv += 4 * config.max_node_tokens * config.top_k  # node_topk of the layout
    from_nodes = (config.num_nodes - 1) * config.rail_message_bytes
    return MemoryEstimate(
        messages=config.num_slots * (config.ep_size * config.message_bytes + from_nodes),
        stage=config.num_slots * (config.ep_size - 1) * config.message_bytes,
        recv=recv,
    )


def get_rdma_size_hint(config: Config) -> int:
    """Bytes of one rank's messages that may cross a NIC. Not collective.

    With one node these are the messages to all other ranks, because each of them may be on another
    host: num_slots * (ep_size - 1) * message_bytes.

    With several nodes only the messages within a rail cross: one to each other node, and one from
    each other node. That is num_slots * 2 * (num_nodes - 1) * rail_message_bytes. A rail message
    has `max_tokens` rows at most, because a token crosses once to a node, however many of its
    experts live there. The routing of the rows is 12 bytes for each expert that a token can name,
    4 bytes for each row, and 4 bytes for each expert of a node.

    Args:
      config: as for `estimate_memory`.

    Returns:
      Bytes.

    Raises:
      TypeError: if `config` is no `Config`.
    """
    _check_config("get_rdma_size_hint", config)
    if config.num_nodes > 1:
        return config.num_slots * 2 * (config.num_nodes - 1) * config.rail_message_bytes
    return config.num_slots * (config.ep_size - 1) * config.message_bytes
