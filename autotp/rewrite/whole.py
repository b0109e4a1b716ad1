"""Gradients that compiled code makes of parameters that are not cut evenly.

Code being compiled reads such a parameter as an ordinary DTensor, and its gradient is one, in an order that nothing says. A hook on the
parameter gives it its layout. Hooks are lost where parameters are made anew: `KeepLayout` sets them again after `model.to(…)` and
`copy.deepcopy(model)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.plan.layout import Layout
from autotp.rewrite.tensor import LayoutDTensor, laid_out


class _Ordered:
    """Post-accumulate hook of the parameter `of`: its gradient has its layout, wherever it was made. Noted in its `__dict__`."""

    __slots__ = ("layout", "of")

    def __init__(self, of: Tensor | None, layout: Layout) -> None:
        self.of, self.layout = of, layout

    def __call__(self, p: Tensor) -> None:
        if type(p.grad) is DTensor:
            p.grad = laid_out(p.grad._spec, p.grad._local_tensor, self.layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ordered:
        return _Ordered(None, self.layout)

    def __reduce__(self) -> tuple[type[_Ordered], tuple[None, Layout]]:
        return _Ordered, (None, self.layout)


class KeepLayout:
    """The `_apply` (under `to`, `half`, `cuda`, …) of a module with such parameters; sets their hooks again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        type(self.module)._apply(self.module, fn, recurse)  # type: ignore[no-untyped-call]
        self.attach(self.module._parameters)
        return self.module

    def attach(self, params: Mapping[str, Tensor | None]) -> None:
        """Give the hook to those of `params` that need it and have it not."""
        for p in params.values():
            if isinstance(p, LayoutDTensor) and p.requires_grad and getattr(vars(p).get("_ordered"), "of", None) is not p:
                hook = _Ordered(p, p._layout)
                vars(p)["_ordered"] = hook
                p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepLayout:
        # A module is in `memo` before its attributes are copied, and its parameters are the first of them.
        copied = KeepLayout(memo.get(id(self.module), self.module))
        copied.attach({name: memo.get(id(p)) for name, p in self.module._parameters.items()})
        return copied
