"""Refuses a call of a module that no traced call ran and whose parameters are sharded for other modules: it would compute with a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from autotp.errors import PlanError
from autotp.rewrite.modules.module import ModuleRun
from autotp.rewrite.parameters.reads import Read


class Uncalled(ModuleRun):
    """Refuses every call but those of a module that reads the parameters itself, and has put its values in their place."""

    __slots__ = ("where",)

    def __init__(self, module: nn.Module, reads: tuple[Read, ...], where: str) -> None:
        super().__init__(module, reads)
        self.light = None
        self.where = where

    def __call__(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `forward(module, *args, **kwargs)` where the values that it reads are there.

        Raises:
            PlanError: they are not.
        """
        if all(read.name in module.__dict__ for read in self.own):
            return forward(module, *args, **kwargs)
        names = ", ".join(read.name for read in self.own)
        raise PlanError(
            f"{self.where} ({type(module).__name__}) was called, which no traced call of the model did, and its {names} is sharded for "
            f"other modules: this rank holds a part. Pass example_inputs= with which the model calls it, or compute with "
            f"{self.where}.{self.own[0].name}.full_tensor()"
        )
