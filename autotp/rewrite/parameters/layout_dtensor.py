"""Every parameter of a parallel model is a `LayoutDTensor`, a DTensor that knows its layout.

The parts of a fused parameter are in the layout's order. Those with padding or shared indices are together larger than the model's
tensor. Code that took them for an even `Shard` would read, save and count them wrongly, and no error would say so; and writes to
views of an even one would go into a copy. So parameters, their gradients, and tensors made from them element by element (a detached
parameter, a clone, an optimizer's moments) are `LayoutDTensor`s:

- `full_tensor` and `redistribute` to `Replicate` give the model's tensor, in its order and shape;
- torch.distributed.checkpoint saves and loads them in the model's order (`Sharded`);
- operators on them give the results of one device (`autotp.rewrite.parameters.dtensor_operators`);
- `data = …` takes a whole tensor, or one in the same layout.

Nothing here is called in a forward, which reads local tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from autotp.errors import AutoTPError
from autotp.plan import layout as layouts
from autotp.plan.boxes import is_even
from autotp.plan.expressions import Concat, Factor, Product
from autotp.plan.layout import Interval, Layout, replicated, take
from autotp.rewrite.collectives.comm import GroupComm, Watches
from autotp.rewrite.parameters.dcp import Sharded
from autotp.rewrite.parameters.numbers import Numbers
from autotp.rewrite.parameters.own_memory import own_memory
from autotp.rewrite.parameters.placements import InLayout, end_to_end, in_dtype
from autotp.rewrite.parameters.quantized_form import is_quantized, refuse_quantized

_detach = torch.ops.aten.detach.default
# DTensor's own constructor spends 3 µs in Python before it comes to this one.
new_dtensor: Callable[..., Any] = torch.Tensor._dtensor__new__
_DATA: Any = torch.Tensor.data


class LayoutDTensor(Numbers):
    """A DTensor in the order of its layout, which is in its `__dict__` (`__slots__` of a subclass would hide those of DTensor)."""

    _layout: Layout
    #: What watches this parameter's collectives while its model is served.
    guarded_by: Watches | None = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if torch.is_inference_mode_enabled() and isinstance(first, LayoutDTensor) and not first.is_inference() and _is_of_memory(func):
            # A view of a tensor from outside of inference mode is no inference tensor, and a write to one is counted.
            with torch.inference_mode(False), torch.no_grad():
                return cls.__torch_dispatch__(func, types, args, kwargs)
        if func is _detach and type(first) is LayoutDTensor:
            made = first._like(first._local_tensor, first._spec)
            if first.guarded_by is not None:
                made.guarded_by = first.guarded_by
            return made
        if isinstance(first, LayoutDTensor) and first.guarded_by is not None:
            first.guarded_by.ask()  # whether it is read or written
        if not _is_of_memory(func):
            return cls.operate(func, args, kwargs or {})
        # Autograd tells by the versions of local tensors, too, that what a backward reads was changed. Down here they are not counted.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            return cls.operate(func, args, kwargs or {})

    @property
    def data(self) -> Any:
        """The tensor without its history; assigned: a whole tensor, or one in the same layout.

        Raises:
            AutoTPError: for a tensor of another shape or layout.
        """
        made = _DATA.__get__(self)
        made._local_tensor = made._local_tensor.data  # changes of it are not counted, as those of `made` are not
        return made

    @data.setter
    def data(self, value: Tensor) -> None:
        layout = self._layout
        if not isinstance(value, DTensor):
            if tuple(value.shape) != layout.shape:
                raise AutoTPError(
                    f"data of a parameter of shape {layout.shape} takes a whole tensor, got {tuple(value.shape)}"
                    + (": write a rank's part into to_local()" if tuple(value.shape) == layout.local_shape else ", and it keeps its shape")
                )
            value = self._cut(value.detach())
        elif not isinstance(value, LayoutDTensor) or not layouts.alike(value._layout, layout):
            if tuple(value.shape) != layout.shape or not all(p.is_replicate() for p in value._spec.placements):
                raise AutoTPError(
                    f"data of a parameter with the layout {layout} takes a whole tensor or one in this layout, got a DTensor of shape "
                    f"{tuple(value.shape)} placed {value._spec.placements}"
                )
            value = self._cut(value._local_tensor)
        self._become(value)

    def _become(self, other: LayoutDTensor) -> None:
        _DATA.__set__(self, other)
        self._local_tensor, self._spec, self._layout = other._local_tensor, other._spec, other._layout

    def _cut(self, whole: Tensor) -> LayoutDTensor:
        """A plain whole tensor in this layout; a copy.

        Raises:
            AutoTPError: it is quantized.
        """
        if is_quantized(whole):
            refuse_quantized("module", f"a weight of shape {tuple(self.shape)}")
        local = self._part(whole)
        return self._like(local.clone() if local is whole else local, in_dtype(self._spec, local.dtype))

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Registers a hook as on one device; the gradient that the hook returns, whole or not, becomes one in this layout."""
        return super().register_hook(GradHook(hook, self._layout))  # type: ignore[no-untyped-call]

    @property
    def placements(self) -> tuple[Any, ...]:
        """The placements on the dims of the mesh; `InLayout` where the parts are not even slices."""
        placed = self._spec.placements
        if self._is_even:
            return placed
        return tuple(p if p.is_replicate() else InLayout.of(p.dim, self._layout) for p in placed)  # type: ignore[attr-defined]

    @property
    def _is_even(self) -> bool:
        """True where a plain DTensor of these placements would be cut as this one is."""
        return is_even(self._layout)

    @property
    def _rank(self) -> int:
        mesh = self._spec.mesh
        return mesh.get_local_rank(mesh.ndim - 1)

    @property
    def _comm(self) -> GroupComm:
        mesh = self._spec.mesh
        comm = GroupComm(mesh.get_group(mesh.ndim - 1))
        if self.guarded_by is not None:
            self.guarded_by.watch(comm)
        return comm

    @property
    def _is_whole(self) -> bool:
        """True where every rank holds all of it."""
        return self._layout.dim is None

    def _plain(self, local: Tensor | None = None) -> DTensor:
        """Returns the ordinary DTensor over the same local tensors (or others of their shape), end to end."""
        local = self._local_tensor if local is None else local
        spec, layout = self._spec, self._layout
        if layout.dim is not None and (layout.is_padded or layout.is_shared):
            spec = end_to_end(spec, local)
        return new_dtensor(DTensor, local, spec, requires_grad=False)  # type: ignore[no-any-return]

    def _placed(self, spec: Any, local: Tensor, layout: Layout) -> LayoutDTensor:
        """Returns a tensor of this kind."""
        return laid_out(spec, local, layout)

    def _like(self, local: Tensor, spec: Any) -> LayoutDTensor:
        """`local` placed and laid out as this tensor."""
        return self._placed(spec, local, self._layout)

    def _everywhere(self, whole: Tensor) -> LayoutDTensor:
        """`whole` as a tensor of this mesh that every rank holds."""
        mesh = self._spec.mesh
        meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
        spec = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta)
        return self._placed(spec, whole, replicated(whole.shape, self._layout.tp))

    def _broadcast_(self, whole: Tensor) -> Tensor:
        """Gives every rank of the mesh the first rank's `whole`, contiguous, in place; or returns another tensor with it."""
        mesh = self._spec.mesh
        for dim in range(mesh.ndim):
            whole = GroupComm(mesh.get_group(dim)).broadcast_(whole)
        return whole

    def _held_of(self, runs: Sequence[Interval]) -> Sequence[Interval]:
        """Returns what this rank holds of runs of its tp rank's part, counted in the local tensor."""
        return runs

    def _owned(self) -> Tensor:
        """The local tensor with zeros in padding and where another copy of the index is the owner."""
        layout, local = self._layout, self._local_tensor
        if not (layout.is_shared or layout.is_padded):
            return local
        dim, at = layout.dim or 0, 0
        parts: list[tuple[int, int]] = []
        for a, b in self._held_of(layout.owned(self._rank)):
            parts += [(at - a, 0), (a, b)] if a > at else [(a, b)]
            at = b
        end = local.shape[dim]
        return take(local, dim, [*parts, (at - end, 0)] if at < end or not parts else parts)

    def _whole(self) -> Tensor:
        """The plain whole tensor in the model's order and shape; the local tensor itself where every rank holds all. Collective."""
        layout, local = self._layout, self._local_tensor
        if self._is_whole:
            return local
        if local.is_meta:
            return local.new_empty(layout.shape)
        return layout.unshard(self._comm.all_gather(self._tp_part()))

    def _tp_part(self) -> Tensor:
        """Returns what this tp rank holds (shape `layout.local_shape`), whichever data-parallel ranks hold it. Collective over them."""
        return self._local_tensor

    def _held(self) -> Tensor:
        """Returns the tensor that a checkpoint is written from and read into; see `_take_back_`."""
        return self._local_tensor

    def _take_back_(self, held: Tensor) -> None:
        """Takes values back that were read into `held`, which `_held` gave."""

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's part of a plain whole tensor."""
        return self._layout.shard(whole, self._rank)

    def _laid(self, whole: Tensor) -> Tensor:
        """A gradient, plain and whole on every rank, in this layout and in memory of its own; a sparse one stays whole."""
        local = own_memory(self._part(whole).contiguous(), whole, self._is_whole)
        return local if local.layout is not torch.strided else self._like(local, in_dtype(self._spec, local.dtype))

    def _of_local(self, local: Tensor) -> Tensor:
        return self._like(local, in_dtype(self._spec, local.dtype))

    def _fill_(self, whole: Tensor) -> None:
        """Take the values of a plain whole tensor."""
        if whole is self._local_tensor and self._is_whole:
            if whole.shape != self.shape or whole.stride() != self.stride():
                self._become(self._everywhere(whole))
            return
        if tuple(whole.shape) != self._layout.shape:
            raise AutoTPError(
                f"a tensor of shape {self._layout.shape} that is laid out over ranks cannot become one of {tuple(whole.shape)}"
            )
        self._local_tensor.copy_(self._part(whole))

    def _clear_padding_(self) -> None:
        for a, b in self._held_of(self._layout.padding(self._rank)):
            self._local_tensor.narrow(self._layout.dim or 0, a, b - a).zero_()

    def _told(self) -> str:
        return f"a tensor that is not cut evenly, of layout {self._layout},"

    def __create_write_items__(self, fqn: str, object: object) -> list[Any]:
        return self._sharded().__create_write_items__(fqn, object)

    def __create_chunk_list__(self) -> list[Any]:
        return self._sharded().__create_chunk_list__()

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self._sharded().__get_tensor_shard__(index)

    def _sharded(self) -> Sharded:
        """Returns the `Sharded` that torch.distributed.checkpoint gets."""
        return Sharded(self._local_tensor, self._layout, self._rank)

    def __tensor_flatten__(self) -> Any:
        # torch.compile wants DTensor's own four values here, so the layout comes with one of them.
        inner, (placements, meta, *rest) = super().__tensor_flatten__()  # type: ignore[no-untyped-call]
        return inner, (placements, _Meta.of(meta, self._layout), *rest)

    @staticmethod
    def __tensor_unflatten__(inner_tensors: Any, flatten_spec: Any, outer_size: Any, outer_stride: Any) -> DTensor:
        made: DTensor = DTensor.__tensor_unflatten__(inner_tensors, flatten_spec, outer_size, outer_stride)  # type: ignore[no-untyped-call]
        return _rebuilt(made, flatten_spec[1].layout, flatten_spec[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A parameter is copied as on one device: its values in memory of its own, without its gradient, hooks and marks.
        if not getattr(self, "_is_param", False):
            return super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        if id(self) not in memo:
            with torch.no_grad():
                memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        ordinary = new_dtensor(DTensor, self._local_tensor, self._spec, requires_grad=False)
        return _rebuilt, (ordinary, self._layout, self.requires_grad)


def _is_of_memory(func: Any) -> bool:
    """True for an operator that gives a view or writes."""
    return func.is_view or func._schema.is_mutable  # type: ignore[no-any-return]


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


def laid_out(spec: Any, local: Tensor, layout: Layout) -> LayoutDTensor:
    """Returns the DTensor placed as `spec` over `local` (shape `layout.local_shape`), in the order of `layout`."""
    made: LayoutDTensor = new_dtensor(LayoutDTensor, local, spec, requires_grad=False)
    made._layout = layout
    return made


def same_layout(a: LayoutDTensor, b: LayoutDTensor) -> bool:
    """True for tensors whose parts go together."""
    (x, one), (y, other) = (a._layout, a._spec), (b._layout, b._spec)
    if not (x is y or x == y or layouts.alike(x, y)):
        return False
    return one is other or ((one.mesh is other.mesh or one.mesh == other.mesh) and one.placements == other.placements)


def own_gradient(spec: Any, local: Tensor, given: Tensor, layout: Layout) -> Tensor:
    """Returns the gradient `local` of a parameter, made of the gradient `given` that arrived, in memory of its own.

    Autograd keeps a gradient that nothing else refers to, and adds the next one in place. It counts the references to the DTensor,
    not to its contents, which may be the gradient of another parameter too (`u + v`), or one number for many entries (`w.sum()`).

    A sparse gradient stays a plain tensor, whole on every rank: optimizers ask whether it is sparse, which a DTensor never is.
    """
    local = own_memory(local, given, layout.dim is None)
    return laid_out(spec, local, layout) if local.layout is torch.strided else local


def layout_of(tensor: Tensor, planned: Layout | None) -> Layout:
    """Returns the layout of a parameter for which `planned` was planned (None: nothing).

    Someone may have put a whole tensor in its place.
    """
    if isinstance(tensor, LayoutDTensor):
        return tensor._layout
    whole = not isinstance(tensor, DTensor) or all(p.is_replicate() for p in tensor._spec.placements)
    if planned is None or (whole and tuple(tensor.shape) == planned.shape):
        return replicated(tuple(tensor.shape), 1)
    return planned


def in_layout(p: Any, layout: Layout | None) -> TypeGuard[LayoutDTensor]:
    """True for a parameter laid out as `layout`, or in any way where that is None.

    One that a user made of others (`Parameter(weight.detach()[rows])`) is laid out too, but whole.
    """
    if type(p) is not LayoutDTensor:
        return False
    if p._layout is layout or layout is None:
        return True
    if not layouts.alike(p._layout, layout):
        return False
    p._layout = layout  # the next look takes no time
    return True


def _rebuilt(tensor: DTensor, layout: Layout, requires_grad: bool) -> LayoutDTensor:
    made = laid_out(tensor._spec, tensor._local_tensor, layout)
    return made.requires_grad_(requires_grad)  # type: ignore[return-value]


# What `torch.load` must know to read one.
torch.serialization.add_safe_globals([_rebuilt, Layout, Factor, Product, Concat])


class GradHook:
    """A tensor hook on a parameter laid out as `layout`: it lays out the gradient that `hook` returns so too."""

    __slots__ = ("hook", "layout")

    def __init__(self, hook: Callable[[Tensor], Tensor | None], layout: Layout) -> None:
        self.hook, self.layout = hook, layout

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:  # on one device a parameter without a gradient calls no hook
            return None
        made = self.hook(grad)
        if made is None or made is grad or not isinstance(grad, LayoutDTensor):
            return made
        if isinstance(made, LayoutDTensor) and layouts.alike(made._layout, grad._layout):
            return made
        with torch.no_grad():
            return torch.empty_like(grad).copy_(made)
