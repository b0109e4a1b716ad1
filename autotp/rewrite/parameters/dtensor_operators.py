"""Operators on tensors that are laid out over ranks give what they give on one device.

    on elements   add, mul, copy_, …: on the local parts; a whole tensor among the arguments is cut first
    counting      sums and norms: on what each rank owns, an index that several ranks hold once, padding never
    lists         foreach ones that work on each element, fused optimizers: on the local parts, where the lists go together;
                  norms: DTensor's own
    any other     on the whole tensors: parts are gathered, what is written goes back into the parts, views remember what they are of

A plain tensor among the arguments is whole. Results of the last kind are whole on every rank, and random numbers are rank 0's. Nothing
here is called in a forward, which reads local tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from math import isinf
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._pytree import tree_iter, tree_map_only

from autotp.errors import AutoTPError
from autotp.plan import layout as layouts
from autotp.plan.boxes import is_even
from autotp.plan.layout import replicated
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, Numbers, laid_out, new_dtensor, plain

_aten = torch.ops.aten
_detach, _copy_ = _aten.detach.default, _aten.copy_.default
# Operators in which an entry counts as often as it is there.
_COUNTING = frozenset(
    getattr(_aten, name)
    for name in ("linalg_vector_norm", "norm", "_foreach_norm", "linalg__powsum", "_foreach_powsum", "sum")
    if hasattr(_aten, name)
)
# On elements too, though torch does not tag them so.
_ON_ELEMENTS = frozenset(
    getattr(_aten, name)
    for name in ("copy_", "fill_", "zero_", "masked_fill_", "_to_copy", "zeros_like", "ones_like", "empty_like", "full_like", "alias")
)
# Lists that DTensor reduces rightly.
_REDUCED = frozenset(
    getattr(_aten, name)
    for name in ("_foreach_norm", "_foreach_powsum", "_amp_foreach_non_finite_check_and_unscale_")
    if hasattr(_aten, name)
)
# Steps of optimizers, which work on each element.
_STEPS = frozenset(
    getattr(_aten, name) for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_") if hasattr(_aten, name)
)
# Of `_foreach_…`: on each element too, though torch does not tag them so.
_MOVES = frozenset((_aten.copy, _aten.clone, _aten.zero))
_RESHAPES = frozenset((_aten.view, _aten._unsafe_view, _aten.expand))
_ON_PARTS = (_detach, _aten.stack.default)  # of sums and norms
_COLLECTIVES = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd"))
_LISTS = ("aten::_foreach_", "aten::_fused_", "aten::_amp_")
_FOREACH = "_foreach_"


class PartView(LayoutDTensor):
    """A view of a tensor that is cut: `source`, and the operators that make the view of the whole tensor.

    What it holds is what the view was when it was made. Each operator makes it anew, and a write goes back into every rank's part.
    """

    _source: LayoutDTensor
    _steps: tuple[Callable[[Tensor], Tensor], ...]

    def _of(self, whole: Tensor) -> Tensor:
        for step in self._steps:
            whole = step(whole)
        return whole

    def _whole(self) -> Tensor:
        return self._of(self._source._whole())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if getattr(self, "_is_param", False) or not self.is_leaf:
            return super().__deepcopy__(memo)
        if id(self) not in memo:
            copied: Any = copy.deepcopy(self._source.detach(), memo)
            memo[id(self)] = _viewing(copied, self._of(copied._whole()), self._steps)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What it holds is what it was.
        return self._everywhere(self._held()).requires_grad_(self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _held(self) -> Tensor:
        return self._whole().clone()

    def _take_back_(self, held: Tensor) -> None:
        self.copy_(held)

    def __create_write_items__(self, fqn: str, object: object) -> list[Any]:
        return self._everywhere(self._whole()).__create_write_items__(fqn, object)

    def __create_chunk_list__(self) -> list[Any]:
        raise AutoTPError(
            "torch.distributed.checkpoint does not read into a view of a tensor that is cut over ranks: use autotp.checkpoint.load, or "
            "give the parameter memory of its own (nn.Parameter(weight.detach().t().clone()))"
        )

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self._everywhere(self._whole()).__get_tensor_shard__(index)

    def to_local(self, **options: Any) -> Tensor:
        raise AutoTPError(
            "a view of a tensor that is cut over ranks has no part on this rank: read it with full_tensor(), write it as it is"
        )


def dispatch(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`func(*args, **kwargs)`, some of whose arguments are laid out over ranks."""
    if func is _detach and type(args[0]) is not PartView:
        return args[0]._like(args[0]._local_tensor, args[0]._spec)
    if func.namespace in _COLLECTIVES:
        raise AutoTPError(
            f"{func} on a tensor that is laid out over tensor-parallel ranks: give it to_local(), this rank's part, over a group that does "
            "not hold other parts of it"
        )
    if func is _copy_:
        _known_order(args[0], args[1])
    packet, tags = func.overloadpacket, func.tags
    random = torch.Tag.nondeterministic_seeded in tags
    if (torch.Tag.pointwise in tags and not random) or packet in _ON_ELEMENTS:
        if (result := _on_elements(func, args, kwargs)) is not NotImplemented:
            return result
    elif packet in _RESHAPES and isinstance(x := args[0], LayoutDTensor) and type(x) is not PartView and tuple(args[1]) == tuple(x.shape):
        return x._like(x._local_tensor, x._spec)
    counts = packet in _COUNTING
    if func._schema.name.startswith(_LISTS) and _in_step(args):
        if (packet in _STEPS or _is_on_each(packet)) and (result := _on_each(func, args, kwargs)) is not NotImplemented:
            return result
        if packet in _REDUCED and not (counts and _order(func, args, kwargs) < 0):
            return _on_lists(func, args, kwargs, counts)
    if counts and _counts(func, args, kwargs):
        args, kwargs = _with_dims(func, args, kwargs)
        return _summed(func(_owned(args[0]), *args[1:], **kwargs))
    return _on_whole(func, args, kwargs, random)


