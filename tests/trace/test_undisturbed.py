"""Planning leaves the model, its caller's tensors and the process as they were, and prints nothing that is not its own."""

from __future__ import annotations

import functools
import logging
import random
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp

CONSTANT = torch.arange(4)
SEEN: dict[int, Tensor] = {}
COUNT = 0


class Norms(nn.Module):
    """Batch norms in containers that are never called, with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleList([nn.ModuleList([nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8, momentum=None)]) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in self.l:  # type: ignore[attr-defined]
            x = x + norm(conv(x))
        return x


class Counted(nn.Module):
    """A block that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.steps = torch.zeros(2, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps.add_(1)
        return self.b(F.relu(self.a(x)))


class Busy(nn.Module):
    """Changes whatever can be changed while it runs."""

    made = 0
    table: dict[int, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Counted() for _ in range(3)])
        self.norm = nn.BatchNorm1d(8)
        self.steps, self.log, self.nested = torch.zeros(3, dtype=torch.long), [1], {"a": [torch.zeros(2, dtype=torch.long)]}
        self.inside = self.steps[1:]
        self.generator, self.host, self.numbers = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, ids: Tensor, fill: list[int] = [], offset: Any = CONSTANT) -> Tensor:  # noqa: B006
        global COUNT
        COUNT += 1
        Busy.made += 1
        Busy.table[COUNT] = x
        SEEN[len(SEEN)] = x
        fill.append(COUNT)
        offset += 1
        ids.clamp_(min=1)
        self.steps.add_(1)
        self.inside.mul_(2)
        self.log.append(x)  # type: ignore[arg-type]
        self.log[0] = 5
        self.nested["a"][0].add_(1)
        self.nested["a"].append(x.new_zeros(1))
        self.nested["b"] = []
        self.host.random(), self.numbers.random(), random.random(), np.random.rand()
        torch.rand(2), torch.rand(2, generator=self.generator)
        self.blocks[0].register_forward_hook(lambda *_: None)
        self.blocks[1].extra = COUNT
        self.requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        for block in self.blocks:
            x = x + block(x)
        self.kept = x
        return self.norm(x.transpose(1, 2)).transpose(1, 2) + ids.sum()


