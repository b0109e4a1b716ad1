"""Runs one operator on fake tensors, and chooses a result where it depends on data.

If all tensor arguments are known small tensors, the operator is computed for real as well, and data-dependent results are the true
ones. Where they are unknown, a choice is made. A mask selects `CHOSEN` rows (`nonzero` the first and the last), an unknown number
is 0, an unknown condition is False (`all` is True). Where the last row is out of bounds for the tensor that it indexes (data never
selects it), the path is traced again with the first row alone. Where code divides by an unknown number or takes its logarithm, the
path is traced again with 1. Choices are deterministic, so a second run makes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from autotp.trace.draw import drawn_result
from autotp.trace.lengths import BY_LENGTH, like, repeated
from autotp.trace.memo import Memo
from autotp.trace.questions import Questions
from autotp.trace.tape import Tape
from autotp.trace.values import SMALL, Values, small

CHOSEN = 2
#: Function → where among its arguments the data are.
_OF_LISTS = {torch.tensor: 0, torch.as_tensor: 0, Tensor.new_tensor: 1}
_CREATE = {"arange", "empty", "zeros", "ones", "full", "eye", "scalar_tensor", "linspace", "tril_indices", "triu_indices"}


class Unfolded(Exception):
    """An operator reads a number out of a tensor argument (`narrow` from there): the operators that it is made of say which one."""


def gives_tensors(func: Any) -> bool:
    """True for an operator among whose results are tensors; the others give numbers, which leave the graph."""
    return any("Tensor" in str(r.type) for r in func._schema.returns)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors among the arguments of an ATen call, which come alone or in lists."""
    for item in tree:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors_in(item)


def _grouped_mm(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[-1]))


#: Operators whose fake form refuses dtypes that the real one accepts.
_SHAPES: dict[str, Any] = {"aten::_grouped_mm": _grouped_mm}


def _fakes(args: Any, real: Any) -> Any:
    """Fake tensors of the form of the real results."""
    return tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=_device(args)), real)


def _device(args: Any) -> torch.device:
    return next((a.device for a in tree_flatten(args)[0] if isinstance(a, Tensor)), torch.device("cpu"))


