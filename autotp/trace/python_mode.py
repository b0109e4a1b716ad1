"""Records calls as the code wrote them, with their place: the Python half of a recorder. It answers sizes with tagged ints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from autotp.trace.accesses import Accesses
from autotp.trace.call_sites import call_of, call_place
from autotp.trace.drawn_numbers import drawn, holds_drawn
from autotp.trace.gradients import ABOUT_GRADIENTS, Gradients
from autotp.trace.graph import Place, PythonCall
from autotp.trace.ints import Life, SizeRef, TaggedInt
from autotp.trace.module_calls import ModuleCalls
from autotp.trace.opened import opened
from autotp.trace.provenance import gather
from autotp.trace.tape import Caller, Tape
from autotp.trace.unknown_data import UnknownData
from autotp.trace.values import Values
from autotp.trace.watch import is_model

_SHAPE, _SIZE, _NUMEL = torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel  # type: ignore[attr-defined]
_BYTES = torch.Tensor.nbytes.__get__  # type: ignore[attr-defined]
_LEN, _FORMAT = torch.Tensor.__len__, torch.Tensor.__format__
_SIZES = frozenset((_SHAPE, _SIZE, _NUMEL, _BYTES, _LEN))  # each access of a getter makes a new wrapper, equal to the others
_READS = frozenset((torch.Tensor.tolist, torch.Tensor.item))
_COMPARE = frozenset((torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose))
_TESTS = frozenset((torch.Tensor.__bool__, torch.Tensor.is_nonzero, torch.is_nonzero)) | _COMPARE
_CASTS = frozenset((torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__))  # Python makes plain numbers of what they give
_NUMBERS = _READS | _TESTS | _CASTS
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_MADE = frozenset((_DATA, *(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))))
_SLOTS = ("__get__", "__set__")


class TaggedSize(tuple[int, ...]):
    """Holds a tensor's shape in tagged ints; torch.Size would make plain ints of them."""

    __slots__ = ()

    def numel(self) -> int:
        """Returns the number of elements."""
        total: int = 1
        for n in self:
            total = total * n
        return total

    def __getitem__(self, index: Any) -> Any:
        item = tuple.__getitem__(self, index)
        return TaggedSize(item) if isinstance(index, slice) else item


class PythonMode(TorchFunctionMode):
    """Records calls as the code wrote them: see the module.

    `met(func, args)` is called for each function of tensors, and each getter of a property, that code calls.
    """

    def __init__(
        self,
        tape: Tape,
        values: Values,
        accesses: Accesses,
        gradients: Gradients,
        calls: ModuleCalls,
        data: UnknownData,
        life: Life,
        met: Callable[[Any, tuple[Any, ...]], None],
    ) -> None:
        self.tape, self.values, self.accesses, self.gradients = tape, values, accesses, gradients
        self.calls, self.data, self.life, self.met = calls, data, life, met
        self.sized: set[int] = set()  # ids of values whose sizes code has read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape = self.tape
        if not tape.quiet and (func in _SIZES or getattr(func, "__name__", "") not in _SLOTS or func in _MADE):
            fakes = self.accesses.fakes
            args = fakes(args)
            kwargs = {k: fakes(v) for k, v in kwargs.items()} if kwargs else {}
        if func == _DATA:
            func = torch.Tensor.detach
        self.met(func, args)
        if func is _FORMAT and not tape.quiet and isinstance(args[0], FakeTensor) and args[0].dim() == 0:
            return format(args[0].item(), *args[1:])  # as the format of a real tensor reads it
        if func in _SIZES:
            return self._size(func, args[0], args[1:], kwargs or {})
        if (inside := opened(func)) is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        code, offset = call_place(2)
        if func == _SET_DATA and not tape.quiet and is_model(code.co_filename):
            self.accesses.replaced("`.data = …`")
        if func in ABOUT_GRADIENTS:
            return self.gradients.answer(func, code.co_filename, args, kwargs or {})
        held, apart = tape.caller, tape.apart
        frame = sys._getframe(1)
        while frame.f_code is not code and frame.f_back is not None:
            frame = frame.f_back
        if not tape.quiet and not torch._C._are_functorch_transforms_active():
            tape.apart = self.calls.check_forward(frame)
        tape.number += 1
        tape.caller = Caller(args, kwargs or {}, Place.of(code, call_of(code, offset), frame.f_lineno))
        before, number = len(tape.nodes), tape.number
        chosen = self.data.along and holds_drawn(args)
        args, kwargs = self.data.with_numbers(func, args, kwargs or {})
        try:
            result = func(*args, **kwargs)
        finally:
            tape.caller, tape.apart = held, apart
        if func in _NUMBERS and not tape.quiet:
            read = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if read and (func in _COMPARE or read[0].dtype is not torch.bool):
                return self._number(func, read, result)
        if chosen and isinstance(result, FakeTensor):  # `torch.tensor(counts)`: these numbers are no facts
            self.values.taint(result)
        if len(tape.nodes) > before:
            if isinstance(result, Tensor) and self.values.known(result) is None:
                self.values.adopt(result, tape.nodes[-1])
            found: list[int] = []
            gather((result,), [], found, self.values, self.life)
            tape.python[number] = PythonCall(getattr(func, "__name__", str(func)), tuple(found))
        return result

    def _number(self, func: Any, tensors: list[Tensor], plain: Any) -> Any:
        """Returns what code gets that reads a number from tensors, or tests them: where data may be others, conditions get both answers."""
        if isinstance(plain, (int, float)) and not isinstance(plain, bool):
            self.data.read.add(plain)
        chosen = self.data.along and any(map(self.values.is_drawn, tensors))
        if not chosen and all(self.values.real_of(t) is not None for t in tensors) and not self.data.questions.data_vary:
            return plain
        if func in _READS:
            return drawn(plain, self._answer, strict=chosen)
        place = Place.of(*call_place(3), 0)
        if func in _TESTS:
            return self.data.questions.asked_at(plain, place)
        return self.data.questions.number_at(plain, place) if plain in (0, 1) else plain

    def _answer(self, usual: bool) -> bool:
        """Answers a condition on a number that code read, where the code asks."""
        return usual if self.life.over else self.data.questions.asked_at(usual, Place.of(*call_place(3), 0))

    def _size(self, func: Any, tensor: Tensor, rest: Any, kwargs: Any) -> Any:
        plain = func(tensor, *rest, **kwargs)
        if self.values.known(tensor) is None or self.tape.quiet:
            return plain
        value = self.values.of(tensor)
        self.sized.add(value.id)
        if isinstance(plain, torch.Size):
            return TaggedSize(TaggedInt(n, SizeRef(value.id, i, n), self.life) for i, n in enumerate(plain))
        if func is _NUMEL:
            return TaggedInt(plain, SizeRef(value.id, -1, plain), self.life)
        if func == _BYTES:
            return tensor.element_size() * self._size(_NUMEL, tensor, (), {})
        dim = (rest[0] if rest else kwargs.get("dim", 0)) if func is _SIZE else 0
        return TaggedInt(plain, SizeRef(value.id, int(dim) % max(tensor.dim(), 1), plain), self.life)
