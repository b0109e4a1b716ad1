"""An `Architecture` is a transformer-like model as a value that is written down, made and called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from autotp.testing.architectures import source
from autotp.testing.architectures.build import built
from autotp.testing.architectures.spec import TOKENS, ArchitectureSpec


@final
@dataclass(frozen=True, slots=True)
class Architecture(ArchitectureSpec):
    """One decoder: the fields of `autotp.testing.architectures.spec.ArchitectureSpec`, its text, and the model itself."""

    def source(self) -> str:
        """The model as Python text; its class is `Model`."""
        return source.write(self)

    def build(self) -> nn.Module:
        """The model with random weights of a fixed seed, in float64; biases and norms are random too."""
        return built(self.source())

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of one call: 2 rows of 5 tokens."""
        made = torch.Generator().manual_seed(seed)
        names = ("ids", "targets") if self.loss else ("ids",)
        return {name: torch.randint(self.vocab, (2, TOKENS), generator=made) for name in names}

    def kept(self) -> tuple[tuple[str, int], ...]:
        """(parameter of the first block, dim of it) that must not be sharded, because of the trap."""
        return source.trapped(self)
