"""Runs code on fake tensors and measures it: the work of each operator, and the bytes that are alive at each moment.

`Meter` is a dispatch mode that is entered inside of a `FakeTensorMode`. Small tensors that no weight went into (ids, positions, masks)
are real, so that the code branches on them as it does for the user; everything else has a shape and no numbers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autotp.advise.operators import Work, flops, moved, tensors
from autotp.rewrite.in_parts.tensor import InParts
from autotp.trace.memo import Memo

#: Bytes up to which a tensor without weights in it is real.
REAL = 64 * 2**20
_OUTSIDE = -1


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """[rows, k] × [groups, k, n], [m, k] × [k, n] cut into groups along k, [groups, m, k] × [k, columns]."""
    shape = {
        (2, 3): (a.shape[0], b.shape[-1]),
        (2, 2): (offsets.shape[0], a.shape[0], b.shape[-1]),
        (3, 2): (a.shape[1], b.shape[-1]),
        (3, 3): (a.shape[0], a.shape[1], b.shape[-1]),
    }
    return a.new_empty(shape[a.dim(), b.dim()])


#: Operators whose fake form refuses dtypes and widths that the real one accepts.
_SHAPES: dict[Any, Callable[..., Tensor]] = {torch.ops.aten._grouped_mm: _grouped_mm}


class Meter(TorchDispatchMode):
    """Counts what runs inside.

    work: calls alike, counted. Storages are known by a number of their own, in the order in which they are made.
    """

    def __init__(self, memo: Memo, outside: Iterable[Tensor] = ()) -> None:
        """`memo`: runs operators on fake tensors. `outside`: tensors that stay, and are not measured: the weights."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._memo = memo
        self.work: Counter[Work] = Counter()
        self._changes: list[tuple[int, int]] = []  # (storage, bytes) as storages come (+) and go (-)
        self._number: dict[int, int] = {t.untyped_storage()._cdata: _OUTSIDE for t in outside}
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(issubclass(t, DTensor | InParts) for t in types):
            return NotImplemented  # its own dispatch calls operators on the rank's parts, and those come here
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **kwargs)
        out = self._run(func, args, kwargs)
        dtype = next((t.dtype for t in (*tensors(args), *tensors(out))), torch.float32)
        self.work[Work(flops(func, args, kwargs, out), moved(func, args, kwargs, out), dtype)] += 1
        for tensor in tensors(out):
            self.watch(tensor)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._overloadpacket in _SHAPES:
            return _SHAPES[func._overloadpacket](*args)
        if any(isinstance(t, FakeTensor) for t in (*tensors(args), *tensors(tuple(kwargs.values())))):
            with torch.no_grad():  # autograd is above; here it would only keep results from being remembered
                return self._memo.run(func, args, kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = None
        if sum(t.numel() * t.element_size() for t in tensors(out)) > REAL:
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def watch(self, tensor: Tensor) -> None:
        """Follows the storage of `tensor` from now on, unless it is followed already."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._number:
            return
        number = self._number[key] = self._made
        self._made += 1
        self._changes.append((number, nbytes))
        weakref.finalize(storage, self._gone, key, number, nbytes).atexit = False

    def _gone(self, key: int, number: int, nbytes: int) -> None:
        if self._number.get(key) == number:
            del self._number[key]
        self._changes.append((number, -nbytes))

    def number(self, tensor: Tensor) -> int | None:
        """Returns the number of a tensor's storage; None for one that was not made inside."""
        return self._number.get(tensor.untyped_storage()._cdata)

    def take_work(self) -> Counter[Work]:
        """Returns the work since the last call."""
        done, self.work = self.work, Counter()
        return done

    def mark(self) -> int:
        """Returns a point in time, for `peak`."""
        return len(self._changes)

    def alive(self, without: Iterable[Tensor] = ()) -> int:
        """Bytes of storages made inside that are alive now."""
        return self.peak(self.mark(), without)

    def peak(self, since: int = 0, without: Iterable[Tensor] = ()) -> int:
        """The most bytes that were alive at a time since `since`, but for the storages of `without`."""
        left_out = {self.number(t) for t in without}
        now = most = 0
        for at, (number, change) in enumerate(self._changes):
            if at == since:
                most = now
            now += 0 if number in left_out else change
            most = max(most, now)
        return now if since >= len(self._changes) else most
