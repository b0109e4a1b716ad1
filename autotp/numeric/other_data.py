"""Makes calls of other data than those of the trace: a path that was traced along drawn numbers is one case of many.

Code that goes by counts of tokens or by places that it found in data does other things for other data. So the numbers of such a model
are compared for some of them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from autotp.trace.example import Example, Inputs

#: Scales of the floats; the largest sends most tokens to few experts.
_SCALES = (0.3, 1.0, 10.0)


def other_data(examples: tuple[Example, ...]) -> Iterator[Example]:
    """Yields calls of other data for each one whose path was traced along drawn numbers."""
    for example in examples:
        if example.drawn:
            for seed, scale in enumerate(_SCALES):
                make = partial(_changed, example, seed, scale)
                yield replace(example, name=f"{example.name} of other data ({seed})", make=make, decode=None)


def _changed(example: Example, seed: int, scale: float) -> Inputs:
    """The keywords of a call with floats at random, and whole numbers between the least and the largest of those given."""
    generator = torch.Generator().manual_seed(seed)

    def change(t: Tensor) -> Tensor:
        if t.dtype is torch.bool or t.is_meta or not t.numel():
            return t
        if t.is_floating_point():
            return (torch.randn(t.shape, generator=generator) * scale).to(t.dtype)
        least, most = int(t.min()), int(t.max())
        return torch.randint(least, most + 1, t.shape, generator=generator).to(t.dtype)

    found: Inputs = tree_map_only(Tensor, change, dict(example.make()))
    return found
