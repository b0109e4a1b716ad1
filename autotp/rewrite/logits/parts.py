"""Logits in parts as DTensors: `Shard(d)` over the tp mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from autotp.rewrite.in_parts.tensor import InParts
from autotp.rewrite.logits.vocabulary import Along, Vocabulary
from autotp.rewrite.parameters.layout_dtensor import new_dtensor


class LogitsInParts(InParts, DTensor):
    """The base of `ParallelLogits`, which adds the operators: an ordinary DTensor."""

    _kind: Along

    @property
    def vocabulary_dim(self) -> int:
        """The dim that is in parts, counted from the left."""
        return self._kind.dim

    @property
    def _vocabulary(self) -> Vocabulary:
        return self._kind.vocabulary

    @classmethod
    def of(cls, local: Tensor, kind: Along) -> LogitsInParts:
        shape = list(local.shape)
        shape[kind.dim] = kind.vocabulary.size
        size = torch.Size(shape)
        stride, step = [0] * len(shape), 1
        for i in reversed(range(len(shape))):
            stride[i], step = step, step * max(shape[i], 1)
        spec = DTensorSpec(kind.vocabulary.mesh, (Shard(kind.dim),), tensor_meta=TensorMeta(size, tuple(stride), local.dtype))
        tensor: Any = new_dtensor(cls, local.detach(), spec, requires_grad=False)
        tensor._kind = kind
        return tensor  # type: ignore[no-any-return]
