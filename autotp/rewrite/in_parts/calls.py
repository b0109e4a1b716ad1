"""Runs an operator on tensors in parts: on the parts where a way to do so is known, else on whole tensors, gathered on the spot.

So every result is that of one device. An operator that has to gather is collective, as the model's call is: all ranks run it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_iter, tree_map_only

from autotp.errors import AutoTPError
from autotp.rewrite.in_parts.tensor import InParts, check_views, own_part, parted, version_of, whole

plainly = torch._C.DisableTorchFunctionSubclass
#: What asks for no entry, or is asked of the tensor itself: shapes, flags, gradients and their hooks.
_OF_ITSELF = frozenset(
    (
        "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "dtype", "device", "layout", "is_floating_point",
        "is_complex", "is_signed", "is_contiguous", "element_size", "itemsize", "nbytes", "__len__", "requires_grad", "requires_grad_",
        "is_leaf", "grad", "grad_fn", "retain_grad", "retains_grad", "output_nr", "_version", "register_hook", "backward", "names",
        "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "get_device", "__hash__", "__class__",
        "is_inference", "_backward_hooks", "register_post_accumulate_grad_hook", "is_tensor", "grad_dtype",
        "_is_view", "_base", "is_neg", "is_conj", "_is_zerotensor", "is_sparse_csr", "is_xpu", "is_mps", "is_quantized", "is_shared",
    )
)  # fmt: skip
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD_KEY = torch._C.DispatchKey.AutogradFunctionality
_AUTOGRAD = frozenset((torch.autograd.backward, torch.autograd.grad))


def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs a function of torch, of which some arguments are in parts.

    Raises:
        AutoTPError: it would change in place what another tensor shares, or reads a tensor of which a view was changed so.
    """
    if isinstance(func, torch._ops.OpOverload) and _excluded(_AUTOGRAD_KEY):  # a dispatch mode hands on what autograd does
        return below_autograd(func, args, kwargs)
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        attribute = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        name = attribute if name == "__get__" or attribute in ("grad", "requires_grad") else name
        func = Tensor.detach if (name, attribute) == ("data", "data") else func
    if name in _OF_ITSELF or func in _AUTOGRAD:
        return func(*args, **kwargs)
    if _writes(name, args, kwargs):
        return _change(func, name, args, kwargs)
    tensors = [t for t in tree_iter((args, dict(kwargs))) if isinstance(t, InParts)]
    for t in tensors:
        check_views(t)
    way = None if kwargs.get("out") is not None else tensors[0].way(func)
    if way is not None:
        try:
            result = way(*args, **{_KEYWORDS.get(k, k): v for k, v in kwargs.items()})
        except TypeError:  # arguments that only torch knows
            result = NotImplemented
        if result is not NotImplemented:
            return result
    return _on_wholes(func, tensors, args, kwargs)


_KEYWORDS = {"axis": "dim", "keepdims": "keepdim"}


