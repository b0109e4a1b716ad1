"""Subclasses made at run time for modules whose forward changes.

The subclass keeps the name of its base and is an instance of it; only `forward` is replaced. From outside, `module.weight`
is the DTensor parameter; inside the forward the instance's `__dict__` holds the local tensor, which shadows the
descriptor below (it has no `__set__`, so the instance dict comes first).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

STATE = "_autotp"


class ParameterView:
    """Reads a parameter or buffer of a rewritten module: the DTensor, or its local value in code being compiled."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        if module is None:
            return self
        if is_dynamo_compiling():
            for read in module.__dict__[STATE].own:
                if read.name == self.name:
                    return read.value()
        if self.name in module._parameters:
            return module._parameters[self.name]
        if self.name in module._buffers:
            return module._buffers[self.name]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")


@cache  # one subclass per class and set of names: every block of a model shares it
def subclass(
    base: type[nn.Module], names: tuple[str, ...], make_forward: Callable[[type[nn.Module]], Callable[..., Any]]
) -> type[nn.Module]:
    """The subclass of `base` whose forward is `make_forward(base)` and whose parameters `names` are views."""
    body: dict[str, Any] = {name: ParameterView(name) for name in names}
    forward = make_forward(base)
    forward.__doc__ = base.forward.__doc__
    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]  # inspect.signature shows the model's own arguments
    body.update(forward=forward, __module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    return type(base)(base.__name__, (base,), body)  # type: ignore[misc, no-any-return]
