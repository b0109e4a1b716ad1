"""Sums and norms count what each rank owns: an index that several ranks hold once, padding never."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import isinf
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._ops._math_ops import _NormPartial
from torch.utils._pytree import tree_iter, tree_map_only

from autotp.plan.boxes import is_even
from autotp.plan.layout import replicated
from autotp.rewrite.parameters.dtensor_operators.arguments import named
from autotp.rewrite.parameters.dtensor_operators.views import PartView
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, laid_out, new_dtensor
from autotp.rewrite.parameters.numbers import Numbers
from autotp.rewrite.parameters.own_memory import own_memory

_aten = torch.ops.aten
#: On parts of sums and norms.
_ON_PARTS = (_aten.detach.default, _aten.stack.default)


def owned(x: LayoutDTensor) -> DTensor:
    """Returns the ordinary DTensor over the entries of `x` that each rank owns."""
    return x._plain(x._owned())


class Summed(Numbers):
    """A sum or a norm, of which every rank may hold a part until someone needs the number: then it is reduced.

    Several are stacked as parts (a norm of norms costs one collective); any other operator gets the reduced ones. DTensor's own
    operators are not asked: on parts of a norm some are wrong, and others raise.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.detach.default:  # of its own class: it may become a parameter
            return new_dtensor(cls, args[0]._local_tensor, args[0]._spec, requires_grad=False)
        given = (args, dict(kwargs or {}))
        if func in _ON_PARTS and (parts := _parts_alike(args[0])) is not None:
            return summed(func(parts, *args[1:], **given[1]))
        known: dict[int, tuple[Summed, LayoutDTensor]] = {}

        def reduced(x: Summed) -> LayoutDTensor:
            if id(x) not in known:
                known[id(x)] = x, x._reduced()
            return known[id(x)][1]

        if func is _aten._local_scalar_dense.default or not all(isinstance(t, DTensor) for t in tree_iter(given) if isinstance(t, Tensor)):
            args, kwargs = tree_map_only(DTensor, lambda t: (reduced(t) if isinstance(t, Summed) else t).full_tensor(), given)
            return func(*args, **kwargs)
        result = cls.operate(func, *tree_map_only(Summed, reduced, given))
        own = {id(laid): x for x, laid in known.values()}
        return tree_map_only(LayoutDTensor, lambda t: own.get(id(t), t), result)

    def _whole(self) -> Tensor:
        return self._reduced()._local_tensor

    def _laid(self, whole: Tensor) -> Tensor:
        return self._of_local(own_memory(whole.contiguous(), whole, True))

    def _of_local(self, local: Tensor) -> Tensor:
        """A gradient of this rank's summand: it is the number's own, the same on all ranks."""
        mesh = self._spec.mesh
        spec = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=TensorMeta(local.shape, local.stride(), local.dtype))
        return laid_out(spec, local, replicated(local.shape, mesh.size(mesh.ndim - 1)))

    def _told(self) -> str:
        return "a sum over a tensor that is laid out over ranks"

    def _reduced(self) -> LayoutDTensor:
        """Returns the number itself, on every rank; it is reduced once."""
        mesh = self._spec.mesh
        if not all(p.is_replicate() for p in self._spec.placements):
            whole = _reduced(_ordinary(self))
            meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
            self._local_tensor, self._spec = whole, DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta)
        return laid_out(self._spec, self._local_tensor, replicated(self._local_tensor.shape, mesh.size(mesh.ndim - 1)))


def _reduced(x: DTensor) -> Tensor:
    """Returns the number of which every rank holds a part, reduced over one dim of the mesh after the other."""
    placed = list(x._spec.placements)
    for dim in reversed(range(len(placed))):
        if not placed[dim].is_replicate():
            placed[dim] = Replicate()
            x = x.redistribute(placements=placed)
    return x.full_tensor()


def _parts_alike(given: Any) -> Any:
    """Returns ordinary DTensors that are parts of the same kind on all dims of one mesh; None where `given` cannot be taken so.

    What is the same on all ranks of a dim is a part there too: the first rank's, beside zeros, which change neither a sum nor a norm.
    """
    if isinstance(given, Summed):
        return _ordinary(given) if all(p.is_partial() for p in given._spec.placements) else None
    if not isinstance(given, list | tuple) or not all(isinstance(x, Summed) for x in given):
        return None
    mesh = given[0]._spec.mesh
    kinds = {repr(p): p for x in given for p in x._spec.placements if not p.is_replicate()}
    if len(kinds) != 1 or any(x._spec.mesh is not mesh and x._spec.mesh != mesh for x in given):
        return None
    (kind,) = kinds.values()
    return [_as_part(x, kind) for x in given] if kind.is_partial() else None


