"""Gradients of values that are whole while their gradient is not: right, or refused where they are asked for."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.testing.ranks.run import run
from tests.support.families import transformer
from tests.support.ranks import mesh

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Features(nn.Module):
    """Gives what it goes on computing with: alone, in a dict, out of an inner module, or after the last use."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(16, 24), nn.Linear(24, 16), how

    def forward(self, x: Tensor) -> Any:
        h = F.gelu(self.a(x))
        if self.how == "last":
            return self.b(x.new_ones(24) + h.detach()), h
        return {"y": self.b(h), "h": h} if self.how == "dict" else (self.b(h), h)


class Around(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.head = Features("tuple"), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        y, h = self.inner(x)
        return self.head(y), h


def results(model: Any) -> tuple[Tensor, Tensor]:
    found = model(X)
    return tuple(found.values()) if isinstance(found, dict) else found


def loss(y: Tensor, h: Tensor) -> Tensor:
    return y.pow(2).sum() + h.sin().sum()


def retained(model: Any) -> Tensor | None:
    y, h = results(model)
    h.retain_grad()
    loss(y, h).backward()
    return h.grad


def hooked(model: Any) -> Tensor:
    y, h = results(model)
    h.register_hook(lambda g: g * 3)
    return first_gradient(model, loss(y, h))


def asked(model: Any) -> Tensor:
    y, h = results(model)
    return torch.autograd.grad(loss(y, h), [h, model.get_parameter(WEIGHT[type(model)])])[0]


def of_one_use(model: Any) -> Tensor:
    y, h = results(model)
    return torch.autograd.grad(y.sum(), h)[0]


def with_inputs(model: Any) -> Tensor | None:
    y, h = results(model)
    loss(y, h).backward(inputs=[h])
    return h.grad


def by_edge(model: Any) -> Tensor:
    y, h = results(model)
    return torch.autograd.grad(loss(y, h), torch.autograd.graph.get_gradient_edge(h))[0]


def by_many(model: Any) -> Tensor:
    found: list[Any] = []
    y, h = results(model)
    torch.autograd.graph.register_multi_grad_hook([h], found.append)
    loss(y, h).backward()
    return found[0][0]


ASKING = [retained, hooked, asked, of_one_use, with_inputs, by_edge, by_many]
WEIGHT = {Features: "a.weight", Around: "inner.a.weight"}


def computed(model: Any) -> Tensor:
    """What people do with features otherwise: losses of them, views, in-place, saving them."""
    y, h = results(model)
    file = io.BytesIO()
    torch.save(h.detach(), file)
    assert type(copy.deepcopy(h.detach())) is Tensor and type(h * 1) is Tensor and h.detach().numpy().shape == h.shape
    assert repr(h).startswith("tensor(") and h.grad_fn is not None
    learned = nn.Parameter(h)
    learned.pow(2).sum().backward()
    assert isinstance(learned, nn.Parameter) and torch.equal(learned.grad, 2 * h.detach())
    first = h[0].exp()
    first.retain_grad()
    return first_gradient(model, loss(y, h) + first.sum() + F.normalize(h, dim=-1).mul_(2).sum())


def first_gradient(model: Any, value: Tensor) -> Tensor:
    model.zero_grad()
    value.backward()
    grad = model.get_parameter(WEIGHT[type(model)]).grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def outcome(make: Callable[[], nn.Module], use: Callable[[Any], Tensor | None], tp: int = 2, backend: str = "local") -> str:
    torch.manual_seed(0)
    whole = make().double()
    wanted = use(copy.deepcopy(whole))

    def rank(_: object) -> str:
        model = copy.deepcopy(whole)
        try:
            autotp.parallelize(model, mesh(), example_inputs={"x": X}, check="graph")
            assert autotp.plan_of(model).local_share < 0.8
            got = use(model)
        except autotp.AutoTPError as error:
            return str(error)
        assert wanted is not None and got is not None
        return "equal" if float((wanted - got).abs().max()) < 1e-9 * float(wanted.abs().max()) else "other"

    found = run(backend, rank, None, tp, 60.0)
    assert len(set(found)) == 1, found
    return str(found[0])


@pytest.mark.parametrize("use", ASKING)
@pytest.mark.parametrize("how", ["tuple", "dict"])
def test_gradients_of_what_the_model_goes_on_with(how: str, use: Any) -> None:
    assert "a copy of what the parallel model goes on computing with" in outcome(lambda: Features(how), use)


@pytest.mark.parametrize("use", ASKING)
def test_gradients_where_the_model_goes_on_with_what_is_whole(use: Any) -> None:
    assert outcome(lambda: Around(""), use) == "equal"


@pytest.mark.parametrize("use", ASKING[:3])
def test_gradients_of_a_last_use_are_right(use: Any) -> None:
    assert outcome(lambda: Features("last"), use) == "equal"


@pytest.mark.parametrize(("kind", "how"), [(Features, "tuple"), (Features, "dict"), (Around, "")])
@pytest.mark.parametrize("tp", [2, 3])
def test_what_is_computed_from_it_is_right(kind: Any, how: str, tp: int) -> None:
    assert outcome(lambda: kind(how), computed, tp) == "equal"


@pytest.mark.sweep
def test_over_processes() -> None:
    assert outcome(lambda: Features("tuple"), computed, backend="gloo") == "equal"
    assert "a copy of what" in outcome(lambda: Features("tuple"), retained, backend="gloo")


def test_torchs_own_hooks_are_taken() -> None:
    """FSDP puts hooks on results of modules that change no gradient."""

    def use(model: Any) -> Tensor:
        y, h = results(model)
        h.register_hook(_of_torch)
        return first_gradient(model, loss(y, h))

    assert outcome(lambda: Features("tuple"), use) == "equal"


def _of_torch(grad: Tensor) -> None:
    return None


_of_torch.__module__ = "torch.distributed.fsdp"


class Parallel(nn.Module):
    """Two branches from one norm, whose gradients are summed at once: what comes out of `norm` has a summand for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.a, self.b = Branch(), Branch()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.norm(x)
        return x + self.a(h) + self.b(h)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x * 1)))


def _kept(model: Any, hook: Callable[..., Any], path: str = "norm", before: bool = False) -> list[Any]:
    kept: list[Any] = []

    def put(*given: Any) -> Any:
        return hook(kept, given[-1])

    getattr(model.get_submodule(path), "register_forward_pre_hook" if before else "register_forward_hook")(put)
    return kept


def trained(hook: Callable[..., Any], path: str = "norm", before: bool = False, more: Callable[[list[Any]], Any] = lambda kept: 0.0) -> Any:
    def use(model: Any) -> Tensor:
        kept = _kept(model, hook, path, before)
        y = model(X)
        (y.pow(2).sum() + more(kept)).backward()
        grad = model.first.weight.grad
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad

    return use


def keeps(kept: list[Any], value: Any) -> None:
    kept.append(value[0] if isinstance(value, tuple) else value)


def keeps_detached(kept: list[Any], value: Any) -> None:
    keeps(kept, value[0].detach() if isinstance(value, tuple) else value.detach())


def computes(kept: list[Any], value: Any) -> None:
    kept.append(value.pow(3).sum())


def replaces(kept: list[Any], value: Any) -> Any:
    return F.normalize(value, dim=-1)


def replaces_and_keeps(kept: list[Any], value: Any) -> Any:
    kept.append(value.pow(3).sum())
    return value * 2


def gives_back(kept: list[Any], value: Any) -> Any:
    return value


def asks(kept: list[Any], value: Any) -> None:
    value.retain_grad()


def learns(kept: list[Any], value: Any) -> Any:
    return value * torch.ones(16, dtype=torch.float64, requires_grad=True)


def _sum(kept: list[Any]) -> Any:
    return sum(k.pow(3).sum() for k in kept)


def test_the_model_is_of_this_kind() -> None:
    plan = autotp.plan(Parallel().double(), tp=2, example_inputs={"x": X}, check="graph")
    assert {"norm", "a", "b"} <= {path for path, slots in plan.boundaries.items() if any(b.shown.value == "gradient" for b in slots)}


@pytest.mark.parametrize(
    "use",
    [
        trained(keeps),
        trained(keeps_detached, more=_sum),
        trained(replaces),
        trained(gives_back),
        trained(keeps_detached, "a", True, _sum),
        trained(keeps, "", False, _sum),
    ],
)
def test_hooks_that_look_or_replace(use: Any) -> None:
    assert outcome(Parallel, use) == "equal"


@pytest.mark.parametrize(
    "use",
    [
        trained(keeps, more=_sum),
        trained(computes, more=sum),
        trained(replaces_and_keeps, more=sum),
        trained(asks),
        trained(learns),
        trained(keeps, "a", True, _sum),
        trained(keeps, "b", True, _sum),
    ],
)
def test_hooks_whose_gradients_would_be_counted_for_each_rank(use: Any) -> None:
    assert "counted once for each rank" in outcome(Parallel, use)


def test_hooks_where_linears_sum_the_gradient_themselves() -> None:
    class Direct(Parallel):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            h = self.norm(x)
            return x + self.a.down(torch.tanh(self.a.up(h))) + self.b.down(torch.tanh(self.b.up(h)))

    assert outcome(Direct, trained(keeps, more=_sum)) == "equal"
    assert outcome(Direct, trained(keeps, "a.up", True, _sum)) == "equal"


def test_attentions_of_transformers() -> None:
    ids = torch.arange(12).view(2, 6)
    whole = transformer("llama", attn_implementation="eager").double().eval()

    def use(model: Any, kind: str) -> list[Tensor]:
        found = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
        for each in found[kind]:
            each.retain_grad()
        found.logits.pow(2).sum().backward()
        return [each.grad for each in found[kind]]

    wanted = use(copy.deepcopy(whole), "hidden_states")

    def rank(_: object) -> float:
        model = autotp.parallelize(copy.deepcopy(whole), mesh(), check="graph")
        got = use(model, "hidden_states")
        with pytest.raises(autotp.AutoTPError, match="a copy of what"):
            use(model, "attentions")
        return max(float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True))

    assert max(run("local", rank, None, 2, 60.0)) < 1e-9


def test_hooks_are_copied_with_the_model() -> None:
    def use(model: Any) -> Any:
        _kept(model, keeps)
        return trained(lambda kept, value: None)(copy.deepcopy(model))

    assert outcome(Parallel, use) == "equal"


def test_hooks_beside_those_that_were_there_before() -> None:
    """The table of the earlier hook guards nothing, so a later one is refused where the call begins."""

    def rank(_: object) -> str:
        model = Parallel().double()
        model.norm.register_forward_hook(lambda *_: None)
        autotp.parallelize(model, mesh(), example_inputs={"x": X}, check="graph")
        model(X)
        model.norm.register_forward_hook(lambda *_: None)
        with pytest.raises(autotp.AutoTPError, match="beside those that were there before"):
            model(X)
        return "refused"

    torch.manual_seed(0)
    assert run("local", rank, None, 2, 60.0) == ["refused", "refused"]