def everything(model: nn.Module, *others: Any) -> Any:
    """Every attribute, tensor, hook and container, by identity and by content."""
    seen: dict[int, Any] = {}

    def look(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.requires_grad, value.detach().flatten().tolist(), value.grad is None
        if isinstance(value, (dict, list, tuple, set)):
            items = list(value.items()) if isinstance(value, dict) else list(value)
            return None if isinstance(value, tuple) else id(value), [look(i) for i in items]
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, np.random.Generator):
            return str(value.bit_generator.state)
        if isinstance(value, nn.Module):
            if id(value) in seen:
                return id(value)
            seen[id(value)] = value
            return id(value), type(value), look(value.__dict__)
        return id(value) if hasattr(value, "__dict__") else value

    state = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    options = torch.get_default_dtype(), torch.is_grad_enabled(), warnings.filters[:], logging.root.manager.disable
    return look(model), [look(o) for o in others], state, options


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["norms", "busy"])
def test_nothing_changes(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = Norms() if kind == "norms" else Busy()
    model.train(training)
    inputs: dict[str, Any] = {"x": torch.randn(2, 8, 4) if kind == "norms" else torch.randn(2, 4, 8)}
    if kind == "busy":
        inputs["ids"] = torch.zeros(4, dtype=torch.long)
    others = (inputs, CONSTANT, SEEN, COUNT, Busy.made, Busy.table, Busy.forward.__defaults__)
    before = everything(model, *others)
    autotp.plan(model, tp=2, example_inputs=inputs)
    others = (inputs, CONSTANT, SEEN, COUNT, Busy.made, Busy.table, Busy.forward.__defaults__)
    assert everything(model, *others) == before


class Optional(nn.Module):
    """A path that fails in every way that torch logs or warns of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("this call is deprecated", UserWarning, stacklevel=1)
        logging.getLogger("some.model").error("falling back")
        if self.training:
            x = torch.mm(x.flatten(0, 1), x.flatten(0, 1)[:5])  # of sizes that do not fit
        return self.b(self.a(x).relu())


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        plan = autotp.plan(Optional(), tp=2, example_inputs={"x": torch.randn(2, 4, 8)})
    finally:
        logging.getLogger().removeHandler(handler)
    assert any("training path was not traced" in note for note in plan.notes)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


class Asks(nn.Module):
    """Fails outside of any call of a child, on what only real data could tell."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "python":
            return {}[0] + y  # type: ignore[no-any-return]
        if self.how == "data":
            y.numpy()
        if self.how == "shape":
            return y @ y
        if self.how == "dtype":
            self.a.half()
        return y


@pytest.mark.parametrize("how", ["python", "shape", "dtype"])
def test_failures_are_ours(how: str) -> None:
    with pytest.raises(autotp.AutoTPError, match="Pass example_inputs="):
        autotp.plan(Asks(how), tp=2, example_inputs={"x": torch.randn(2, 4, 8)})


class Moves(nn.Module):
    """Moves a child to its input's device in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b.to(x.device)(F.relu(self.a.to(x)(x)))


def test_a_child_may_be_moved_in_a_forward() -> None:
    from autotp.testing import assert_equivalent

    x = torch.randn(2, 4, 8, dtype=torch.float64)
    assert assert_equivalent(Moves, tp=2, inputs={"x": x}).plan.local_share < 0.6


@functools.lru_cache(maxsize=8)
def causal(n: int, width: float = 1.0) -> Tensor:
    return torch.ones(n, n).tril() * width


@functools.cache
def parts(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (*shape[:-1], heads, shape[-1] // heads)


def remembering(function: Any) -> Any:
    """As decorators of libraries do it: the cached function is known to a wrapper alone."""
    cached = functools.lru_cache(maxsize=8)(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return cached(*args)

    wrapper.cached = cached
    return wrapper


@remembering
def places(n: int) -> Tensor:
    return torch.arange(0.5, n) / n


class Cached(nn.Module):
    """Views and masks from functions that remember, keyed by sizes."""

    memo: dict[tuple[int, int], Tensor] = {}  # noqa: RUF012

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads

        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.o = nn.Linear(16, 8)

    @remembering
    def bias(self, n: int) -> Tensor:
        return torch.ones(n) * 0.5

    @staticmethod
    @remembering
    def scale(n: int) -> Tensor:
        return torch.ones(n) * 0.25

    @staticmethod
    @remembering
    def shift(n: int, heads: int) -> Tensor:
        """Its ints are plain ones in a replay: a second path would get the tensor of the first."""
        return torch.arange(0.25, n) / heads

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = x * (places(n) + self.bias(n) + self.scale(n) + self.shift(int(n), self.heads))[:, None]
        q, k, v = (f(x).view(parts(f(x).shape, self.heads)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if (n, n) not in self.memo:
            self.memo[n, n] = torch.ones(n, n).tril()
        scores = q @ k.transpose(-1, -2) * self.memo[n, n] * causal(n) * causal(4).sum()
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], n, -1))


def test_a_plan_does_not_depend_on_what_ran_before() -> None:
    x = torch.randn(2, 4, 8)
    causal.cache_clear(), parts.cache_clear(), places.cached.cache_clear()
    fresh = str(autotp.plan(Cached(), tp=2, example_inputs={"x": x}))
    assert autotp.plan(Cached(), tp=2, example_inputs={"x": x}).local_share < 0.6
    assert not Cached.memo
    assert type(causal(4)) is type(places(4)) is type(Cached.scale(4)) is Tensor and all(type(n) is int for n in parts((2, 4, 16), 4))
    other = Cached(heads=2)
    autotp.plan(other, tp=2, example_inputs={"x": torch.randn(2, 5, 8)})
    model = Cached()
    wanted = model(x)  # fills the caches with real tensors and plain ints
    assert parts.cache_info().currsize and causal.cache_info().currsize
    Cached.memo.clear()
    assert str(autotp.plan(model, tp=2, example_inputs={"x": x})) == fresh
    assert all(type(n) is int for n in parts((2, 4, 16), 4))
    assert torch.equal(model(x), wanted)
    Cached.memo.clear()


def test_einops() -> None:
    einops = pytest.importorskip("einops")
    assert einops
