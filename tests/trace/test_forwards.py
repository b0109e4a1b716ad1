"""Forwards that are called past the call of their module: they cross the same boundary, or the model is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CoroutineType, MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.errors import TraceError
from autotp.rewrite.modules.boundaries import InputSlots
from tests.models.backward import OUTER, WIDTH, Mid
from tests.support.modes import same_in_every_mode

X = {"x": torch.randn(2, 6, OUTER, dtype=torch.float64, generator=torch.Generator().manual_seed(4))}


class Direct(Mid):
    """Both projections by their forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b.forward(F.gelu(self.a.forward(input=x)))


class Either(Mid):
    """One module called in both ways."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x))) + self.b.forward(F.gelu(self.a.forward(x)))


class Blocks(nn.Module):
    """Repeated blocks by their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mid(F.gelu) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.forward(x)
        return x


class Inner(nn.Module):
    """Calls the forward of a module that has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = Mid(F.gelu)
        self.mid.forward = MethodType(_doubled, self.mid)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mid.forward(x) + self.mid(x)


def _doubled(self: Mid, x: Tensor) -> Tensor:
    return 2 * Mid.forward(self, x)


class Super(Mid):
    """Its own class's forward is no way past."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _hooks(model: Mid) -> None:
    model.register_forward_pre_hook(
        lambda m, args, kwargs: (args, {k: v - v.mean(-1, keepdim=True) for k, v in kwargs.items()}), with_kwargs=True
    )
    model.register_forward_hook(lambda m, args, y: y.softmax(-1))
    model.a.register_forward_hook(lambda m, args, y: y - y.mean(-1, keepdim=True))
    model.b.register_forward_pre_hook(lambda m, args: (args[0].softmax(-1),))
    model.b.register_forward_hook(lambda m, args, y: y * y.mean(-1, keepdim=True))


def _hooked() -> nn.Module:
    model = Mid(F.gelu)
    _hooks(model)
    return model


