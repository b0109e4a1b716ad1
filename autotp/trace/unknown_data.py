"""Running one operator on fake tensors, and what to do where its result depends on data.

If all tensor arguments are known small tensors the operator is computed for real as well, and data-dependent results are the
true ones. Where they are unknown, a choice is made: a mask selects `CHOSEN` rows (`nonzero` the first and the last), an unknown
number is 0, an unknown condition is False (`all` is True). Where the last row is out of bounds for what it indexes (data never
selects it), the path is traced again with the first row alone; where code divides by an unknown number or takes its logarithm, with 1.
Choices are deterministic, so a second run makes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from autotp.trace.lengths import BY_LENGTH, like, repeated
from autotp.trace.storage import storage_of

if TYPE_CHECKING:
    from autotp.trace.graph import Node
    from autotp.trace.recorder import Recorder

CHOSEN = 2
SMALL = 65536
#: Function → where among its arguments the data are.
_OF_LISTS = {torch.tensor: 0, torch.as_tensor: 0, Tensor.new_tensor: 1}
_CREATE = {"arange", "zeros", "ones", "full", "eye", "scalar_tensor", "linspace", "tril_indices", "triu_indices"}


class Untraceable(Exception):
    """A module's forward failed on fake tensors; carries where."""

    def __init__(self, module: str, cls: str, node: Node | None, error: BaseException) -> None:
        super().__init__(str(error))
        self.module, self.cls, self.node, self.error = module, cls, node, error


class Unfolded(Exception):
    """An operator reads a number out of a tensor argument (`narrow` from there): the operators that it is made of say which one."""


def small(tensor: Tensor) -> bool:
    """True for tensors that are kept as real numbers beside their fake."""
    return tensor.numel() <= SMALL and not isinstance(tensor, FakeTensor)


class Copies:
    """Copies of real tensors that operators may write into: those of the model and of its caller are not touched.

    Tensors that share memory still do so in their copies.
    """

    def __init__(self) -> None:
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the CPU."""
        with unset_fake_temporarily(), torch.no_grad():
            tensor = tensor.detach()
            plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
            if not plain or tensor.is_conj() or tensor.is_neg() or tensor.untyped_storage().nbytes() > 16 * SMALL:
                return tensor.cpu().clone()
            key = tensor.untyped_storage()._cdata
            if key not in self._storages:
                self._storages[key] = tensor, tensor.new_empty(0, dtype=torch.uint8).set_(tensor.untyped_storage().clone())  # type: ignore[no-untyped-call]
            _, copied = self._storages[key]
            return tensor.new_empty(0).set_(copied.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def run(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The fake result of a call and, where it is known, the real one."""
    known, real = _real(recorder, func, args, kwargs)
    if func._schema.is_mutable:
        args, kwargs = tree_map_only(Tensor, partial(_fake, recorder), (args, kwargs))
    shape = _SHAPES.get(func._schema.name)
    if shape is not None:
        return shape(*args), None
    sized = BY_LENGTH.get(func._schema.name)
    if sized is not None:
        return (_fakes(args, real), real) if known else sized(recorder, *args, **kwargs)
    try:
        return recorder.memo.run(func, args, kwargs), real
    except DataDependentOutputException:
        if gives_tensors(func):
            raise Unfolded from None
        if not known:
            return _unknown_number(recorder, args[0]), None
        if recorder.data_vary and isinstance(real, bool):
            return recorder.condition(real, recorder.nodes[-1] if recorder.nodes else None), None
        return real, None
    except DynamicOutputShapeException:
        if known:
            return _fakes(args, real), real
        return _chosen_shape(recorder, func, args, kwargs), _chosen_rows(recorder, func, args[0])


def gives_tensors(func: Any) -> bool:
    """True for an operator among whose results are tensors; the others give numbers, which leave the graph."""
    return any("Tensor" in str(r.type) for r in func._schema.returns)


def _fakes(args: Any, real: Any) -> Any:
    """Fake tensors of the form of the real results."""
    return tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=_device(args)), real)


def _fake(recorder: Recorder, tensor: Tensor) -> Tensor:
    """The fake that stands for a real tensor: without one, an operator that writes does so for real."""
    return tensor if isinstance(tensor, FakeTensor) else recorder.fake.from_tensor(tensor, static_shapes=True)


def _grouped_mm(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[-1]))


#: Operators whose fake form refuses dtypes that the real one accepts.
_SHAPES: dict[str, Any] = {"aten::_grouped_mm": _grouped_mm}