def _on_wholes(func: Callable[..., Any], tensors: list[InParts], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operator on whole tensors. A result that has their memory shares it on one device too: it is remembered."""
    made: dict[int, Tensor] = {id(t): whole(t) for t in tensors}
    versions = {key: version_of(t) for key, t in made.items()}
    result = func(*tree_map_only(InParts, lambda t: made[id(t)], args), **tree_map_only(InParts, lambda t: made[id(t)], dict(kwargs)))
    if any(version_of(made[key]) != version for key, version in versions.items()):
        raise AutoTPError(
            f"{getattr(func, '__name__', func)} would change {tensors[0].noun} in place that are in parts over the ranks: "
            f"write {_new(tensors[0])}"
        )
    for x in tensors:
        memory = made[id(x)].untyped_storage()._cdata
        for r in tree_iter(result):
            if isinstance(r, Tensor) and r.layout is torch.strided and r.untyped_storage()._cdata == memory:
                x.shares, x.handed = True, [] if x.handed is None else x.handed
                x.handed.append((r, version_of(r)))
            elif isinstance(r, np.ndarray):
                r.flags.writeable = False
    return result


def _new(x: InParts, what: str = "/ 2") -> str:
    return f"`{x.noun} = {x.noun} {what}`"


def _writes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True for operators that change their first argument, which is in parts, and for results written into such a tensor."""
    if isinstance(kwargs.get("out"), InParts):
        return True
    in_place = name in ("__setitem__", "__set__") or (name.startswith("__i") and name[3:-2] in _AUGMENTED)
    return (in_place or (name.endswith("_") and not name.endswith("__"))) and bool(args) and isinstance(args[0], InParts)


_AUGMENTED = frozenset(("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))


def _change(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Changes a tensor in parts in place: it becomes the tensor that the operator would make.

    Raises:
        AutoTPError: it shares memory with another tensor on one device, which would change too.
    """
    x = args[0] if args and isinstance(args[0], InParts) else None
    if x is None or x.shares or "out" in kwargs or x._backward_hooks:
        of = x if x is not None else kwargs["out"]
        raise AutoTPError(
            f"{name} would change {of.noun} that are in parts over the ranks ({of.option}) in place, and views of them, which hold "
            f"numbers of their own: write {_new(of)}, change them before slices and views are made of them, or change "
            f"{of.noun}.full_tensor()"
        )
    plain = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    way = x.way(getattr(Tensor, plain)) if plain != name and hasattr(Tensor, plain) else None
    result = NotImplemented if way is None else way(*args, **kwargs)
    if not isinstance(result, InParts) or result.shape != x.shape:
        changed = whole(x).clone()
        func(changed, *_wholes(args[1:]), **_wholes(dict(kwargs)))
        if changed.shape != x.shape:
            raise AutoTPError(f"{name} would give {x.noun} in parts over the ranks another shape in place: write {_new(x, '…')}")
        result = parted(type(x), x._kind, own_part(changed, x._kind))
    if result.dtype != x.dtype:  # a change in place keeps it
        result = x.way(Tensor.to)(result, x.dtype)  # type: ignore[misc]
    if not torch.is_grad_enabled() or not (x.requires_grad or result.requires_grad):  # its history stays; a gradient has none
        if x.requires_grad and _in_function():
            raise AutoTPError(
                f"{name} would change {x.noun} in place that are in parts over the ranks ({x.option}), in the forward of an "
                f"autograd.Function: write {_new(x)} there, and no mark_dirty"
            )
        x._local_tensor.copy_(result._local_tensor)
        x.forget()
        torch.autograd.graph.increment_version(x)
        return None if name == "__setitem__" else x
    try:
        torch.utils.swap_tensors(x, result)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise AutoTPError(f"{name} would change {x.noun} in place that something else refers to ({error}): write {_new(x)}") from error
    return None if name == "__setitem__" else x


def _in_function() -> bool:
    """True where the forward of an autograd.Function is running, and no module that it calls."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        if frame.f_code is torch.autograd.Function.apply.__func__.__code__:  # type: ignore[attr-defined]
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _wholes(value: Any) -> Any:
    return tree_map_only(InParts, whole, value)


_aten = torch.ops.aten
_ON_PARTS = frozenset(
    (
        _aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor,
        _aten.mul.Scalar, _aten.neg.default, _aten.div.Tensor, _aten.zeros_like.default, _aten.ones_like.default,
        _aten.empty_like.default, _aten._to_copy.default,
    )
)  # fmt: skip


def below_autograd(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs what autograd itself does with gradients in parts: it sums and copies them. Anything else gets whole tensors."""
    tensors = [a for a in args if isinstance(a, Tensor) and a.ndim]
    x: InParts = next(a for a in tree_iter((args, dict(kwargs))) if isinstance(a, InParts))
    alike = all(isinstance(t, InParts) and t._kind == x._kind for t in tensors)
    if func in _ON_PARTS and alike:
        result = func(*tree_map_only(InParts, lambda t: t._local_tensor, args), **kwargs)
        return args[0] if func is _aten.add_.Tensor else type(x).of(result, x._kind)
    if func._schema.is_mutable and any(isinstance(a, InParts) for a in args[:1]):
        raise AutoTPError(f"{func} would change {x.noun} that are in parts over the ranks ({x.option}) in place")
    return func(*_wholes(args), **_wholes(dict(kwargs)))


def whole_results(result: Any, kind: type[InParts] = InParts) -> Any:
    """A call's result with plain tensors in place of those in parts of a kind. Collective where there are some."""
    if tree_any(lambda t: isinstance(t, kind), result):
        with plainly():
            return tree_map_only(kind, whole, result)
    return result


class Gathers(InParts):
    """A tensor in parts that any operator may get."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        with plainly():
            return run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return below_autograd(func, args, kwargs or {})

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """Returns the plain whole tensor, differentiable. Collective."""
        return self.gathered()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.gathered().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
