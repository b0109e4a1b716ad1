"""A module that no traced call ran and whose parameters are sharded for other modules: a call of it would compute with a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from autotp.errors import PlanError
from autotp.rewrite.classes import STATE
from autotp.rewrite.module import ModuleRun
from autotp.rewrite.reads import Read


class Uncalled(ModuleRun):
    """Refuses every call but those of a module that reads the parameters itself, and has put its values in their place."""

    __slots__ = ("where",)

    def __init__(self, module: nn.Module, reads: tuple[Read, ...], where: str) -> None:
        super().__init__(module, reads)
        self.light = None
        self.where = where

    def check(self, module: nn.Module) -> None:
        """Raise, unless the values that the module is to read are there."""
        if not all(read.name in module.__dict__ for read in self.own):
            names = ", ".join(read.name for read in self.own)
            raise PlanError(
                f"{self.where} ({type(module).__name__}) was called, which no traced call of the model did; its {names} is sharded for "
                f"other modules, so this rank holds a part: pass example_inputs= with which the model calls it, or read "
                f"{self.where}.{self.own[0].name}.full_tensor()"
            )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward pre-hook of a module whose class stays."""
        self.check(module)
        return args, kwargs


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of an uncalled `base`."""
    inner = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run: Uncalled = self.__dict__[STATE]
        run.check(self)
        return inner(self, *args, **kwargs)

    return forward


def uncalled_run(module: nn.Module, reads: tuple[Read, ...], where: str) -> tuple[Uncalled, Callable[..., Callable[..., Any]]]:
    """What a module does that no traced call ran, and its forward."""
    return Uncalled(module, reads, where), make_forward
