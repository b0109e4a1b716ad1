"""Gives plain tensors that meet a parameter in an operator plain gradients, and the parameter one in its layout.

`h @ weight.T` of a plain `h` is computed from the whole weight on every rank, alike. Autograd makes each gradient from what it finds:
a gradient of `h` may come out as a tensor that is laid out over the ranks, which the code that made `h` (the parallel model, a kernel)
does not take; that of a weight comes out whole. Hooks on both put that right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter

from autotp.errors import AutoTPError
from autotp.plan.spec import Shown
from autotp.rewrite.parameters.compiled_grads import order_gradient
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.running_code import EXAMPLES, running_code

_register = torch.Tensor.register_hook
_ACTIVATION = "_autotp_activation"


class _Plain:
    """A hook on a plain tensor: it makes a gradient whole and plain."""

    __slots__ = ()
    __torch_unserializable__ = True  # the tensor may be saved without it

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        return grad.full_tensor() if isinstance(grad, DTensor) else None


def keep_kinds(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Hooks the arguments of an operator that record gradients, where some are plain and some are laid out."""
    tensors = [t for t in tree_iter((args, dict(kwargs))) if isinstance(t, Tensor)]
    if all(isinstance(t, DTensor) for t in tensors):
        return
    for t in tensors:
        if not t.requires_grad:
            continue
        if not isinstance(t, DTensor):
            hooks: Any = t._backward_hooks
            if not any(type(hook) is _Plain for hook in (hooks or {}).values()):
                with torch._C.DisableTorchFunctionSubclass():  # results of the model refuse hooks of users
                    _register(t, _Plain())  # type: ignore[no-untyped-call]
        elif isinstance(t, LayoutDTensor) and t.is_leaf:
            order_gradient(t)


def refuse_on_parts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Refuses an operator on a parameter and plain tensors in code of a model that holds more than whole values.

    What the plan knows of a forward reads local tensors instead of parameters. Here the plain tensors may be a rank's part or summand.

    Returns:
        True where there are plain tensors: then the result is an activation, as they are.

    Raises:
        AutoTPError: names the parameter.
    """
    if not _beside_plain(args) and not (kwargs and _beside_plain(kwargs.values())):
        return False
    tensors = [t for t in tree_iter((args, dict(kwargs))) if isinstance(t, Tensor)]
    laid = [t for t in tensors if isinstance(t, LayoutDTensor) and _ACTIVATION not in t.__dict__]
    if not laid or isinstance(laid[0]._local_tensor, FakeTensor):
        return True
    if (found := running_code()) is None or (holding := found[0]).shown is None:
        return True
    if holding.shown is Shown.GRADIENT and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return True
    memory = _memory(laid[0])
    names = (n for n, p in found[1].named_parameters() if isinstance(p, LayoutDTensor) and _memory(p) == memory)
    name = next(names, f"a parameter of shape {tuple(laid[0].shape)}")
    raise AutoTPError(
        f"{name} is read by {holding}, and no traced call of the model read it there: the plan is not made for what it would compute. "
        f"{EXAMPLES}"
    )


def _beside_plain(items: Iterable[Any]) -> bool:
    """True where there is a plain tensor, or one that was made of such. Every operator of an optimizer asks, most of parameters alone."""
    for item in items:
        if isinstance(item, DTensor):
            if _ACTIVATION in item.__dict__:
                return True
        elif isinstance(item, list | tuple):
            if _beside_plain(item):
                return True
        elif is_plain(item):
            return True
    return False


def mark_activations(result: Any) -> None:
    """Marks what an operator made of plain tensors, which may be laid out all the same."""
    for t in result if isinstance(result, list | tuple) else (result,):
        if isinstance(t, LayoutDTensor) and not getattr(t, "_is_param", False):
            t.__dict__[_ACTIVATION] = True


def _memory(x: LayoutDTensor) -> int:
    return x._local_tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def is_plain(x: Any) -> bool:
    """True for a plain tensor with dims: a number may go with the part of any rank."""
    return isinstance(x, Tensor) and not isinstance(x, DTensor) and x.ndim > 0