def _as_part(x: Summed, kind: Any) -> DTensor:
    spec, mesh = x._spec, x._spec.mesh
    whole_on = [dim for dim, p in enumerate(spec.placements) if p.is_replicate()]
    if not whole_on:
        return _ordinary(x)
    first = all(mesh.get_local_rank(dim) == 0 for dim in whole_on)
    local = x._local_tensor if first else torch.zeros_like(x._local_tensor)
    placed = DTensorSpec(mesh, (kind,) * mesh.ndim, tensor_meta=spec.tensor_meta)
    return new_dtensor(DTensor, local, placed, requires_grad=False)  # type: ignore[no-any-return]


def _ordinary(x: DTensor) -> DTensor:
    return new_dtensor(DTensor, x._local_tensor, x._spec, requires_grad=False)  # type: ignore[no-any-return]


def norms_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the norms of whole tensors without DTensor's dispatch, which costs more than the norms; NotImplemented for others."""
    given, xs = named(func, args, kwargs), args[0]
    order = order_of(func, args, kwargs)
    if given.get("dim") or given.get("keepdim") or order <= 0 or isinf(order):
        return NotImplemented
    if isinstance(xs, LayoutDTensor):
        return _norm(xs, func(xs._owned(), *args[1:], **kwargs), order)
    if not all(isinstance(x, LayoutDTensor) for x in xs):
        return NotImplemented
    return [_norm(x, n, order) for x, n in zip(xs, func([x._owned() for x in xs], *args[1:], **kwargs), strict=True)]


def _norm(x: LayoutDTensor, local: Tensor, order: float) -> Summed:
    spec = _spec_of_norm(x._spec.mesh, tuple(p.is_replicate() for p in x._spec.placements), order, local.dtype)
    return new_dtensor(Summed, local, spec, requires_grad=False)  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def _spec_of_norm(mesh: Any, whole: tuple[bool, ...], order: float, dtype: torch.dtype) -> DTensorSpec:
    placed = tuple(Replicate() if w else _NormPartial(order) for w in whole)
    return DTensorSpec(mesh, placed, tensor_meta=TensorMeta(torch.Size(()), (), dtype))


def summed(result: Any) -> Any:
    """Returns the ordinary DTensors in `result` as sums."""
    return tree_map_only(
        DTensor, lambda x: new_dtensor(Summed, x._local_tensor, x._spec, requires_grad=False) if type(x) is DTensor else x, result
    )


def counts_once(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True where zeros instead of copies and padding do not change the result, and no dim in a layout's order is left in it."""
    if not isinstance(args[0], LayoutDTensor) or type(args[0]) is PartView or any(isinstance(v, Tensor) for v in kwargs.values()):
        return False
    layout = args[0]._layout
    given = named(func, args, kwargs)
    order, dims = order_of(func, args, kwargs), given.get("dim")
    if order < 0 or (isinf(order) and not layout.shape):
        return False
    if not dims or (is_even(layout) and args[0]._spec.mesh.ndim == 1):
        return True
    dims = {d % args[0].ndim for d in ([dims] if isinstance(dims, int) else dims)}
    return {p.dim for p in args[0]._spec.placements if not p.is_replicate()} <= dims and not given.get("keepdim")  # type: ignore[attr-defined]


def order_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Returns the order of a norm; below 0, zeros count as the least entries do."""
    given = named(func, args, kwargs)
    order = given.get("ord", given.get("p"))
    return 2.0 if order is None else float(order)


def with_dims(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with all dims named where no dim is: torch reduces all then, DTensor none."""
    kwargs = dict(kwargs)
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            given = args[i] if i < len(args) else kwargs.get("dim", ())
            if isinstance(given, list | tuple) and not given and isinstance(args[0], Tensor):
                dims = list(range(args[0].ndim))
                if i < len(args):
                    return (*args[:i], dims, *args[i + 1 :]), kwargs
                if "dim" in kwargs:
                    kwargs["dim"] = dims
    return args, kwargs
