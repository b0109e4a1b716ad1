"""Refuses calls where a dim of an argument is longer than 1 that was 1 in every traced call, and stood for each rank's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.plan.plan import Plan
from autotp.rewrite.modules.binding import Binding
from autotp.rewrite.modules.boundaries import map_path
from autotp.rewrite.modules.classes import check_calls
from autotp.rewrite.undo import Undo


class Ones:
    """The arguments of the model that have such dims."""

    __slots__ = ("checks",)

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.checks = [(Binding(path, model.forward, "the model"), _Checked(".".join(map(str, path)), dims)) for path, dims in plan.ones]

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises AutoTPError where such a dim is longer."""
        for binding, checked in self.checks:
            map_path(binding.given(args, kwargs), binding.rest, checked)


class _Checked:
    """Passes a tensor on whose `dims` are of size 1."""

    __slots__ = ("dims", "name")

    def __init__(self, name: str, dims: tuple[int, ...]) -> None:
        self.name, self.dims = name, dims

    def __call__(self, x: Tensor) -> Tensor:
        for dim in self.dims:
            if -dim <= x.dim() and x.shape[dim] != 1:
                raise AutoTPError(
                    f"the model is called with {self.name} of shape {tuple(x.shape)}; in the calls that were traced its dim {dim} had "
                    "size 1, and stood for what each rank holds of a dim that is cut. Pass example_inputs of such a call to parallelize "
                    "as well (a list of several calls)"
                )
        return x


def install_ones(model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Have the model check such arguments; journalled in `undo`."""
    if plan.ones:
        check_calls(model, "_autotp_ones", Ones(model, plan), undo, compiled=False)
