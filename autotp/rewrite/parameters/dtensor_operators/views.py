"""Records how views of sharded tensors are made, and makes them anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from autotp.errors import AutoTPError
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, new_dtensor


class PartView(LayoutDTensor):
    """A view of a tensor that is sharded: `source`, and the operators that make the view of the whole tensor.

    It holds the entries that the view had when it was made. Each operator makes it anew, and a write goes back into every rank's part.
    """

    _source: LayoutDTensor
    _steps: tuple[Callable[[Tensor], Tensor], ...]

    def _of(self, whole: Tensor) -> Tensor:
        for step in self._steps:
            whole = step(whole)
        return whole

    def _whole(self) -> Tensor:
        return self._of(self._source._whole())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if getattr(self, "_is_param", False) or not self.is_leaf:
            return super().__deepcopy__(memo)
        if id(self) not in memo:
            copied: Any = copy.deepcopy(self._source.detach(), memo)
            memo[id(self)] = viewing(copied, self._of(copied._whole()), self._steps)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What it holds is what it was.
        return self._everywhere(self._held()).requires_grad_(self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _held(self) -> Tensor:
        return self._whole().clone()

    def _take_back_(self, held: Tensor) -> None:
        self.copy_(held)

    def __create_write_items__(self, fqn: str, object: object) -> list[Any]:
        return self._everywhere(self._whole()).__create_write_items__(fqn, object)

    def __create_chunk_list__(self) -> list[Any]:
        raise AutoTPError(
            "torch.distributed.checkpoint does not read into a view of a tensor that is cut over ranks: use autotp.checkpoint.load, or "
            "give the parameter memory of its own (nn.Parameter(weight.detach().t().clone()))"
        )

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self._everywhere(self._whole()).__get_tensor_shard__(index)

    def to_local(self, **options: Any) -> Tensor:
        raise AutoTPError(
            "a view of a tensor that is cut over ranks has no part on this rank: read it with full_tensor(), write it as it is"
        )


def view(of: LayoutDTensor, now: Tensor, step: Callable[[Tensor], Tensor]) -> PartView:
    """Returns the view that `step` makes of `of`, a sharded tensor or a view of one; `now`: the entries that it holds."""
    if isinstance(of, PartView):
        return viewing(of._source, now, (*of._steps, step))
    return viewing(of, now, (step,))


def viewing(source: LayoutDTensor, now: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...]) -> PartView:
    """Returns the view of `source` that `steps` make; `now`: the entries that it holds."""
    whole = source._everywhere(now)
    made: PartView = new_dtensor(PartView, now, whole._spec, requires_grad=False)
    made._layout, made._source, made._steps = whole._layout, source, steps
    return made
