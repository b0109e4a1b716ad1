"""A remembered result of an operator is what the operator gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autotp.trace import memo as memory
from autotp.trace.memo import Fakes, Known, Memo

ATEN = torch.ops.aten
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FAKE:
        return torch.empty(shape, dtype=dtype)


def flipped() -> Tensor:
    with FAKE:
        return torch.empty(6, 4).t()


def inside() -> Tensor:
    with FAKE:
        return torch.empty(5, 6)[1:]


def described(result: Any, tensors: list[Tensor]) -> list[Any]:
    """All that tells fake tensors apart, and which arguments they are or share memory with."""
    found: list[Any] = []
    for x in [result] if isinstance(result, Tensor) else list(result):
        assert isinstance(x, FakeTensor)
        form = x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.requires_grad, x.is_conj(), x.untyped_storage().nbytes()
        shared = [x.untyped_storage()._cdata == t.untyped_storage()._cdata for t in tensors]
        found.append((*form, [x is t for t in tensors], shared, x.fake_mode is FAKE, x.constant is None))
    return found


Made = tuple[Any, tuple[Any, ...], dict[str, Any]]


def one(func: Any, make: Callable[[], Tensor], *rest: Any, **kwargs: Any) -> Callable[[], Made]:
    """A call of `func` on a fresh tensor and `rest`."""
    return lambda: (func, (make(), *rest), kwargs)


def twice(make: Callable[[], Tensor]) -> Made:
    x = make()
    return ATEN.add.Tensor, (x, x), {}


CALLS: dict[str, Callable[[], Made]] = {
    "new": one(ATEN.silu.default, lambda: fake(4, 6)),
    "composite": lambda: (ATEN.linear.default, (fake(2, 4), fake(3, 4), fake(3)), {}),
    "of other strides": one(ATEN.silu.default, flipped),
    "a view": one(ATEN.view.default, lambda: fake(4, 6), [2, 12]),
    "a view of a part": one(ATEN.view.default, inside, [2, 12]),
    "an alias": one(ATEN.alias.default, lambda: fake(4, 6)),
    "views": one(ATEN.split.Tensor, lambda: fake(4, 6), 4, 1),
    "the argument": one(ATEN.dropout.default, lambda: fake(4, 6), 0.5, False),
    "the argument as it lies": one(ATEN.contiguous.default, lambda: fake(4, 6)),
    "a copy of what lies otherwise": one(ATEN.contiguous.default, flipped),
    "several": one(ATEN.topk.default, lambda: fake(4, 6), 2),
    "the same twice": lambda: twice(lambda: fake(4, 6)),
    "with names": one(ATEN.sum.dim_IntList, lambda: fake(4, 6), [1], True, dtype=torch.float64),
    "a list": lambda: (ATEN.cat.default, ([fake(4, 6), fake(1, 6)],), {}),
    "of sizes": lambda: (ATEN.zeros.default, ([3, 2],), {"dtype": torch.int64, "device": torch.device("cpu"), "pin_memory": False}),
    "a half as strided": one(ATEN.as_strided.default, lambda: fake(4, 6), [2, 2], [1, 1]),
}


@pytest.fixture
def modes() -> Iterator[None]:
    with torch.no_grad(), FAKE:
        yield


@pytest.mark.parametrize("name", CALLS)
def test_as_the_operator_gives(modes: None, name: str) -> None:
    known: Known = {}
    runs = []
    for _ in range(3):  # the first is seen, the others are made again; each with a memo of its own, as the traces of one plan
        func, args, kwargs = CALLS[name]()
        tensors = [x for a in args for x in (a if isinstance(a, list) else [a]) if isinstance(x, Tensor)]
        made = described(Memo(FAKE, known).run(func, args, kwargs), tensors)
        assert made == described(func(*args, **kwargs), tensors)
        runs.append(made)
    assert runs[0] == runs[1] == runs[2]
    assert len(known) == (0 if name == "a half as strided" else 1)


@pytest.mark.usefixtures("modes")
def test_forms_are_told_apart() -> None:
    """Each pair of calls has one name and another result."""
    x = fake(4, 6)
    same, alike = fake(4, 6), fake(4, 6)
    pairs: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = [
        (ATEN.silu.default, (fake(4, 6),), (flipped(),)),
        (ATEN.view.default, (fake(4, 6), [24]), (inside(), [24])),
        (ATEN.mul.Scalar, (fake(4, dtype=torch.int64), 2), (fake(4, dtype=torch.int64), 2.0)),
        (ATEN.sum.dim_IntList, (x, [1], True), (x, [1], False)),
        (ATEN.sum.dim_IntList, (x, [1]), (x, [0])),
        (ATEN.dropout.default, (x, 0.5, False), (x, 0.5, True)),
        (ATEN.copysign.Tensor, (same, same), (same, alike)),
        (ATEN.silu.default, (fake(4, 6),), (fake(4, 6, dtype=torch.float64),)),
    ]
    memo = Memo(FAKE, {})
    for func, first, second in pairs:
        for args in (first, second, first, second):
            tensors = [a for a in args if isinstance(a, Tensor)]
            assert described(memo.run(func, args, {}), tensors) == described(func(*args), tensors), func


@pytest.mark.usefixtures("modes")
def test_a_form_that_says_too_little_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without the strides, what lies otherwise is taken for the same."""
    whole = Memo._memory
    monkeypatch.setattr(Memo, "_memory", lambda self, tensor, tensors: (*whole(self, tensor, tensors)[:1], *whole(self, tensor, [])[2:]))
    memo = Memo(FAKE, {})
    memo.run(ATEN.silu.default, (fake(4, 6),), {})
    x = flipped()
    assert described(memo.run(ATEN.silu.default, (x,), {}), [x]) != described(ATEN.silu.default(x), [x])


