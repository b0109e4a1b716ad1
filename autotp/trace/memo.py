"""Remembers the results of operators on fake tensors, by the form of their arguments.

torch's own cache for fake tensors stands behind the autograd and Python dispatch of each operator, and behind the decomposition of
the composite ones. A trace runs the same few hundred operators over and over, one path after another, so without `memo` most of its
time goes there. It remembers only calls whose result depends on nothing but the form of the arguments: no gradients, no autocast,
nothing written, no numbers in a tensor read. A result is then either new memory or a view of an argument's.

With gradients an operator goes through autograd, which calls the operators that it is made of below. `Fakes` is the mode of fake tensors
that remembers those. There an operator may also write into its first argument (`add_`), whose form stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_SPACES = ("aten", "prims")
#: It looks at the size of the storage, which is not in the form.
_STRIDED = frozenset(("as_strided", "as_strided_copy", "as_strided_scatter"))
_DEVICE = torch.ops.prim.device.default
#: Operators that only look at memory in another way: what they give is computed where tensors have no data, without the Python code that
#: stands for them there.
_VIEWS = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        *((name, "default") for name in ("view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "expand", "alias", "detach", "t")),
        *(("transpose", "int"), ("slice", "Tensor"), ("select", "int"), ("squeeze", "dim"), ("squeeze", "dims")),
    )
)
_AROUND = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch) | torch._C.DispatchKeySet(torch._C.DispatchKey.PythonDispatcher)
_UNFIT = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)


#: What is said of a call that was never seen; None says that its result is not to be remembered.
_UNSEEN: Any = object()


class _Fit(Enum):
    """Which operators are remembered: those that READ, and, below autograd, those that WRITE into their first argument and return it."""

    NONE = "none"
    READS = "reads"
    WRITES = "writes"


def _fit(func: OpOverload) -> _Fit:
    schema = func._schema
    space, name = schema.name.split("::")
    if space not in _SPACES or name in _STRIDED or any(tag in _UNFIT for tag in func.tags):
        return _Fit.NONE
    if not schema.is_mutable:
        return _Fit.READS
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    returned = len(schema.returns) == 1 and schema.returns[0].alias_info is not None
    return _Fit.WRITES if written == [0] and returned and name.endswith("_") else _Fit.NONE


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
Known = dict[Any, tuple[_Result, ...] | list[_Result] | _Result | None]


class Memo:
    """Runs operators on fake tensors of one mode; used where no mode that watches operators is active."""

    def __init__(self, fake: FakeTensorMode, known: Known) -> None:
        self._fake, self._known = fake, known
        self._fit: dict[OpOverload, _Fit] = {}

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of `func(*args, **kwargs)`."""
        if torch._C._is_any_autocast_enabled() or torch._C.is_inference_mode_enabled():
            return func(*args, **kwargs)
        if torch._C.is_grad_enabled() or self._fits(func) is not _Fit.READS:
            return func(*args, **kwargs)
        return self._remembered(func, args, kwargs, False, func)

    def below(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """Returns the result of `run(*args, **kwargs)`, which is `func` below autograd: what it gives has no gradient of its own."""
        if torch._C.is_inference_mode_enabled() or self._fits(func) is _Fit.NONE:
            return run(*args, **kwargs)
        return self._remembered(func, args, kwargs, True, run)

    def empty(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> FakeTensor:
        """Returns a tensor over new memory of the CPU, without gradients."""
        return self._make(_Made(-1, shape, stride, 0, dtype, torch.device("cpu")), [])

    def _remembered(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], below: bool, run: Callable[..., Any]) -> Any:
        tensors: list[FakeTensor] = []
        try:
            with torch._C.DisableTorchFunction():
                key = func, below, self._form(args, tensors), self._form(kwargs, tensors), torch.get_default_dtype()
                known = self._known.get(key, _UNSEEN)
        except _Unfit:
            return run(*args, **kwargs)
        if known is not None and known is not _UNSEEN:
            return self._again(known, tensors)
        if known is _UNSEEN and func in _VIEWS and (viewed := self._viewed(func, args, kwargs, tensors)) is not None:
            self._known[key] = viewed
            return self._make(viewed, tensors)
        result = run(*args, **kwargs)
        if known is _UNSEEN:
            with torch._C.DisableTorchFunction():
                self._known[key] = self._seen(result, tensors) if self._kept(func, args, key) else None
        return result

    def _viewed(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[FakeTensor]) -> _Made | None:
        """Says how to make the view that `func` gives; None where fake tensors are to say it, and what is wrong with the call."""
        if len(tensors) != 1 or type(args[0]) is not FakeTensor:
            return None
        try:
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(_AROUND):
                view = func(*args, **kwargs)
                if view.is_conj() or view.is_neg() or view.is_inference():
                    return None
                return _Made(0, tuple(view.shape), view.stride(), int(view.storage_offset()), view.dtype, tensors[0].fake_device)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None

    def _kept(self, func: OpOverload, args: tuple[Any, ...], key: Any) -> bool:
        """Returns whether an operator that writes has left the form of what it writes into as it was."""
        return self._fits(func) is _Fit.READS or self._form(args, []) == key[2]

    def _fits(self, func: OpOverload) -> _Fit:
        fits = self._fit.get(func)
        if fits is None:
            fits = self._fit[func] = _fit(func)
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
        where = 0  # the same tensor twice may give what two alike do not
        for t in tensors:
            if t is tensor:
                break
            where += 1
        tensors.append(tensor)
        form = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device
        return (*form, where, tensor.is_conj(), tensor.is_neg(), tensor.is_inference())

    def _seen(self, result: Any, tensors: list[FakeTensor]) -> tuple[_Result, ...] | list[_Result] | _Result | None:
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
        made = (x for x in found if x is not None)
        return list(made) if type(result) is list else tuple(made)

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

    def _again(self, known: Any, tensors: list[FakeTensor]) -> Any:
        if type(known) is tuple or type(known) is list:
            return type(known)([self._make(x, tensors) for x in known])
        return self._make(known, tensors)

    def _make(self, made: _Result, tensors: list[FakeTensor]) -> FakeTensor:
        if isinstance(made, _Given):
            return tensors[made.number]
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():  # past all modes: these are no operators of the model
            plain = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            if made.of >= 0:
                plain.set_(tensors[made.of].untyped_storage(), made.offset, made.shape, made.stride)
            return FakeTensor(self._fake, plain, made.device)


class Fakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode of the fake tensors of one recorder: it remembers what operators below autograd give, too."""

    def __init__(self, known: Known) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.memo = Memo(self, known)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # plans are made without dynamo, and its wrapper costs as much as a remembered result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # half of all calls: torch asks before most operators
        return self.memo.below(func, args, kwargs or {}, partial(self._run, func, types))

    def _run(self, func: Any, types: Any, *args: Any, **kwargs: Any) -> Any:
        return self.dispatch(func, types, args, kwargs)