def forward_of_the_root(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model.forward(**inputs)


def forward_by_position(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model.forward(*inputs.values())


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("model", [Direct, Either, Blocks, Inner, Super])
def test_the_same_boundary(model: Callable[[], nn.Module], tp: int) -> None:
    assert same_in_every_mode(model, X, tp, also=forward_of_the_root) < 0.6


@pytest.mark.parametrize("tp", [2, 3])
def test_hooks_made_before(tp: int) -> None:
    """They are traced where they run; what the root's see is whole."""
    same_in_every_mode(_hooked, X, tp, also=forward_by_position)


@pytest.mark.sweep
def test_in_processes() -> None:
    assert same_in_every_mode(Direct, X, 2, backend="gloo", also=forward_of_the_root) < 0.6


class OfType(Mid):
    def forward(self, x: Tensor) -> Tensor:
        return type(self.b).forward(self.b, F.gelu(self.a(x)))


class OfClass(Mid):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self.b, F.gelu(self.a(x)))


class OfModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid = Mid()

    def forward(self, x: Tensor) -> Tensor:
        return Mid.forward(self.mid, x)


@pytest.mark.parametrize("model", [OfType, OfClass, OfModule])
def test_forwards_of_classes_are_refused(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(TraceError, match="through a class"):
        autotp.plan(model().double(), tp=2, example_inputs=X)


class Doubles(nn.Linear):
    """Runs the forward of its base in a method that is no forward, as ProphetNet's positions do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def plain(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)


class ByAMethod(Mid):
    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.a, self.calls = Doubles(self.a.in_features, self.a.out_features), calls  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a.doubled(x) - self.a.plain(x)  # type: ignore[operator]
        return self.b(F.gelu(h + self.a(x) if self.calls else h))


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("tp", [2, 3])
def test_forwards_of_a_base_in_another_method(tp: int, calls: bool) -> None:
    same_in_every_mode(partial(ByAMethod, calls), X, tp)


# forwards whose bodies run after the call -------------------------------------------------------------------------------------------


class Yields(Mid):
    def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        for i in range(3):
            yield torch.tanh(self.a(x) * i)


class YieldsFrom(Yields):
    def rest(self, x: Tensor) -> Iterator[Tensor]:
        yield self.a(x)
        h = self.a(x) * 2
        yield F.layer_norm(h, (h.shape[-1],))

    def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        yield from self.rest(x)


class Awaited(Mid):
    async def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return torch.tanh(self.a(x)), self.a(x)


def _items(result: Any) -> Any:
    try:
        return result.send(None) if isinstance(result, CoroutineType) else result
    except StopIteration as done:
        return done.value


class Over(nn.Module):
    """Goes over what its blocks give, and runs another layer of theirs on it."""

    def __init__(self, kind: Callable[[], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for h in _items(block(x)):
                x = x + block.b(h)  # type: ignore[operator]
        return x


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("kind", [Yields, YieldsFrom, Awaited])
def test_forwards_that_yield_or_await(kind: Callable[[], nn.Module], tp: int) -> None:
    assert same_in_every_mode(partial(Over, kind), X, tp) < 0.6


class ClassThatYields(Over):
    def forward(self, x: Tensor) -> Tensor:
        return sum(self.blocks[0].b(h) for h in Yields.forward(self.blocks[0], x))  # type: ignore[operator, arg-type, return-value]


def test_a_forward_that_yields_called_through_its_class() -> None:
    with pytest.raises(TraceError, match="through a class"):
        autotp.plan(ClassThatYields(Yields).double(), tp=2, example_inputs=X)


# one tensor in several arguments --------------------------------------------------------------------------------------------------


class Score(nn.Module):
    """Sees its arguments in one sharded region; `same` says whether q and k are one tensor, as attention of torch asks."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = (nn.Parameter(torch.randn(WIDTH, OUTER) * 0.3) for _ in range(2))
        self.o = nn.Linear(WIDTH, OUTER)

    def forward(self, q: Tensor, k: Tensor, *more: Any, **others: Any) -> Tensor:
        same = 2.0 if q is k else 1.0
        y = torch.tanh(F.linear(q, self.w)) * F.linear(k, self.u) * same
        for z in (*_tensors(more), *_tensors(list(others.values()))):
            y = y + F.linear(z, self.w)
        return self.o(y)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree
    return [t for item in items for t in _tensors(item)]


CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "by position": lambda g, h, p: g(h, h),
    "by keyword": lambda g, h, p: g(q=h, k=h),
    "by forward": lambda g, h, p: g.forward(h, k=h),
    "in a list": lambda g, h, p: g(h, p, [h, p]),
    "nested": lambda g, h, p: g(h, h, {"a": [h, (p, h)]}, z=h),
    "alone among the rest": lambda g, h, p: g(h, p, h, p, z=[p]),
    "once the same, once not": lambda g, h, p: g(h, h) + g(h, p) + g(p, h),
    "first not the same": lambda g, h, p: g(h, p) + g(h, h),
    "different, then crossed": lambda g, h, p: g(h, p, h) + g(p, h, p),
}


class Twice(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.n, self.p, self.g, self.call = nn.LayerNorm(OUTER), nn.Linear(OUTER, OUTER), Score(), call

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        return x + CALLS[self.call](self.g, h, self.p(x))


class Deep(nn.Module):
    """The second block gets one tensor twice, or the first one does."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.n, self.first = nn.LayerNorm(OUTER), first
        self.blocks = nn.ModuleList(Score() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        for i, block in enumerate(self.blocks):
            h = h + (block(h, h) if (i == 0) is self.first else block(h, x * 1))
        return h


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(OUTER, OUTER), nn.Linear(OUTER, 4, bias=False), nn.Linear(4, OUTER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LoraAttention(nn.Module):
    """Four heads whose projections are LoRA layers of one tensor, in torch's own order of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.o, self.heads = nn.LayerNorm(OUTER), nn.Linear(OUTER, OUTER), 4
        self.q, self.k, self.v = Lora(), Lora(), Lora()

    def attend(self, *parts: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        return x + self.attend(self.q(h), self.k(h), self.v(h))


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("call", CALLS)
def test_one_tensor_in_several_arguments(call: str, tp: int) -> None:
    assert same_in_every_mode(partial(Twice, call), X, tp) < 0.8


@pytest.mark.parametrize("model", [partial(Deep, True), partial(Deep, False), LoraAttention])
def test_in_blocks_and_layers(model: Callable[[], nn.Module]) -> None:
    assert same_in_every_mode(model, X, 2) < 0.9


@pytest.mark.sweep
def test_in_processes_of_their_own() -> None:
    assert same_in_every_mode(partial(Twice, "once the same, once not"), X, 2, backend="gloo") < 0.8


def test_one_collective_for_one_tensor() -> None:
    """Both arguments are converted, what moves is counted once."""
    plan = autotp.plan(Twice("by position").double(), tp=2, example_inputs=X)
    (module,) = (m for m in plan.modules if m.path == "g")
    assert {s.path for s in module.inputs} == {("q",), ("k",)}
    assert [c.module for c in plan.collectives() if c.when == "backward" and c.module == "g"] == ["g"]


def test_what_was_one_tensor_stays_one() -> None:
    plan = autotp.plan(Twice("by position").double(), tp=2, example_inputs=X)
    (module,) = (m for m in plan.modules if m.path == "g")
    from autotp.rewrite.collectives.comm import DryComm

    slots = InputSlots(module.inputs, Score().forward, DryComm(2), "g")
    h, p = torch.randn(2, OUTER, requires_grad=True), torch.randn(2, OUTER, requires_grad=True)
    (q, k), _ = slots((h, h), {})
    assert q is k
    assert q is not h
    (q,), kwargs = slots((h,), {"k": p})
    assert q is not kwargs["k"]


def test_forwards_of_instances_are_copied_with_them() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from autotp.testing.ranks.run import run

    def one(job: Any) -> bool:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        model = autotp.parallelize(Direct().double(), mesh, example_inputs=X)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            before = model(**X)
            for p in model.parameters():
                getattr(p, "_local_tensor", p).zero_()
        return bool(torch.equal(twin(**X), before)) and not bool(model(**X).any())

    assert all(run("local", one, None, 2, 60.0))