# on elements ------------------------------------------------------------------------------------------------------------------


def _on_elements(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """On the local tensors; NotImplemented where they are not parts alike."""
    like: LayoutDTensor | None = None
    for a in args:
        if isinstance(a, LayoutDTensor):
            if type(a) is PartView:
                return NotImplemented
            if like is None or (like._layout.dim is None and a._layout.dim is not None):
                like = a
    if like is None or any(isinstance(v, Tensor) for v in kwargs.values()):
        return NotImplemented
    in_place = func._schema.name.endswith("_")
    if in_place and not (isinstance(args[0], LayoutDTensor) and _same_layout(args[0], like)):
        return NotImplemented
    local = [_local(a, like) if isinstance(a, Tensor) else a for a in args]
    if any(x is None and a is not None for x, a in zip(local, args, strict=True)):
        return NotImplemented
    result = func(*local, **kwargs)
    if in_place:
        if like._layout.is_padded:
            like._clear_padding_() if args[0] is like else args[0]._clear_padding_()
        return args[0]
    if not isinstance(result, Tensor) or result.shape != like._local_tensor.shape:
        return like._everywhere(result) if like._layout.dim is None and isinstance(result, Tensor) else NotImplemented
    made = like._like(result, _in_dtype(like._spec, result.dtype))
    if like._layout.is_padded:  # it is not what it was made from: cos of it is 1, and a gradient would move the parameter's
        made._clear_padding_()
    return made


def _in_dtype(spec: Any, dtype: torch.dtype) -> Any:
    meta = spec.tensor_meta
    if dtype == meta.dtype:
        return spec
    return DTensorSpec(spec.mesh, spec.placements, tensor_meta=TensorMeta(meta.shape, meta.stride, dtype))


def _local(x: Tensor, like: LayoutDTensor) -> Tensor | None:
    """What goes with the local tensor of `like`; None where it must be whole."""
    layout = like._layout
    if isinstance(x, LayoutDTensor):
        if x is like or _same_layout(x, like):
            return x._local_tensor
        if x._layout.dim is not None:
            return None
        x = x._local_tensor
    elif isinstance(x, DTensor):
        spec = x._spec
        if all(p.is_replicate() for p in spec.placements):
            x = x._local_tensor
        elif spec.placements == like._spec.placements and x.shape == like.shape and spec.mesh == like._spec.mesh:
            return x._local_tensor  # a gradient that compiled code made
        else:
            x = x.full_tensor()
    if x.ndim == 0 or layout.dim is None:
        return x
    return like._part(x) if tuple(x.shape) == layout.shape else None


def _same_layout(a: LayoutDTensor, b: LayoutDTensor) -> bool:
    x, y = a._layout, b._layout
    return (x is y or x == y or layouts.alike(x, y)) and (a._spec.mesh is b._spec.mesh or a._spec.mesh == b._spec.mesh)


def _known_order(into: Any, source: Any) -> None:
    """Raise where it cannot be told which elements `source` holds."""
    if not isinstance(into, LayoutDTensor) or isinstance(source, LayoutDTensor):
        return
    layout = into._layout
    if isinstance(source, DTensor):
        if not is_even(layout) and not all(p.is_replicate() for p in source._spec.placements):
            raise AutoTPError(
                f"a tensor in the order of the layout {layout} is not filled from a DTensor that says nothing of its order: load whole "
                "tensors, a parallel model's own state_dict, or what autotp.checkpoint.save wrote"
            )
    elif tuple(source.shape) not in ((), layout.shape) and tuple(source.shape) == layout.local_shape:
        raise AutoTPError(
            f"a tensor of shape {layout.shape} that is laid out over ranks is filled from whole tensors, got {tuple(source.shape)}, the "
            "shape of a rank's part: write a part into to_local() of the parameter"
        )


# sums and norms ---------------------------------------------------------------------------------------------------------------


def _owned(x: LayoutDTensor) -> DTensor:
    return plain(x, x._owned())


class Summed(Numbers):
    """A sum or a norm, which every rank may hold its part of until someone needs the number: then it is reduced.

    Several are stacked as parts (a norm of norms costs one collective); any other operator is given the reduced ones. DTensor's own
    operators are not asked: on parts of a norm some are wrong, and others raise.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, dict(kwargs or {}))
        if func in _ON_PARTS and _are_parts_alike(args[0]):
            return _summed(func(*tree_map_only(Summed, _ordinary, args), **given[1]))
        known: dict[int, tuple[Summed, LayoutDTensor]] = {}

        def reduced(x: Summed) -> LayoutDTensor:
            if id(x) not in known:
                known[id(x)] = x, x._reduced()
            return known[id(x)][1]

        if func is _aten._local_scalar_dense.default or not all(isinstance(t, DTensor) for t in tree_iter(given) if isinstance(t, Tensor)):
            args, kwargs = tree_map_only(DTensor, lambda t: (reduced(t) if isinstance(t, Summed) else t).full_tensor(), given)
            return func(*args, **kwargs)
        result = dispatch(func, *tree_map_only(Summed, reduced, given))
        own = {id(laid): x for x, laid in known.values()}
        return tree_map_only(LayoutDTensor, lambda t: own.get(id(t), t), result)

    def _reduced(self) -> LayoutDTensor:
        """The number itself, on every rank; it is reduced once."""
        mesh = self._spec.mesh
        if not all(p.is_replicate() for p in self._spec.placements):
            whole = _ordinary(self).full_tensor()
            meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
            self._local_tensor, self._spec = whole, DTensorSpec(mesh, (Replicate(),), tensor_meta=meta)
        return laid_out(self._spec, self._local_tensor, replicated(self._local_tensor.shape, mesh.size()))


def _are_parts_alike(given: Any) -> bool:
    xs = given if isinstance(given, list | tuple) else [given]
    placements = [x._spec.placements if isinstance(x, Summed) else None for x in xs]
    return placements[0] is not None and all(p.is_partial() for p in placements[0]) and all(p == placements[0] for p in placements)


def _ordinary(x: DTensor) -> DTensor:
    return new_dtensor(DTensor, x._local_tensor, x._spec, requires_grad=False)  # type: ignore[no-any-return]


def _summed(result: Any) -> Any:
    return tree_map_only(
        DTensor, lambda x: new_dtensor(Summed, x._local_tensor, x._spec, requires_grad=False) if type(x) is DTensor else x, result
    )


def _counts(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True where zeros instead of copies and padding do not change the result, and no dim in a layout's order is left in it."""
    if not isinstance(args[0], LayoutDTensor) or type(args[0]) is PartView or any(isinstance(v, Tensor) for v in kwargs.values()):
        return False
    layout = args[0]._layout
    given = _named(func, args, kwargs)
    order, dims = _order(func, args, kwargs), given.get("dim")
    if order < 0 or (isinf(order) and not layout.shape):
        return False
    if is_even(layout) or not dims:
        return True
    dims = [dims] if isinstance(dims, int) else dims
    return layout.dim in [d % args[0].ndim for d in dims] and not given.get("keepdim")


def _named(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)


def _order(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The order of a norm; below 0, zeros count as the least entries do."""
    given = _named(func, args, kwargs)
    order = given.get("ord", given.get("p"))
    return 2.0 if order is None else float(order)


def _with_dims(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with all dims named where no dim is: torch reduces all then, DTensor none."""
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


# lists ------------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _is_on_each(packet: Any) -> bool:
    """True for `_foreach_…` of an operator that works on each element alone."""
    name = packet.__name__
    base = getattr(_aten, name.removeprefix(_FOREACH).rstrip("_"), None) if name.startswith(_FOREACH) else None
    return base is not None and (base in _MOVES or any(torch.Tag.pointwise in getattr(base, o).tags for o in base.overloads()))


def _lists(args: tuple[Any, ...]) -> list[Any]:
    """The lists of tensors among `args`, without those that hold one number for each position, unless there are no others."""
    lists = [a for a in args if isinstance(a, list | tuple) and any(isinstance(t, Tensor) for t in a)]
    return [a for a in lists if any(t.ndim for t in a)] or lists


def _in_step(args: tuple[Any, ...]) -> bool:
    """True for lists whose tensors at one position are placed alike, as an optimizer's are."""
    if any(type(t) is PartView for t in tree_iter(args)) or any(isinstance(a, LayoutDTensor) and a._layout.dim is not None for a in args):
        return False
    lists = _lists(args)
    if any(len(a) != len(lists[0]) for a in lists):
        return False
    for at in zip(*lists, strict=True):
        first = at[0]
        for t in at:
            if not isinstance(t, DTensor):
                return False
            if isinstance(t, LayoutDTensor) and isinstance(first, LayoutDTensor) and not _same_layout(t, first):
                return False
            if t._spec.placements != first._spec.placements or t.shape != first.shape:
                return False
    return bool(lists)


def _on_lists(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], counts: bool) -> Any:
    """DTensor's own, of what each rank owns where an entry counts as often as it is there."""
    change = _owned if counts else plain
    result = func(*tree_map_only(LayoutDTensor, change, args), **tree_map_only(LayoutDTensor, change, dict(kwargs)))
    return _summed(result) if counts else result


def _on_each(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """On the local tensors of lists that are in step; NotImplemented where the results are no parts (a maximum)."""
    local, options = tree_map_only(DTensor, _held, args), tree_map_only(DTensor, _held, dict(kwargs))
    result = _step_of(func, local, options) if func.overloadpacket in _STEPS else func(*local, **options)
    for t in _written(func, args, kwargs):
        if isinstance(t, LayoutDTensor) and t._layout.is_padded:
            t._clear_padding_()
    if not isinstance(result, list | tuple):
        return result
    likes = _lists(args)[0]
    if any(r.shape != like._local_tensor.shape for r, like in zip(result, likes, strict=True)):
        return NotImplemented
    return type(result)(map(_relaid, result, likes))


def _held(x: DTensor) -> Tensor:
    """What this rank holds of a tensor in a list, or of a number that goes with one."""
    return x.full_tensor() if any(p.is_partial() for p in x._spec.placements) else x._local_tensor


def _relaid(result: Tensor, like: DTensor) -> DTensor:
    spec = _in_dtype(like._spec, result.dtype)
    if not isinstance(like, LayoutDTensor):
        return new_dtensor(DTensor, result, spec, requires_grad=False)  # type: ignore[no-any-return]
    made = like._like(result, spec)
    if like._layout.is_padded:
        made._clear_padding_()
    return made


def _step_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A fused step on plain tensors.

    Its kernels go through the memory of a parameter, its gradient and its moments together, whatever their strides. On one device
    autograd and the optimizer make the latter in the strides of the parameter; here they may be made in others.
    """
    again: list[tuple[Tensor, Tensor]] = []

    def like(t: Tensor, p: Tensor) -> Tensor:
        if t.shape != p.shape or t.stride() == p.stride():
            return t
        form = torch.empty_like(p, dtype=t.dtype)
        if t.stride() == form.stride():
            return t
        again.append((t, form.copy_(t)))
        return form

    params = args[0]
    result = func(
        params, *([like(t, p) for t, p in zip(a, params, strict=False)] if isinstance(a, list | tuple) else a for a in args[1:]), **kwargs
    )
    for t, form in again:
        t.copy_(form)
    return result


# any other --------------------------------------------------------------------------------------------------------------------


class _Wholes:
    """The whole tensors of one call's arguments, each made once."""

    def __init__(self) -> None:
        self._sources: dict[Any, tuple[LayoutDTensor, Tensor]] = {}  # by what they hold: two may be one, as views are of one memory
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # id of a whole tensor → it and the argument that it stands for
        self._known: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return x
        if id(x) not in self._known:
            whole = (
                x._of(self._source(x._source))
                if isinstance(x, PartView)
                else self._source(x)
                if isinstance(x, LayoutDTensor)
                else x.full_tensor()
            )
            self._known[id(x)] = whole
            self.made[id(whole)] = whole, x
        return self._known[id(x)]

    def _source(self, x: LayoutDTensor) -> Tensor:
        key = _memory(x)
        if key not in self._sources:
            self._sources[key] = x, x._whole()
        return self._sources[key][1]

    def write_back(self, x: Tensor) -> None:
        """The values of `x`, which was changed in place, go into the parts."""
        if isinstance(x, LayoutDTensor):
            source = x._source if isinstance(x, PartView) else x
            source._fill_(self._source(source))
        elif isinstance(x, DTensor):
            raise AutoTPError(
                "a DTensor that autotp did not make is not written from tensors that are laid out over ranks: use full_tensor()"
            )


def _memory(x: LayoutDTensor) -> Any:
    """Equal for tensors that are one: a detached one is another object over the same part."""
    local = x._local_tensor
    return local.untyped_storage()._cdata, local.storage_offset(), tuple(local.shape), local.stride(), local.dtype


def _on_whole(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], random: bool) -> Any:
    """On whole tensors, on every rank alike."""
    written = list(_written(func, args, kwargs))
    one = next(t for t in tree_iter((args, dict(kwargs))) if isinstance(t, LayoutDTensor))
    wholes = _Wholes()
    new_args, new_kwargs = tree_map_only(Tensor, wholes, args), tree_map_only(Tensor, wholes, dict(kwargs))
    with torch.no_grad():
        result = (_step_of if func.overloadpacket in _STEPS else _call)(func, new_args, new_kwargs)
        if random:
            for t in (*map(wholes, written), *(tree_iter(result) if not written else ())):
                _same_everywhere(t, one)
    for t in written:
        wholes.write_back(t)

    def placed(at: int, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:  # a sparse one is whole, and plain as gradients are
            return x
        if id(x) in wholes.made:
            return wholes.made[id(x)][1]
        if any(x is t for t in tree_iter(args)):
            return x  # a plain tensor that was written
        if func.is_view and isinstance(args[0], LayoutDTensor) and (isinstance(args[0], PartView) or args[0]._layout.dim is not None):
            return _view(args[0], x, partial(_step, func, args[1:], dict(kwargs), at))
        return one._everywhere(x)

    if isinstance(result, list | tuple):
        return type(result)(placed(i, x) for i, x in enumerate(result))
    return placed(-1, result)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            yield from (t for t in tree_iter(given) if isinstance(t, Tensor))


def _view(of: LayoutDTensor, now: Tensor, step: Callable[[Tensor], Tensor]) -> PartView:
    if isinstance(of, PartView):
        return _viewing(of._source, now, (*of._steps, step))
    return _viewing(of, now, (step,))


def _viewing(source: LayoutDTensor, now: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...]) -> PartView:
    """The view of `source` that `steps` make; `now`: what it holds."""
    whole = source._everywhere(now)
    made: PartView = new_dtensor(PartView, now, whole._spec, requires_grad=False)
    made._layout, made._source, made._steps = whole._layout, source, steps
    return made


def _step(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: int, x: Tensor) -> Tensor:
    result = func(x, *args, **kwargs)
    return result if at < 0 else result[at]  # type: ignore[no-any-return]


def _same_everywhere(x: Any, one: LayoutDTensor) -> None:
    """Rank 0's random numbers."""
    if isinstance(x, Tensor) and not x.is_meta and x.numel():
        sent = one._comm.broadcast_(x.contiguous())
        if sent is not x:
            x.copy_(sent)
