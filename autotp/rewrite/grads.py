"""Gradients of DTensor parameters: made and accumulated cheaply, and with the norm of one device.

`AccumulateGrad` detaches the gradient it is given; on a DTensor that is a dispatch through DTensor's machinery (12 µs a
parameter, 5 % of a small training step). `LocalGrad` is a DTensor that answers `detach` itself, with a plain DTensor, and hands
every other operator on. It lives between a backward and the accumulation; `param.grad` is an ordinary DTensor.

Where the layout has shared indices, an ordinary DTensor would count their gradient once for every copy. There `param.grad` is a
`SharedGrad`, which sums over its owned entries only: the norm that clips is

    ‖g‖ = (Σ over ranks of Σ over owned entries of |g|^p)^(1/p)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isinf
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from autotp.plan.layout import Layout, take
from autotp.rewrite.comm import GroupComm

_detach = torch.ops.aten.detach.default
_aten = torch.ops.aten
# DTensor's own constructor spends 3 µs in Python before it comes to this one.
_new: Callable[..., Any] = torch.Tensor._dtensor__new__
# Operators in which an entry counts as often as it is there (but for norms of infinite order, which are maxima).
_COUNTING = frozenset(
    getattr(_aten, name)
    for name in ("linalg_vector_norm", "norm", "_foreach_norm", "linalg__powsum", "_foreach_powsum", "sum")
    if hasattr(_aten, name)
)


def plain(grad: DTensor) -> DTensor:
    """The ordinary DTensor over the same local tensor."""
    return _new(DTensor, grad._local_tensor, grad._spec, requires_grad=False)  # type: ignore[no-any-return]


class LocalGrad(DTensor):
    """A gradient on its way to `param.grad`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _detach:
            return plain(args[0])
        return func(*tree_map_only(LocalGrad, plain, args), **tree_map_only(LocalGrad, plain, dict(kwargs or {})))


class SharedGrad(DTensor):
    """The gradient of a parameter with shared indices, every copy of which holds the whole sum.

    Sums and norms count an index once. Any other operator runs on ordinary DTensors; a result that is placed like this gradient
    is one again (a clone, a scaled gradient), an in-place operator changes this one. Pickled as an ordinary DTensor.
    """

    __slots__ = ("_shared_layout",)
    _shared_layout: Layout

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _detach:
            return args[0]._like(args[0]._local_tensor, args[0]._spec)
        counts = func.overloadpacket in _COUNTING and _counts(func, args, kwargs)
        originals: dict[int, tuple[DTensor, SharedGrad]] = {}

        def ordinary(grad: SharedGrad) -> DTensor:
            made = _new(DTensor, grad._owned(), grad._spec, requires_grad=False) if counts else plain(grad)
            originals[id(made)] = made, grad
            return made

        result = func(*tree_map_only(SharedGrad, ordinary, args), **tree_map_only(SharedGrad, ordinary, kwargs))
        if counts:
            return result
        if isinstance(result, list | tuple):  # of a foreach operator: one result for each tensor of its first list
            first = args[0] if isinstance(args[0], list | tuple) and len(args[0]) == len(result) else [None] * len(result)
            return type(result)(_replaced(r, originals, [g]) for r, g in zip(result, first, strict=True))
        return _replaced(result, originals, [grad for _, grad in originals.values()])

    def _like(self, local: Tensor, spec: Any) -> SharedGrad:
        return shared_grad(spec, local, self._shared_layout)

    def _owned(self) -> Tensor:
        """The local tensor with zeros where another copy of the index is the owner."""
        layout = self._shared_layout
        dim, local = layout.dim or 0, self._local_tensor
        at, parts = 0, []
        for a, b in layout.owned(self._spec.mesh.get_local_rank()):
            parts += [(at - a, 0), (a, b)] if a > at else [(a, b)]
            at = b
        end = local.shape[dim]
        return take(local, dim, [*parts, (at - end, 0)] if at < end else parts)

    def full_tensor(self, *, grad_placements: Sequence[Any] | None = None) -> Tensor:
        """The whole gradient in the model's order and shape. Collective."""
        return self._shared_layout.unshard(GroupComm(self._spec.mesh.get_group()).all_gather(self._local_tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _counts(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True where this call of a counting operator sums over the dim with shared indices."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    order, dims = given.get("ord", given.get("p")), given.get("dim")
    if order is not None and isinf(order):
        return False
    return not dims or (args[0]._shared_layout.dim or 0) in [d % args[0].ndim for d in dims]


def _replaced(result: Any, originals: Mapping[int, tuple[DTensor, SharedGrad]], likely: Sequence[Any]) -> Any:
    """`result` as the `SharedGrad` that it is: one that was changed in place, or a new one placed like one of `likely`."""
    if not isinstance(result, DTensor):
        return result
    if id(result) in originals:
        return originals[id(result)][1]
    for grad in likely:
        if type(grad) is SharedGrad and grad.shape == result.shape and grad._spec.placements == result._spec.placements:
            return grad._like(result._local_tensor, result._spec)
    return result


def shared_grad(spec: Any, local: Tensor, layout: Layout) -> SharedGrad:
    """The gradient of a parameter placed as `spec` whose `layout` has shared indices."""
    grad: SharedGrad = _new(SharedGrad, local, spec, requires_grad=False)
    grad._shared_layout = layout
    return grad


def grad_of(spec: Any, local: Tensor, layout: Layout | None = None) -> DTensor:
    """The gradient of a parameter placed as `spec` from that of its local tensor (same shape).

    `layout`: that of the parameter, where it has shared indices.
    """
    if layout is not None:
        return shared_grad(spec, local, layout)
    return _new(LocalGrad, local, spec, requires_grad=False)  # type: ignore[no-any-return]
