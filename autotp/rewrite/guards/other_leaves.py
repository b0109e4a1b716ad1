"""Refuses gradients for tensors that are no parameters: buffers and attributes.

No plan knows of them: a region that reads one would give it a rank's summand of its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError


class OtherLeaves:
    """Watches the buffers of some modules, and the tensors that they have as attributes."""

    __slots__ = ("places",)

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.places: list[tuple[str, dict[str, Any], tuple[str, ...] | None]] = []
        for path, m in modules:
            names = tuple(name for name, value in vars(m).items() if isinstance(value, Tensor))
            self.places += [(path, m._buffers, None)] * bool(m._buffers) + [(path, m.__dict__, names)] * bool(names)

    def check(self) -> None:
        """Raise where gradients are recorded and one wants a gradient.

        Raises:
            AutoTPError: names it.
        """
        if not torch.is_grad_enabled():
            return
        for path, table, names in self.places:
            for name in table if names is None else names:
                t = table.get(name)
                if isinstance(t, Tensor) and t.requires_grad and t.is_leaf and not isinstance(t, nn.Parameter):
                    raise AutoTPError(
                        f"{f'{path}.' if path else ''}{name} requires a gradient and is no parameter, so each rank would get a part of the "
                        "gradient: make it an nn.Parameter before parallelize, or take requires_grad off"
                    )
