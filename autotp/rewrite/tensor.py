"""A DTensor that knows its layout, for what is not cut evenly.

The DTensor of a fused parameter is in the layout's order, one with padding or shared indices is larger than the model's tensor. Taken
for an even `Shard` it would be read, saved and counted wrongly, and nothing would say so. So such parameters, their gradients, and what
is made from them element by element (a detached parameter, a clone, an optimizer's moments) are `LayoutDTensor`s:

- `full_tensor` and `redistribute` to `Replicate` give the model's tensor, in its order and shape;
- torch.distributed.checkpoint saves and loads them in the model's order (`Sharded`), or refuses;
- sums and norms count an index that several ranks hold once:  ‖g‖ = (Σ over ranks of Σ over owned entries of |g|^p)^(1/p);
- a DTensor whose order is not known to be the same is not copied into one.

Operators on elements run on the local tensors. Any other operator runs on ordinary DTensors; a result that is placed and shaped like an
argument is laid out like it. Nothing here is called in a forward, which reads local tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isinf
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._pytree import tree_map_only

from autotp.errors import AutoTPError, CheckpointError
from autotp.plan import layout as layouts
from autotp.plan.layout import Layout, take
from autotp.rewrite.comm import GroupComm
from autotp.rewrite.sharded import Sharded

_aten = torch.ops.aten
_detach, _copy_ = _aten.detach.default, _aten.copy_.default
# DTensor's own constructor spends 3 µs in Python before it comes to this one.
_new: Callable[..., Any] = torch.Tensor._dtensor__new__
# Operators in which an entry counts as often as it is there (but for norms of infinite order, which are maxima).
_COUNTING = frozenset(
    getattr(_aten, name)
    for name in ("linalg_vector_norm", "norm", "_foreach_norm", "linalg__powsum", "_foreach_powsum", "sum")
    if hasattr(_aten, name)
)


def plain(tensor: DTensor) -> DTensor:
    """The ordinary DTensor over the same local tensor."""
    return _new(DTensor, tensor._local_tensor, tensor._spec, requires_grad=False)  # type: ignore[no-any-return]


class LayoutDTensor(DTensor):
    """A DTensor in the order of its layout, which is in its `__dict__` (`__slots__` of a subclass would hide those of DTensor)."""

    _layout: Layout

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _detach:
            return args[0]._like(args[0]._local_tensor, args[0]._spec)
        if func is _copy_:
            _same_order(args[0], args[1])
        tags = func.tags
        on_elements = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags  # DTensor knows about seeds
        if on_elements and (result := _on_elements(func, args, kwargs)) is not NotImplemented:
            return result
        counts = func.overloadpacket in _COUNTING and _counts(func, args, kwargs)
        originals: dict[int, tuple[DTensor, LayoutDTensor]] = {}

        def ordinary(tensor: LayoutDTensor) -> DTensor:
            made = _new(DTensor, tensor._owned(), tensor._spec, requires_grad=False) if counts else plain(tensor)
            originals[id(made)] = made, tensor
            return made

        result = func(*tree_map_only(LayoutDTensor, ordinary, args), **tree_map_only(LayoutDTensor, ordinary, kwargs))
        if counts:
            return result
        if isinstance(result, list | tuple):  # of a foreach operator: one result for each tensor of its first list
            first = args[0] if isinstance(args[0], list | tuple) and len(args[0]) == len(result) else [None] * len(result)
            return type(result)(_replaced(r, originals, [t]) for r, t in zip(result, first, strict=True))
        return _replaced(result, originals, [tensor for _, tensor in originals.values()])

    def _like(self, local: Tensor, spec: Any) -> LayoutDTensor:
        return laid_out(spec, local, self._layout)

    def _owned(self) -> Tensor:
        """The local tensor with zeros where another copy of the index is the owner."""
        layout, local = self._layout, self._local_tensor
        if not layout.is_shared:
            return local
        dim, at = layout.dim or 0, 0
        parts: list[tuple[int, int]] = []
        for a, b in layout.owned(self._rank):
            parts += [(at - a, 0), (a, b)] if a > at else [(a, b)]
            at = b
        end = local.shape[dim]
        return take(local, dim, [*parts, (at - end, 0)] if at < end else parts)

    @property
    def _rank(self) -> int:
        return self._spec.mesh.get_local_rank()

    def full_tensor(self, *, grad_placements: Sequence[Any] | None = None) -> Tensor:
        """The whole tensor in the model's order and shape, differentiable. Collective."""
        if grad_placements is not None:
            raise AutoTPError("full_tensor(grad_placements=…) of a parameter that is not cut evenly takes gradients that are whole only")
        return _Whole.apply(self)  # type: ignore[no-any-return, no-untyped-call]

    def redistribute(self, device_mesh: Any = None, placements: Sequence[Any] | None = None, **options: Any) -> DTensor:
        """To `Replicate`: the whole tensor in the model's order and shape. Collective.

        Raises:
            AutoTPError: for other placements than its own and `Replicate`.
        """
        wanted = tuple(placements or ())
        if wanted == tuple(self._spec.placements):
            return self
        if device_mesh not in (None, self._spec.mesh) or not all(p.is_replicate() for p in wanted) or not wanted:
            raise AutoTPError(f"a tensor with the layout {self._layout} is not cut evenly: it can be made whole, not placed as {wanted}")
        return DTensor.from_local(self.full_tensor(), self._spec.mesh, wanted, run_check=False)

    def __create_write_items__(self, fqn: str, object: object) -> list[Any]:
        return self._sharded(fqn).__create_write_items__(fqn, object)

    def __create_chunk_list__(self) -> list[Any]:
        return self._sharded("a tensor").__create_chunk_list__()

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self._sharded(index.fqn).__get_tensor_shard__(index)

    def _sharded(self, name: str) -> Sharded:
        """What torch.distributed.checkpoint is told. It compares shapes before, so one larger than the model's it could not load.

        Raises:
            CheckpointError: for a layout with padding or shared indices.
        """
        if tuple(self.shape) != self._layout.shape:
            raise CheckpointError(
                f"{name} has the layout {self._layout} of shape {self._layout.shape}; with padding or copies of indices its DTensor is "
                f"{tuple(self.shape)}, which torch.distributed.checkpoint alone cannot load: use autotp.checkpoint.save and load"
            )
        return Sharded(self._local_tensor, self._layout, self._rank)

    def __tensor_flatten__(self) -> Any:
        # torch.compile wants DTensor's own four values here, so the layout comes with one of them.
        inner, (placements, meta, *rest) = super().__tensor_flatten__()  # type: ignore[no-untyped-call]
        return inner, (placements, _Meta.of(meta, self._layout), *rest)

    @staticmethod
    def __tensor_unflatten__(inner_tensors: Any, flatten_spec: Any, outer_size: Any, outer_stride: Any) -> DTensor:
        made: DTensor = DTensor.__tensor_unflatten__(inner_tensors, flatten_spec, outer_size, outer_stride)  # type: ignore[no-untyped-call]
        return _rebuilt(made, flatten_spec[1].layout, flatten_spec[-1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (plain(self), self._layout, self.requires_grad)


class _Meta(TensorMeta):
    """DTensor's size, stride and dtype, equal to those without a layout."""

    layout: Layout

    @staticmethod
    def of(meta: TensorMeta, layout: Layout) -> _Meta:
        made = _Meta(*meta)
        made.layout = layout
        return made

    def __reduce__(self) -> Any:
        return _Meta.of, (TensorMeta(*self), self.layout)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: LayoutDTensor) -> Tensor:
        ctx.layout, ctx.spec, ctx.rank = p._layout, p._spec, p._rank
        return p._layout.unshard(GroupComm(p._spec.mesh.get_group()).all_gather(p._local_tensor))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The gradient is whole on every rank, and so is that of each copy.
        return laid_out(ctx.spec, take(grad, ctx.layout.dim, ctx.layout.runs(ctx.rank)).contiguous(), ctx.layout)


def laid_out(spec: Any, local: Tensor, layout: Layout) -> LayoutDTensor:
    """The DTensor placed as `spec` over `local` (shape `layout.local_shape`), in the order of `layout`."""
    made: LayoutDTensor = _new(LayoutDTensor, local, spec, requires_grad=False)
    made._layout = layout
    return made


def _rebuilt(tensor: DTensor, layout: Layout, requires_grad: bool) -> LayoutDTensor:
    made = laid_out(tensor._spec, tensor._local_tensor, layout)
    return made.requires_grad_(requires_grad)  # type: ignore[return-value]


# What `torch.load` must know to read one.
torch.serialization.add_safe_globals([_rebuilt, Layout, layouts.Factor, layouts.Product, layouts.Concat])


def _same_order(into: Any, source: Any) -> None:
    """Raise where it is not known that `source` has the order of `into`."""
    if isinstance(into, LayoutDTensor) and isinstance(source, DTensor):
        known = source._layout if isinstance(source, LayoutDTensor) else None
        if known is None or not (known == into._layout or layouts.alike(known, into._layout)):
            raise AutoTPError(
                f"a tensor in the order of the layout {into._layout} is not filled from a DTensor "
                f"{'of the layout ' + str(known) if known is not None else 'that says nothing of its order'}: load whole tensors before "
                "parallelize, a parallel model's own state_dict, or what autotp.checkpoint.save wrote"
            )


def _on_elements(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operator on elements of tensors that are placed alike; NotImplemented where they are not."""
    like: LayoutDTensor | None = None
    local: list[Any] = []
    for a in args:
        if not isinstance(a, Tensor):
            local.append(a)
            continue
        if not isinstance(a, DTensor):
            return NotImplemented
        local.append(a._local_tensor)
        if like is None and isinstance(a, LayoutDTensor):
            like = a
    if like is None or kwargs.get("out") is not None or any(isinstance(v, Tensor) for v in kwargs.values()):
        return NotImplemented
    spec = like._spec
    for a in args:
        if isinstance(a, DTensor) and not _alike(a._spec, spec):
            return NotImplemented
    result = func(*local, **kwargs)
    if func._schema.name.endswith("_"):
        return args[0]
    if not isinstance(result, Tensor) or result.shape != like._local_tensor.shape:
        raise AutoTPError(f"{func} is not an operator on elements")
    meta: Any = spec.tensor_meta
    if result.dtype != meta.dtype:
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=TensorMeta(meta.shape, meta.stride, result.dtype))
    return like._like(result, spec)


def _alike(a: Any, b: Any) -> bool:
    return a is b or (a.placements == b.placements and a.tensor_meta.shape == b.tensor_meta.shape and a.mesh == b.mesh)


def _counts(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True where this call of a counting operator sums over the dim with shared indices."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    order, dims = given.get("ord", given.get("p")), given.get("dim")
    if order is not None and isinf(order):
        return False
    return not dims or (args[0]._layout.dim or 0) in [d % args[0].ndim for d in dims]


def _replaced(result: Any, originals: Mapping[int, tuple[DTensor, LayoutDTensor]], likely: Sequence[Any]) -> Any:
    """`result` as the `LayoutDTensor` that it is: one that was changed in place, or a new one placed like one of `likely`."""
    if not isinstance(result, DTensor):
        return result
    if id(result) in originals:
        return originals[id(result)][1]
    for tensor in likely:
        if isinstance(tensor, LayoutDTensor) and tensor.shape == result.shape and tensor._spec.placements == result._spec.placements:
            return tensor._like(result._local_tensor, result._spec)
    return result
