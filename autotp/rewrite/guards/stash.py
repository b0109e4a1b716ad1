"""Guards attributes in which forwards leave a rank's part: the model's own code may read them, no other code.

A module may keep a value for its next call, or for another module. The plan covers those reads, and each rank goes on with its
part. Code that reads `module.kept` afterwards would take it for the value of one device. So the attribute becomes a descriptor that
answers inside of forwards and raises elsewhere; `train` may look into a cache to empty it. The value itself stays in the instance's
`__dict__`.
"""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from autotp.errors import PlanError
from autotp.rewrite.undo import Undo

#: In the `__dict__` of a module that leaves parts of values on itself, and of those that it is inside of: its path.
HOLDS = "_autotp_holds"


class Kept:
    """The descriptor of the attribute `name` of a module."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        if module is None:
            return self
        attributes = module.__dict__
        if self.name not in attributes:
            for cls in type(module).__mro__:
                value = cls.__dict__.get(self.name, self)
                if not isinstance(value, Kept):
                    return value
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")
        value = attributes[self.name]
        if value is None or isinstance(value, (int, float, str)) or is_dynamo_compiling() or _in(sys._getframe(1), "forward"):
            return value
        if isinstance(value, (dict, list)) and _in(sys._getframe(1), "train"):
            return value
        raise PlanError(
            f"{attributes[HOLDS] or type(module).__name__}.{self.name} is what a forward left there, and on this rank it is a part of the "
            f"value (or a summand of it): only forwards of the model read it. Return it from forward to have it whole"
        )

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        if module.__dict__.pop(self.name, self) is self:
            raise AttributeError(self.name)


def _in(frame: FrameType | None, method: str) -> bool:
    """True in this method of the module that holds the value, or of one that it is inside of."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == method and code.co_argcount:
            module = frame.f_locals.get(code.co_varnames[0])
            if isinstance(module, nn.Module) and HOLDS in module.__dict__:
                return True
        frame = frame.f_back
    return False


@cache  # one class per class and set of names: every block of a model shares it
def _keeping(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: Kept(name) for name in names}
    body.update(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    return type(base)(base.__name__, (base,), body)  # type: ignore[misc, no-any-return]


def guard(model: nn.Module, path: str, names: tuple[str, ...], undo: Undo) -> None:
    """Keep the attributes `names` of the module at `path` for the model's own forwards from now on."""
    module = model
    undo.set_item(module.__dict__, HOLDS, "")
    parts = path.split(".")
    for i, name in enumerate(parts):
        module = module.get_submodule(name)
        undo.set_item(module.__dict__, HOLDS, ".".join(parts[: i + 1]))
    undo.set_class(module, _keeping(type(module), names))  # type: ignore[arg-type]  # classes are hashable
