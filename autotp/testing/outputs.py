"""Finds the tensors in the result of a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autotp.trace.boundary import flatten_result

#: Entries of an output that may be shards.
LOCAL_OUTPUTS = frozenset(
    {"past_key_values", "cache_params", "mems", "state", "cache", "rnn_state", "past_buckets_states", "encoder_past_key_values"}
)


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The tensors of a call's output by path, caches left out."""
    found: dict[str, Tensor] = {}

    def keep(where: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        if not where or where[0] not in LOCAL_OUTPUTS:
            found[".".join(map(str, where)) or "output"] = tensor
        return tensor

    flatten_result(output, keep)
    return found