def _device(args: Any) -> torch.device:
    return next((a.device for a in tree_flatten(args)[0] if isinstance(a, Tensor)), torch.device("cpu"))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an ATen call, which come alone or in lists."""
    for item in tree:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors_in(item)


def _real(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
    tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
    name = func._schema.name.rsplit("::", 1)[-1]
    if name in ("expand_as", "view_as", "reshape_as") and len(tensors) == 2:  # the second gives its shape alone
        first = recorder.concrete.get(recorder.value(tensors[0]).id)
        if first is not None and tensors[1].numel() <= SMALL:
            with unset_fake_temporarily():
                shape = tuple(tensors[1].shape)
                return True, first.expand(shape) if name == "expand_as" else first.reshape(shape)
        return False, None
    reals = [recorder.concrete.get(recorder.value(t).id) for t in tensors]
    usable = all(r is not None for r in reals) and torch.Tag.nondeterministic_seeded not in func.tags
    if not tensors:
        usable = usable and name in _CREATE
    if not usable:
        _forget_written(recorder, func, args)
        return False, None
    flat, spec = tree_flatten((args, kwargs))
    pending = iter(reals)
    exact = [next(pending) if isinstance(x, Tensor) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
    new_args, new_kwargs = tree_unflatten(exact, spec)
    try:
        with unset_fake_temporarily(), torch.no_grad():
            result = func(*new_args, **new_kwargs)
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        _forget_written(recorder, func, args)
        return False, None
    if any(isinstance(t, Tensor) and not small(t) for t in tree_flatten(result)[0]):
        return False, None
    return True, result


def _forget_written(recorder: Recorder, func: Any, args: Any) -> None:
    """A known tensor is overwritten with unknown data: it and its aliases are no longer known."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write and i < len(args) and isinstance(args[i], Tensor):
            gone = recorder.concrete.pop(recorder.value(args[i]).id, None)
            if gone is not None:
                storage = storage_of(gone)
                for key in [k for k, t in recorder.concrete.items() if storage_of(t) == storage]:
                    del recorder.concrete[key]


def _unknown_number(recorder: Recorder, tensor: Any) -> Any:
    made = recorder.value(tensor) if isinstance(tensor, Tensor) else None
    node = next((n for n in reversed(recorder.nodes[-32:]) if made in n.outputs), None)
    dtype = tensor.dtype if isinstance(tensor, Tensor) else torch.bool
    if dtype is not torch.bool:
        recorder.guessed = True
        return float(recorder.unknown) if dtype.is_floating_point else recorder.unknown
    well = node is not None and node.opname == "all"  # checks ask whether all is well
    return recorder.condition(well, node)


def with_numbers(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that makes a tensor of a nest of lists, with numbers in these: see `numbers`."""
    at = _OF_LISTS.get(func)
    if at is None:
        return args, kwargs
    if len(args) > at and isinstance(args[at], (list, tuple)):
        args = (*args[:at], numbers(recorder, args[at]), *args[at + 1 :])
    elif isinstance(kwargs.get("data"), (list, tuple)):
        kwargs = {**kwargs, "data": numbers(recorder, kwargs["data"])}
    return args, kwargs


def numbers(recorder: Recorder, items: Any) -> Any:
    """A nest of lists for `torch.tensor`, with numbers in the place of scalar tensors: a fake one has no data to read."""
    if isinstance(items, (list, tuple)):
        return [numbers(recorder, item) for item in items]
    if not isinstance(items, FakeTensor):
        return items
    known = recorder.concrete.get(recorder.value(items).id)
    if known is not None:
        return known.tolist()
    return _unknown_number(recorder, items) if items.dim() == 0 else [0] * items.numel()


def _chosen_rows(recorder: Recorder, func: Any, mask: Any) -> Tensor | None:
    """The rows chosen for an unknown `nonzero`: the first index and the last, so that code that tells them apart shows both sides."""
    if func._schema.name != "aten::nonzero" or 0 in mask.shape:
        return None
    with unset_fake_temporarily():
        return torch.tensor([[0] * mask.dim(), [n - 1 if recorder.ends else 0 for n in mask.shape]])


def _count(recorder: Recorder, mask: Tensor, shape: tuple[int, ...] | None = None) -> int:
    """How many elements a mask selects, of a tensor of this shape where it is broadcast: the true number where it is known."""
    known = recorder.concrete.get(recorder.value(mask).id)
    if known is None:
        return CHOSEN
    with unset_fake_temporarily():
        return int((known if shape is None else known.logical_and(known.new_ones(shape))).count_nonzero())


def _chosen_shape(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.rsplit("::", 1)[-1]
    source = args[0]
    if name == "nonzero":
        return source.new_empty((CHOSEN, source.dim()), dtype=torch.long)
    if name == "where":
        return tuple(source.new_empty((CHOSEN,), dtype=torch.long) for _ in range(max(source.dim(), 1)))
    if name == "nonzero_numpy":
        return [source.new_empty((CHOSEN,), dtype=torch.long) for _ in range(max(source.dim(), 1))]
    if name == "masked_select":
        return like(source, (_count(recorder, args[1], tuple(source.shape)),))
    if name == "repeat_interleave":
        return repeated(recorder, *args, **kwargs)
    if name in ("index", "_unsafe_index"):
        indices: list[Any] = []
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                count = _count(recorder, index)
                indices += [index.new_empty((count,), dtype=torch.long) for _ in range(index.dim())]
            else:
                indices.append(index)
        return func(source, indices)
    raise RuntimeError(f"the shape of {name}'s result depends on data that is not known without running the model")