def test_what_is_not_remembered() -> None:
    known: Known = {}
    memo = Memo(FAKE, known)
    x, real = fake(4, 6), torch.ones(3)
    with FAKE:
        x = x.requires_grad_()
        assert memo.run(ATEN.silu.default, (x,), {}).grad_fn is not None  # with gradients
        with torch.no_grad():
            with torch.autocast("cpu"):
                assert memo.run(ATEN.mm.default, (x, x.t()), {}).dtype is torch.bfloat16
            y = x.detach()
            before = y._version
            assert memo.run(ATEN.add_.Tensor, (y, 1), {}) is y and y._version == before + 1  # what is written
            with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
                memo.run(ATEN.nonzero.default, (y,), {})
            memo.run(ATEN.silu.default, (real,), {})  # of a real tensor
            memo.run(ATEN.neg.default, (torch.tensor(3),), {})  # of one whose number is known
            with torch.inference_mode():
                memo.run(ATEN.silu.default, (y,), {})
    assert not known


def test_the_default_dtype_is_in_the_form() -> None:
    memo = Memo(FAKE, {})
    x = fake(4, dtype=torch.int64)
    was = torch.get_default_dtype()
    try:
        with torch.no_grad(), FAKE:
            for dtype in (torch.float32, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)
                assert memo.run(ATEN.mul.Scalar, (x, 2.0), {}).dtype is dtype
    finally:
        torch.set_default_dtype(was)


BELOW: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda x: x.sin(),
    "a view": lambda x: x.view(2, 12),
    "views": lambda x: x.unbind(),
    "composite": lambda x: x @ x.t(),
    "several": lambda x: x.topk(2),
    "written": lambda x: x.clone().mul_(2),
    "written in a view": lambda x: x.clone()[1:].add_(1),
    "made": lambda x: torch.zeros(3, requires_grad=True) + 1,
}


