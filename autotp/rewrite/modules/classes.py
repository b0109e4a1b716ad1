"""Makes subclasses at run time for modules whose forward changes, and forwards of single instances for those whose class stays.

The subclass keeps the name of its base and is an instance of it; only `forward` is replaced. From outside, `module.weight` is the
DTensor parameter. Inside the forward the instance's `__dict__` holds the local tensor, which shadows the descriptor below (it has
no `__set__`, so the instance dict comes first).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType, MethodType
from typing import Any

import torch
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import ParametrizationList

from autotp.errors import AutoTPError
from autotp.rewrite.parameters.quantized_form import is_quantized, refuse_quantized
from autotp.rewrite.undo import Undo

STATE = "_autotp"
#: In a class made here: the model's own.
BASE = "_autotp_base"
_in_backward = torch._C._current_graph_task_id
_CHECKPOINT = torch.utils.checkpoint.__file__


def _runs_again() -> bool:
    """True in a function that a checkpoint runs again in the backward, where no forward of its module is open."""
    if _in_backward() == -1:
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != _CHECKPOINT:
        frame = frame.f_back
    return frame is not None


class ParameterView:
    """Reads a parameter or buffer of a rewritten module: the DTensor, or its local value in code that is compiled or runs again."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        if module is None:
            return self
        if is_dynamo_compiling() or _runs_again():
            for read in module.__dict__[STATE].own:
                if read.name == self.name:
                    return read.value()
        if self.name in module._parameters:
            return module._parameters[self.name]
        if self.name in module._buffers:
            return module._buffers[self.name]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")


_ADVICE = "Prune, reparametrize, or take that back, before parallelize"


def _keeping_names(base: type[nn.Module]) -> Callable[..., None]:
    """Makes `register_parameter` of a rewritten `base`: it refuses to give a parameter that the plan knows another name.

    Pruning and weight norms register before they change anything else, so the module stays as it is. A weight that torchao's own
    `quantize_` computed of a part, as of a whole one, is refused too.
    """
    inner = base.register_parameter

    @functools.wraps(inner)
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        parameters, own = self._parameters, [read.name for read in self.__dict__[STATE].own] if STATE in self.__dict__ else []
        moved = next((n for n in own if n != name and param is not None and parameters.get(n) is param), None)
        lost = next((n for n in own if n not in parameters and n not in self._buffers), None)
        if moved is not None or (lost is not None and (lost != name or name in self.__dict__)):
            kind = type(self).__qualname__
            raise AutoTPError(
                f"{moved or lost!r} of a parallel {kind} would get the name {name!r}, which the plan does not know. {_ADVICE}"
            )
        if is_quantized(param) and STATE in self.__dict__:
            refuse_quantized(type(self).__qualname__, name)
        inner(self, name, param)

    return register_parameter


class _Parametrized(type):
    """The class of rewritten classes of parametrized modules.

    torch takes a parametrization off by deleting an attribute of the module's class. After the rewrite the attribute is one of its base.
    """

    def __delattr__(cls, name: str) -> None:
        if name not in vars(cls) and hasattr(cls, name):
            raise AutoTPError(f"the parametrization of {name!r} is part of a parallel {cls.__qualname__}. {_ADVICE}")
        super().__delattr__(name)


def _is_parametrized(cls: type[nn.Module]) -> bool:
    found = (value.fget for value in vars(cls).values() if isinstance(value, property))
    return any(getattr(get, "__module__", "") == torch.nn.utils.parametrize.__name__ for get in found)


def _right_inverse(self: ParametrizationList, value: Any) -> None:
    """As torch's own, which swaps new tensors in: those would have no layout. Their values are written into the parameters instead.

    Raises:
        AutoTPError: there is no inverse, or it gives something else than tensors of the parameters' shapes and dtypes.
    """
    parametrizations: list[Any] = list(self)
    assigned = f"a weight that {', '.join(type(p).__name__ for p in parametrizations)} computes was assigned"
    if not isinstance(value, Tensor):
        raise AutoTPError(f"{assigned}: got a {type(value).__name__}, wanted a tensor")
    with torch.no_grad():
        for each in reversed(parametrizations):
            if not hasattr(each, "right_inverse"):
                raise AutoTPError(f"{assigned}, and {type(each).__name__} has no right_inverse: write into its parameters themselves")
            value = each.right_inverse(value)
        new = [*value] if isinstance(value, (tuple, list)) else [value]
        held = [self.original] if self.is_tensor else [getattr(self, f"original{at}") for at in range(self.ntensors)]
        if [_form(x) for x in new] != [_form(x) for x in held]:
            raise AutoTPError(
                f"{assigned}, and right_inverse gives {', '.join(map(_form, new))} for parameters of {', '.join(map(_form, held))}"
            )
        for parameter, values in zip(held, new, strict=True):
            parameter.copy_(values)