class UnknownData:
    """Runs the operators of one recorder, and makes its choices.

    ends: an unknown mask selects its last row too. number: the number that stands for an unknown one. guessed: code has read one in
    this call. chose: a shape was chosen in it. along: integers that operators make of unknown floats are drawn (`autotp.trace.draw`),
    and computed with as if they were known. drawn: the real result of the last operator is made of such numbers. read: the numbers and
    sizes that code had from data.
    """

    def __init__(self, fake: FakeTensorMode, memo: Memo, tape: Tape, values: Values, questions: Questions) -> None:
        self.ends = True
        self.number = 0
        self.guessed = self.chose = False
        self.along = self.drawn = False
        self.read: set[float] = set()
        self._fake_mode, self._memo, self._tape, self._values, self.questions = fake, memo, tape, values, questions

    # running ------------------------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Returns the fake result of a call and, where it is known, the real one.

        Raises:
            Unfolded: the parts of the operator can be run, the operator cannot.
        """
        self.drawn = False
        known, real = self._real(func, args, kwargs)
        if func._schema.is_mutable and not all(isinstance(t, FakeTensor) for t in tensors_in((*args, *kwargs.values()))):
            args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        shape = _SHAPES.get(func._schema.name)
        if shape is not None:
            return shape(*args), None
        sized = BY_LENGTH.get(func._schema.name)
        if sized is not None:
            return (_fakes(args, real), real) if known else sized(self._values, *args, **kwargs)
        try:
            result = self._memo.run(func, args, kwargs)
            if self.along and not known:
                with unset_fake_temporarily():
                    real = drawn_result(func, args, result)
                self.drawn = real is not None
            return result, real
        except DataDependentOutputException:
            if gives_tensors(func):
                raise Unfolded from None
            if not known:
                return self._unknown_number(args[0]), None
            if not isinstance(real, bool):
                self.read.add(real)
            if (self.questions.data_vary or self.drawn) and isinstance(real, bool):
                return self.questions.condition(real, self._tape.last()), None
            return real, None
        except DynamicOutputShapeException:
            if known:
                self.read.update(n for t in tensors_in(real if isinstance(real, (tuple, list)) else (real,)) for n in t.shape[:1])
                return _fakes(args, real), real
            return self._chosen_shape(func, args, kwargs), self._chosen_rows(func, args[0])

    def _fake(self, tensor: Tensor) -> Tensor:
        """Returns the fake that stands for a real tensor: without one, an operator that writes does so for real."""
        return tensor if isinstance(tensor, FakeTensor) else self._fake_mode.from_tensor(tensor, static_shapes=True)

    def _real(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Tells whether the result is known, and returns the real result where it is."""
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        name = func._schema.name.rsplit("::", 1)[-1]
        if name in ("expand_as", "view_as", "reshape_as") and len(tensors) == 2:  # the second gives its shape alone
            first = self._values.real_of(tensors[0])
            if first is not None and tensors[1].numel() <= SMALL:
                with unset_fake_temporarily():
                    shape = tuple(tensors[1].shape)
                    return True, first.expand(shape) if name == "expand_as" else first.reshape(shape)
            return False, None
        reals = [self._values.real_of(t) for t in tensors]
        self.drawn = self.along and any(self._values.is_drawn(t) for t in tensors)
        usable = all(r is not None for r in reals) and torch.Tag.nondeterministic_seeded not in func.tags
        if not tensors:
            usable = usable and name in _CREATE
        if not usable:
            self._forget_written(func, args, kwargs)
            return False, None
        if self.drawn:
            for target in self._written(func, args, kwargs):
                self._values.taint(target)
        flat, spec = tree_flatten((args, kwargs))
        pending = iter(reals)
        exact = [next(pending) if isinstance(x, Tensor) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
        new_args, new_kwargs = tree_unflatten(exact, spec)
        try:
            with unset_fake_temporarily(), torch.no_grad():
                result = func(*new_args, **new_kwargs)
        except (RuntimeError, TypeError, IndexError, NotImplementedError):
            self._forget_written(func, args, kwargs)
            return False, None
        if any(isinstance(t, Tensor) and not small(t) for t in tree_flatten(result)[0]):
            return False, None
        if name == "empty":  # of sizes that code fills in: which numbers it has is not for code to ask, but each trace has the same ones
            return not result.is_floating_point(), None if result.is_floating_point() else result.zero_()
        return True, result

    def _forget_written(self, func: Any, args: Any, kwargs: Any) -> None:
        """Forgets the numbers of the tensors that `func` writes into."""
        for target in self._written(func, args, kwargs):
            self._values.forget(target)

    def _written(self, func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
        for i, argument in enumerate(func._schema.arguments):
            target = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info and argument.alias_info.is_write and isinstance(target, Tensor):
                yield target

    # numbers ------------------------------------------------------------------------------------------------------------------

    def with_numbers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call that makes a tensor of a nest of lists, with numbers in these: a fake tensor has no data
        to read.
        """
        at = _OF_LISTS.get(func)
        if at is None:
            return args, kwargs
        if len(args) > at and isinstance(args[at], (list, tuple)):
            args = (*args[:at], self._numbers(args[at]), *args[at + 1 :])
        elif isinstance(kwargs.get("data"), (list, tuple)):
            kwargs = {**kwargs, "data": self._numbers(kwargs["data"])}
        return args, kwargs

    def _numbers(self, items: Any) -> Any:
        """Returns a nest of lists with numbers in the place of scalar tensors."""
        if isinstance(items, (list, tuple)):
            return [self._numbers(item) for item in items]
        if not isinstance(items, FakeTensor):
            return items
        known = self._values.real_of(items)
        if known is not None:
            self.read.update(known.flatten().tolist())
            return known.tolist()
        return self._unknown_number(items) if items.dim() == 0 else [0] * items.numel()

    def _unknown_number(self, tensor: Any) -> Any:
        made = self._values.of(tensor) if isinstance(tensor, Tensor) else None
        node = next((n for n in reversed(self._tape.nodes[-32:]) if made in n.outputs), None)
        dtype = tensor.dtype if isinstance(tensor, Tensor) else torch.bool
        if dtype is not torch.bool:
            self.guessed = True
            self.read.add(self.number)
            return float(self.number) if dtype.is_floating_point else self.number
        well = node is not None and node.opname in ("all", "_is_all_true")  # checks ask whether all is well
        return self.questions.condition(well, node)

    # shapes -------------------------------------------------------------------------------------------------------------------

    def _chosen_rows(self, func: Any, mask: Any) -> Tensor | None:
        """Returns the rows chosen for an unknown `nonzero`: the first index and the last, so that code that tells them apart shows
        both sides.
        """
        if func._schema.name != "aten::nonzero" or 0 in mask.shape:
            return None
        with unset_fake_temporarily():
            return torch.tensor([[0] * mask.dim(), [n - 1 if self.ends else 0 for n in mask.shape]])

    def _chosen_shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.chose = True
        self.read.add(CHOSEN)
        name = func._schema.name.rsplit("::", 1)[-1]
        source = args[0]
        if name == "nonzero":
            return source.new_empty((CHOSEN, source.dim()), dtype=torch.long)
        if name == "where":
            return tuple(source.new_empty((CHOSEN,), dtype=torch.long) for _ in range(max(source.dim(), 1)))
        if name == "nonzero_numpy":
            return [source.new_empty((CHOSEN,), dtype=torch.long) for _ in range(max(source.dim(), 1))]
        if name == "masked_select":
            return like(source, (self._selected(args[1], tuple(source.shape)),))
        if name == "repeat_interleave":
            return repeated(self._values, *args, **kwargs)
        if name in ("index", "_unsafe_index"):
            indices: list[Any] = []
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    count = self._selected(index)
                    indices += [index.new_empty((count,), dtype=torch.long) for _ in range(index.dim())]
                else:
                    indices.append(index)
            return func(source, indices)
        raise RuntimeError(f"the shape of {name}'s result depends on data that is not known without running the model")

    def _selected(self, mask: Tensor, shape: tuple[int, ...] | None = None) -> int:
        """Counts the elements that a mask selects, of a tensor of this shape where it is broadcast: the true number where it is known."""
        known = self._values.real_of(mask)
        if known is None:
            return CHOSEN
        with unset_fake_temporarily():
            return int((known if shape is None else known.logical_and(known.new_ones(shape))).count_nonzero())