@pytest.mark.parametrize("name", BELOW)
def test_as_autograd_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, operators are remembered below autograd; the results and their gradients have the forms that torch gives them."""

    def form(x: Any) -> Any:
        return [(t.shape, t.stride(), t.dtype, t.requires_grad, type(t.grad_fn).__name__, t._is_view(), t._version) for t in x]

    def run(mode: FakeTensorMode) -> Any:
        with mode:
            x = torch.empty(4, 6).requires_grad_()
            result = BELOW[name](x)
            results = [result] if isinstance(result, Tensor) else list(result)
            total = sum(t.sum() for t in results if t.is_floating_point())
            assert isinstance(total, Tensor)
            total.backward()  # type: ignore[no-untyped-call]
            return form(results), None if x.grad is None else form([x.grad])

    known: Known = {}
    runs = [run(Fakes(known)) for _ in range(2)]
    count = len(known)
    monkeypatch.setattr(FakeTensorMode, "dispatch", _refused)
    runs.append(run(Fakes(known)))
    monkeypatch.undo()
    assert runs[0] == runs[1] == runs[2] == run(FakeTensorMode(allow_non_fake_inputs=True)) and len(known) == count > 0


def _refused(mode: FakeTensorMode, func: Any, *_: Any) -> Any:
    raise AssertionError(f"{func} was not remembered")


def test_what_changes_its_form_is_not_remembered() -> None:
    known: Known = {}
    with torch.no_grad(), Fakes(known):
        for _ in range(2):
            x = torch.empty(1, 4)
            assert x.squeeze_(0).shape == (4,)
            assert x.resize_(9).shape == (9,)
    assert not any("squeeze_" in str(key[0]) or "resize_" in str(key[0]) for key, made in known.items() if made is not None)


VIEWS: dict[str, Callable[[], Made]] = {
    "view": one(ATEN.view.default, lambda: fake(4, 6), [2, 2, -1]),
    "view of a part": one(ATEN.view.default, inside, [4, 2, 3]),
    "view of none": one(ATEN.view.default, lambda: fake(0, 6), [3, 0]),
    "view as another dtype is none of them": one(ATEN.view.dtype, lambda: fake(4, 6), torch.int32),
    "unsqueezed": one(ATEN.unsqueeze.default, flipped, -2),
    "squeezed": one(ATEN.squeeze.dims, lambda: fake(1, 4, 1), [0, 2]),
    "transposed": one(ATEN.transpose.int, inside, 0, 1),
    "permuted": one(ATEN.permute.default, lambda: fake(2, 1, 4), [2, 0, 1]),
    "expanded": one(ATEN.expand.default, lambda: fake(1, 4), [3, 2, -1]),
    "sliced": one(ATEN.slice.Tensor, flipped, 1, 1, 9, 2),
    "selected": one(ATEN.select.int, inside, 0, -1),
    "turned over": one(ATEN.t.default, lambda: fake(4)),
    "not viewed": one(ATEN.view.default, flipped, [24]),
    "out of range": one(ATEN.select.int, inside, 0, 9),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_what_fake_tensors_say(name: str) -> None:
    func, args, kwargs = VIEWS[name]()
    said: Any = None
    try:
        with FAKE:
            said = described(func(*args, **kwargs), [args[0]])
    except (RuntimeError, ValueError, IndexError) as error:
        said = error
    memo = Memo(FAKE, {})
    if isinstance(said, Exception):
        with pytest.raises(type(said), match=re.escape(str(said))), FAKE, torch.no_grad():
            memo.run(func, args, kwargs)
        return
    with FAKE, torch.no_grad():
        assert described(memo.run(func, args, kwargs), [args[0]]) == said
        assert described(memo.run(func, args, kwargs), [args[0]]) == said  # and remembered


def test_the_operators_that_are_views_are_those_that_torch_has() -> None:
    """Asking a packet past its cache would put another object in the place of each."""
    assert all(getattr(getattr(ATEN, view._schema.name.split("::")[1]), view._overloadname) is view for view in memory._VIEWS)
    assert ATEN.detach.default in memory._VIEWS