def _form(item: Any) -> str:
    return f"{tuple(item.shape)} ({item.dtype})" if isinstance(item, Tensor) else type(item).__name__


MakeForward = Callable[[type[nn.Module]], Callable[..., Any]]


def subclass(base: type[nn.Module], names: tuple[str, ...], make_forward: MakeForward) -> type[nn.Module]:
    """Makes the subclass of `base` whose forward is `make_forward(base)` and whose parameters `names` are views."""
    return _subclass(base, names, make_forward, base.forward)  # type: ignore[arg-type]


@cache  # one subclass per class, its forward and set of names: every block of a model shares it
def _subclass(base: type[nn.Module], names: tuple[str, ...], make_forward: MakeForward, _: Callable[..., Any]) -> type[nn.Module]:
    body: dict[str, Any] = {name: ParameterView(name) for name in names}
    body[BASE] = getattr(base, BASE, base)
    body["register_parameter"] = _keeping_names(base)
    forward = make_forward(base)
    forward.__doc__ = base.forward.__doc__
    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]  # inspect.signature shows the model's own arguments
    body.update(forward=forward, __module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    if issubclass(base, ParametrizationList):
        body["right_inverse"] = _right_inverse
    kind: Any = _Parametrized if type(base) is type and _is_parametrized(base) else type(base)
    return kind(base.__name__, (base,), body)  # type: ignore[no-any-return]


TAKEN_BACK: Any = "taken back"  # in place of a forward: the wrapper does nothing any more
Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def wrap_forward(module: nn.Module, around: Around, undo: Undo) -> None:
    """Give one module `around(module, forward, args, kwargs)` as its forward.

    Its class stays, as code may ask for it (`type(self.mlp) is Mlp`). The replay has the classes that the rewrite gives to modules,
    so it finds such code; it does not have the guards.

    The wrapper runs inside of the module's hooks, and `module.forward(x)` finds it too. The module's `__dict__` must hold
    everything that `around` needs of the module, as it holds the forward that was there: both are copied with the module.
    """
    inner, own = module.forward, module.__dict__.get("forward")
    key = f"_autotp_forward_{sum(k.startswith('_autotp_forward') for k in module.__dict__)}"

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = self.__dict__[key]
        if before is TAKEN_BACK:
            return type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        return around(self, type(self).forward if before is None else _of_instance(before), args, kwargs)

    functools.update_wrapper(forward, getattr(inner, "__func__", inner))
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.Signature([this, *inspect.signature(inner).parameters.values()])
    forward.__signature__ = signature  # type: ignore[attr-defined]  # a forward of the instance's own need not take a self
    attributes, mine = module.__dict__, MethodType(forward, module)
    attributes[key], attributes["forward"] = own, mine

    def back() -> None:
        if attributes.get("forward") is not mine:  # somebody wrapped it since, and goes on calling it
            attributes[key] = TAKEN_BACK
            return
        del attributes[key], attributes["forward"]
        if own is not None:
            attributes["forward"] = own

    undo.push(back)


def _of_instance(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args, **kwargs: forward(*args, **kwargs)


@cache
def _checking_around(key: str, compiled: bool) -> Around:
    def around(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        late = None if is_dynamo_compiling() and not compiled else module.__dict__[key].check(args, kwargs)
        result = forward(module, *args, **kwargs)
        if late is not None:
            raise late
        return result

    return around


def check_calls(module: nn.Module, key: str, check: Any, undo: Undo, *, compiled: bool) -> None:
    """Have `check.check(args, kwargs)` check each call of a module; an error that it returns is raised when the forward is through.

    compiled: code that is compiled checks too; dynamo must be able to follow the check.
    The module's `__dict__` keeps it as `key`, so copies of the module have it too.
    """
    undo.set_item(module.__dict__, key, check)
    wrap_forward(module, _checking_around(key, compiled), undo)
