"""Remembers the results of operators on fake tensors, by the form of their arguments.

torch's own cache for fake tensors stands behind the autograd and Python dispatch of each operator, and behind the decomposition of
the composite ones. A trace runs the same few hundred operators over and over, one path after another, so without `memo` most of its
time goes there. It remembers only calls whose result depends on nothing but the form of the arguments: no gradients, no autocast,
nothing written, no numbers in a tensor read. A result is then either new memory or a view of an argument's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_SPACES = ("aten", "prims")
#: It looks at the size of the storage, which is not in the form.
_STRIDED = frozenset(("as_strided", "as_strided_copy", "as_strided_scatter"))
_UNFIT = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)


class _Unfit(Exception):
    """Something in a call has no form."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A fake tensor to be made: over the memory of the tensor argument number `of`, or over new memory where that is -1."""

    of: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Given:
    """The result is the tensor argument number `number` itself."""

    number: int


_Result = _Made | _Given
#: What is known of calls, by operator and forms of the arguments. It holds no tensors, so runs on different fake tensors may share one.
Known = dict[Any, tuple[_Result, ...] | _Result | None]


class Memo:
    """Runs operators on fake tensors of one mode; used where no mode that watches operators is active."""

    def __init__(self, fake: FakeTensorMode, known: Known) -> None:
        self._fake, self._known = fake, known
        self._fit: dict[OpOverload, bool] = {}

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of `func(*args, **kwargs)`."""
        if not self._fits(func):
            return func(*args, **kwargs)
        tensors: list[FakeTensor] = []
        try:
            with torch._C.DisableTorchFunction():
                key = func, self._form(args, tensors), self._form(kwargs, tensors), torch.get_default_dtype()
                seen = key in self._known
        except _Unfit:
            return func(*args, **kwargs)
        known = self._known[key] if seen else None
        if known is not None:
            return self._again(known, tensors)
        result = func(*args, **kwargs)
        if not seen:
            with torch._C.DisableTorchFunction():
                self._known[key] = self._seen(result, tensors)
        return result

    def _fits(self, func: OpOverload) -> bool:
        if torch._C.is_grad_enabled() or torch._C._is_any_autocast_enabled() or torch._C.is_inference_mode_enabled():
            return False
        fits = self._fit.get(func)
        if fits is None:
            schema = func._schema
            space, name = schema.name.split("::")
            fits = space in _SPACES and name not in _STRIDED and not schema.is_mutable and not any(tag in _UNFIT for tag in func.tags)
            self._fit[func] = fits
        return fits

    def _form(self, item: Any, tensors: list[FakeTensor]) -> Any:
        cls = type(item)
        if cls is FakeTensor:
            return self._memory(item, tensors)
        if cls in _PLAIN:
            return cls, item
        if cls is list or cls is tuple:
            return tuple(self._form(x, tensors) for x in item)
        if cls is dict:
            return tuple((name, self._form(x, tensors)) for name, x in item.items())
        raise _Unfit

    def _memory(self, tensor: FakeTensor, tensors: list[FakeTensor]) -> Any:
        if tensor.fake_mode is not self._fake or tensor.layout is not torch.strided or tensor.constant is not None:
            raise _Unfit
        tensors.append(tensor)
        where = next(i for i, t in enumerate(tensors) if t is tensor)  # the same tensor twice may give what two alike do not
        form = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device
        return (*form, where, tensor.is_conj(), tensor.is_neg(), tensor.is_inference())

    def _seen(self, result: Any, tensors: list[FakeTensor]) -> tuple[_Result, ...] | _Result | None:
        """Says how to make `result` again; None where it is not to be remembered."""
        if isinstance(result, Tensor):
            return self._one(result, tensors)
        if type(result) not in (tuple, list) or not all(isinstance(x, Tensor) for x in result):
            return None
        found = [self._one(x, tensors) for x in result]
        storages = {x.untyped_storage()._cdata for x in result}
        apart = [x for x in found if isinstance(x, _Made) and x.of < 0]
        if None in found or (apart and len(storages) < len(result)):  # results that share memory of their own
            return None
        return tuple(x for x in found if x is not None)

    def _one(self, result: Tensor, tensors: list[FakeTensor]) -> _Result | None:
        for number, tensor in enumerate(tensors):
            if result is tensor:
                return _Given(number)
        if type(result) is not FakeTensor or result.fake_mode is not self._fake or result.constant is not None:
            return None
        if result.layout is not torch.strided or result.is_conj() or result.is_neg() or result.is_inference() or result.requires_grad:
            return None
        shared = result.untyped_storage()._cdata
        of = next((i for i, t in enumerate(tensors) if t.untyped_storage()._cdata == shared), -1)
        if of < 0 and result.storage_offset():
            return None
        device = result.fake_device
        return _Made(of, tuple(result.shape), result.stride(), int(result.storage_offset()), result.dtype, device)

    def _again(self, known: tuple[_Result, ...] | _Result, tensors: list[FakeTensor]) -> Any:
        if isinstance(known, tuple):
            return tuple(self._make(x, tensors) for x in known)
        return self._make(known, tensors)

    def _make(self, made: _Result, tensors: list[FakeTensor]) -> FakeTensor:
        if isinstance(made, _Given):
            return tensors[made.number]
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():  # past all modes: these are no operators of the model
            plain = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            if made.of >= 0:
                plain.set_(tensors[made.of].untyped_storage(), made.offset, made.shape, made.stride)
            return FakeTensor(self._fake, plain, made.device)
