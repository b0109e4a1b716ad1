"""Parameters that are views of other parameters: one memory on one device, whatever steps, copies or pickles them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from autotp.testing.ranks.run import run
from tests.rewrite.parameters.test_made_of import IDS, Net
from tests.support.ranks import Pool, mesh
from tests.support.slow import in_turns


def _put(path: str, value: Callable[[Any], Tensor]) -> Callable[[Any], None]:
    owner, _, name = path.rpartition(".")
    return lambda m: setattr(m.get_submodule(owner), name, nn.Parameter(value(m)))


def _two(m: Any) -> None:
    _put("down.weight", lambda m: m.up.weight.detach().t())(m)
    _put("head.weight", lambda m: m.emb.weight.detach()[:])(m)
    _put("up.bias", lambda m: m.scale.detach().flip(0).view(-1))(m)


#: The last two share nothing: were sharing lost in the others, they would be as these are.
VIEWS: dict[str, Callable[[Any], None]] = {
    "transposed": _put("down.weight", lambda m: m.up.weight.detach().t()),
    "all rows": _put("head.weight", lambda m: m.emb.weight.detach()[:]),
    "reshaped": _put("down.weight", lambda m: m.up.weight.detach().view(24, 48)),
    "of a vector": _put("up.bias", lambda m: m.scale.detach()[:]),
    "some": _put("norm.bias", lambda m: m.up.weight.detach()[7]),
    "detached": _put("head.weight", lambda m: m.emb.weight.detach()),
    "several": _two,
    "of a view": _put("down.weight", lambda m: m.up.weight.detach().t()[:].view(24, 48)),
    "a copy": _put("down.weight", lambda m: m.up.weight.detach().t().clone()),
    "rows by number": _put("head.weight", lambda m: m.emb.weight.detach()[torch.arange(40)]),
}
STEPS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True, fused=True),
    "Adagrad fused": lambda params: torch.optim.Adagrad(params, lr=0.01, fused=True),
}


def whole(t: Any) -> Tensor:
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()  # type: ignore[no-any-return]


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = Net().double()
    model = copy.deepcopy(plain)
    autotp.parallelize(model, mesh(), example_inputs={"ids": IDS}, check="graph")
    assert autotp.plan_of(model).local_share < 0.6
    return plain, model


def stepped(model: Any, make: Callable[[Any], torch.optim.Optimizer], frozen: str) -> dict[str, Tensor]:
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen.split())
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(IDS).sin().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
        optimizer.step()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses)} | {n: whole(p) for n, p in model.named_parameters()}


def worst(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    assert wanted.keys() == got.keys()
    return max(float((got[n] - w).abs().max() / (w.abs().max() + 1e-12)) for n, w in wanted.items())


def trained(name: str) -> dict[str, float]:
    errors = {}
    made = pair()
    for step, make in STEPS.items():
        for frozen in ("", "up.weight emb.weight scale")[: 2 if step.startswith("AdamW") else 1]:
            plain, model = copy.deepcopy(made)
            VIEWS[name](plain)
            VIEWS[name](model)
            errors[f"{step} {frozen}"] = worst(stepped(plain, make, frozen), stepped(model, make, frozen))
    return errors


@pytest.mark.parametrize(("name", "world"), in_turns(VIEWS, (2, 3)))
def test_trained_with_what_they_are_views_of(pool: Pool, name: str, world: int) -> None:
    for errors in pool.run(trained, name, world=world):
        assert all(error < 1e-9 for error in errors.values()), errors


def sharing_shows() -> float:
    plain, other = pair()[0], pair()[0]
    VIEWS["transposed"](plain)
    VIEWS["a copy"](other)
    make = STEPS["AdamW fused"]
    return worst(stepped(plain, make, ""), stepped(other, make, ""))


def test_sharing_shows(pool: Pool) -> None:
    """The control: were the memory not shared, these tests would see it."""
    assert all(error > 1e-4 for error in pool.run(sharing_shows))


def copied(name: str) -> dict[str, float]:
    """Copies share nothing with the original or among each other, and have no gradients, as on one device."""
    plain, model = pair()
    found = []
    for m in (plain, model):
        VIEWS[name](m)
        m.up.weight.mark = "marked"
        m(IDS).sin().sum().backward()
        with torch.no_grad():
            m.up.weight.mul_(1.25)
            m.emb.weight.mul_(0.75)
            m.scale.mul_(0.5)
        made = copy.deepcopy(m)
        kept = {n: whole(p) for n, p in made.named_parameters()}
        assert all((p.grad is None and p.requires_grad and type(p.detach()) is not Tensor) or m is plain for p in made.parameters())
        assert not hasattr(made.up.weight, "mark") and m.up.weight.grad is not None
        after = stepped(made, STEPS["SGD foreach"], "")
        rest = {f"original {n}": whole(p) for n, p in m.named_parameters()}
        found.append(kept | {f"after {n}": t for n, t in after.items()} | rest)
    with torch.no_grad():
        model.up.weight.zero_()
        plain.up.weight.zero_()
    buffer = io.BytesIO()
    torch.save(list(model.parameters()), buffer)  # what a view holds now, not what it held when it was made
    buffer.seek(0)
    read = torch.load(buffer)
    found[0] |= {f"read {n}": whole(p) for n, p in plain.named_parameters()}
    found[1] |= {f"read {n}": whole(p) for (n, _), p in zip(model.named_parameters(), read, strict=True)}
    views = [copy.deepcopy([m.up.weight.detach(), m.up.weight.detach()[2:5]]) for m in (plain, model)]
    for at, (w, part) in enumerate(views):
        part.add_(1)  # the copy of a view is a view of the copy
        found[at] |= {"copy": whole(w), "copied view": whole(part)}
    return {n: worst({n: w}, {n: found[1][n]}) for n, w in found[0].items()}


@pytest.mark.parametrize("name", VIEWS)
def test_copied_and_pickled(pool: Pool, name: str) -> None:
    for errors in pool.run(copied, name):
        assert all(error < 1e-9 for error in errors.values()), errors


def test_memory_that_is_shared_with_other_processes() -> None:

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)) + self.c(x))

    torch.manual_seed(0)
    whole, x = Tied().double(), torch.randn(2, 16, dtype=torch.float64)
    wanted = whole(x)

    def rank(_: object) -> float:
        model = autotp.parallelize(copy.deepcopy(whole), mesh(), example_inputs={"x": x}, check="graph")
        assert model.a.weight is model.c.weight
        model.share_memory()
        assert all(p.is_shared() for p in model.parameters())
        return float((model(x) - wanted).detach().abs().max())

    assert max(run("local", rank, None, 2, 60.0)) < 1e-9
