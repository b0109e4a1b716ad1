"""Guards values that are whole while their gradient is not: code that asks for that gradient gets an error.

A module may return a value and go on computing with it. The result may be gathered or summed for the caller, while the code inside
goes on with this rank's part. The result's own gradient then lacks that of the uses inside. Everything computed from it is right
(`Copied`). Where a gradient becomes whole only further back, the gradient of a value on the way is a summand. A term that a hook
computes from the value would be counted once for each rank (`Summed`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from autotp.errors import AutoTPError
from autotp.plan.items import Path
from autotp.rewrite.modules.boundaries import map_path

_GRAD, _BACKWARD, _HOOK = torch.autograd.grad, torch.autograd.backward, Tensor.register_hook
_ASKING = frozenset((Tensor.retain_grad, _HOOK, Tensor.backward, _GRAD, _BACKWARD))
#: Where `torch.autograd.grad`, `torch.autograd.backward` and `Tensor.backward` take tensors whose gradients they give.
_INPUTS = {_GRAD: 1, _BACKWARD: 5, Tensor.backward: 4}
_NODE: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]
_GRAPH, _PARAMETER = torch.autograd.graph.__file__, torch.nn.parameter.__file__
_ADVICE = "Ask for the gradient of a tensor before or after it (a module's result that is whole, a parameter), or before parallelize"

_COUNTED = (
    "the gradient of what this hook is given becomes whole only further back in the parallel model: what is computed from it would be "
    f"counted once for each rank. Take it without gradients, x.detach(). {_ADVICE}"
)


class Copied(Tensor):
    """A result that is a copy of the value that the code inside goes on with. Its operators give plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in _ASKING and _asks(func, args, kwargs)) or (func == _NODE and _asked_by(_GRAPH)):
            raise AutoTPError(
                "this tensor is a copy of what the parallel model goes on computing with, and its gradient here lacks that of the uses "
                f"inside of the model. {_ADVICE}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            # nn.Parameter wants to detach without a change of class
            return result.as_subclass(Copied) if func is Tensor.detach and _asked_by(_PARAMETER) else result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return repr(self.as_subclass(Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class Call:
    """One call of a hook. `open` while it runs: a value that it computes may replace its argument, or must not need gradients."""

    __slots__ = ("open",)

    def __init__(self) -> None:
        self.open = True


class Summed(Copied):
    """A value whose gradient is this rank's summand, as a hook gets it, and the values that the hook computes from it."""

    _call: Call

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING or (func == _NODE and _asked_by(_GRAPH)):
            raise AutoTPError(_COUNTED)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
            made = [t for t in tree_iter(result) if isinstance(t, Tensor) and t.requires_grad]
        call = next((t._call for t in given if isinstance(t, Summed)), None)
        if not made or call is None:
            return result
        if not (call.open and all(isinstance(t, Summed) for t in given)):
            raise AutoTPError(_COUNTED)
        for t in made:
            if type(t) is Tensor:
                t.__class__, t._call = Summed, call  # type: ignore[attr-defined]
        return result


def _asked_by(file: str) -> bool:
    """True where the code of `file` makes the call that `__torch_function__` answers."""
    return sys._getframe(2).f_code.co_filename == file


def _asks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True where `func` gives or shows the gradient of a `Copied`. torch's own hooks (FSDP's) change none."""
    if func is _HOOK:
        hook = args[1] if len(args) > 1 else kwargs.get("hook")
        return args[0].grad_fn is not None and not is_torchs(hook)
    at = _INPUTS.get(func)
    if at is None:
        return args[0].grad_fn is not None
    inputs = args[at] if len(args) > at else kwargs.get("inputs")
    return any(isinstance(t, Copied) and t.grad_fn is not None for t in tree_iter(inputs))


def is_torchs(hook: Any) -> bool:
    """True for a hook of torch itself, but for those of its tools that compute (weight norms)."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith("torch.") and not home.startswith("torch.nn.utils.")


def mark_copied(result: Any, paths: Iterable[Path]) -> Any:
    """Returns the result of a call with those at `paths` as `Copied`."""
    for path in paths:
        result = map_path(result, path, _copied)
    return result


def _copied(x: Tensor) -> Tensor:
    if x.requires_grad and type(x) is Tensor:
        x.__class__ = Copied
    return x


class Hook:
    """Wraps a forward hook or pre-hook of a user on a module with such values.

    Args:
        argument, result: the class of the values that it gets; None where these are as on one device.
        before: it is a pre-hook, and gets no result.
    """

    __slots__ = ("argument", "before", "hook", "result")

    def __init__(self, hook: Callable[..., Any], argument: type[Copied] | None, result: type[Copied] | None, before: bool) -> None:
        self.hook, self.argument, self.result, self.before = hook, argument, result, before

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, *values: Any) -> Any:
        call = Call()
        last = len(values) - (not self.before)
        shown = [_shown(v, self.argument if i < last else self.result, call) for i, v in enumerate(values)]
        try:
            found = self.hook(module, *shown)
        finally:
            call.open = False
        return tree_map_only(Copied, _plain, found)


def _shown(values: Any, cls: type[Copied] | None, call: Call) -> Any:
    def one(x: Tensor) -> Tensor:
        if not x.requires_grad or type(x) is not Tensor:
            return x
        made = x.as_subclass(cls)  # type: ignore[arg-type]
        if cls is Summed:
            made._call = call  # type: ignore[attr-defined]
        return made

    return values if cls is None else tree_map_only(Tensor, one, values)


def _plain(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)
