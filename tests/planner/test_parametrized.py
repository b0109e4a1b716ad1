"""Weights that are computed in each forward: weight norms, and parametrizations of a model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import autotp
from autotp.api import parallelize_as
from autotp.axes.operators.table import OPERATORS, Padded
from autotp.plan.kinds import Kind, kinds
from autotp.testing import Equivalence, NotEquivalent, assert_equivalent
from autotp.testing.ranks.run import run
from tests.axes.test_rules import no_contracts
from tests.support.pooled import PLAIN, equivalent
from tests.support.ranks import Pool, mesh
from tests.support.rules import give_rule
from tests.support.slow import in_turns

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")

WIDTH, HIDDEN = 8, 24
X = torch.randn(2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "convolution": lambda i, o: nn.Conv1d(i, o, 3, padding=1),
    "transposed": lambda i, o: nn.ConvTranspose1d(i, o, 3, padding=1),
}
Normed = Callable[[nn.Module], nn.Module]


class Squashed(nn.Module):
    """Each element by itself."""

    def forward(self, w: Tensor) -> Tensor:
        return torch.tanh(w) * w


class Centred(nn.Module):
    """Each row by itself, in training otherwise than in evaluation."""

    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean(1, keepdim=True) if self.training else w / (1 + w.norm(dim=1, keepdim=True))


def by(rule: type[nn.Module]) -> Normed:
    def put(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", rule())
        return layer

    return put


def plain(layer: nn.Module) -> nn.Module:
    return layer


class Mlp(nn.Module):
    """Two layers, with weights computed by `up` and `down`."""

    def __init__(self, up: Normed, down: Normed, layer: str = "linear", hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up, self.down = up(LAYERS[layer](WIDTH, hidden)), down(LAYERS[layer](hidden, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def normed(dim: int | None = 0) -> Normed:
    return lambda layer: parametrizations.weight_norm(layer, dim=dim)


old: Normed = nn.utils.weight_norm
V, G, W = (f"parametrizations.weight.original{n}" for n in ("1", "0", ""))
#: What computes the weights, and which of their parts are sharded besides `up.bias`.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "weight norms": (lambda: Mlp(normed(), normed()), (f"up.{V}", f"up.{G}", f"down.{V}")),
    "weight norms of convolutions": (lambda: Mlp(normed(), normed(), "convolution"), (f"up.{V}", f"up.{G}", f"down.{V}")),
    "of transposed convolutions": (lambda: Mlp(normed(), normed(), "transposed"), (f"up.{V}", f"down.{V}", f"down.{G}")),
    "of columns": (lambda: Mlp(normed(1), normed(1)), (f"up.{V}", f"down.{V}", f"down.{G}")),
    "of columns of convolutions": (lambda: Mlp(normed(1), normed(1), "convolution"), (f"up.{V}", f"down.{V}", f"down.{G}")),
    "one norm of all": (lambda: Mlp(normed(None), normed(None)), (f"up.{V}", f"down.{V}")),
    "hooks, rows": (lambda: Mlp(old, plain), ("up.weight_v", "up.weight_g", "down.weight")),
    "hooks, columns": (lambda: Mlp(plain, old, "convolution"), ("up.weight", "down.weight_v")),
    "elementwise": (lambda: Mlp(by(Squashed), by(Squashed)), (f"up.{W}", f"down.{W}")),
    "rows": (lambda: Mlp(by(Centred), plain), (f"up.{W}", "down.weight")),
    "rows and columns": (lambda: Mlp(by(Centred), by(Centred)), (f"up.{W}", f"down.{W}")),
}  # fmt: skip


def compared(factory: Callable[[], nn.Module], tp: int, **options: Any) -> Equivalence:
    return assert_equivalent(factory, tp=tp, inputs={"x": X}, steps=1, **{"certificate": "graph", **options})


@pytest.mark.parametrize(("name", "tp"), in_turns(CASES, (2, 3)))
def test_computed_weights_are_sharded(name: str, tp: int) -> None:
    factory, sharded = CASES[name]
    found = compared(factory, tp)
    assert found.sharded == {*sharded, "up.bias"}
    assert kinds(found.plan)[sharded[0]] in (Kind.PART, Kind.COLUMN)


def convolutions() -> nn.Module:
    return CASES["weight norms of convolutions"][0]()


def test_on_processes(pool: Pool) -> None:
    found = equivalent(pool, convolutions, {"x": X}, needs=PLAIN)
    assert found.sharded == {f"up.{V}", f"up.{G}", f"down.{V}", "up.bias"}


def test_numbers_are_compared_of_a_model_that_holds_a_computed_weight() -> None:
    """torch refuses to copy it: the weight that its hook made last has a history."""
    assert compared(CASES["hooks, rows"][0], 2, certificate="numbers").plan.checked == "numbers"


def test_hooks_that_need_different_conversions_are_refused() -> None:
    """The hooks of both layers are one line that the root calls."""
    found = compared(lambda: Mlp(old, old), 2)
    assert not found.sharded
    assert "only some of the calls from one place" in found.plan.params["up.weight_v"].reason


def test_a_norm_that_is_not_summed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    give_rule(monkeypatch, "_weight_norm", no_contracts(OPERATORS["_weight_norm"].rule))
    with pytest.raises(NotEquivalent):
        compared(CASES["weight norms"][0], 2)


def test_rows_of_zeros_are_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding would be divided by its norm."""
    uneven = lambda: Mlp(normed(), normed(), hidden=HIDDEN - 1)  # noqa: E731
    found = compared(uneven, 2)
    assert not found.sharded and "padding would not be finite" in found.plan.params[f"up.{V}"].reason
    monkeypatch.setitem(OPERATORS, "_weight_norm", replace(OPERATORS["_weight_norm"], padded=Padded.AS_FIRST))
    with pytest.raises(NotEquivalent):
        compared(uneven, 2)


SPECTRAL: dict[str, Normed] = {"hooks": nn.utils.spectral_norm, "parametrization": parametrizations.spectral_norm}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SPECTRAL)
def test_a_power_iteration_keeps_the_weight_whole(name: str) -> None:
    found = compared(lambda: Mlp(SPECTRAL[name], SPECTRAL[name]), 2)
    assert not found.sharded
    weight = "weight_orig" if name == "hooks" else W
    assert "it is part of normalize, which has no distributed form" in found.plan.params[f"up.{weight}"].reason


class Doubled(nn.Module):
    """A weight that is read as twice its parameter, and can be assigned."""

    def forward(self, w: Tensor) -> Tensor:
        return 2 * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


ASSIGNED: dict[str, Normed] = {
    "doubled": by(Doubled),
    "doubled twice": lambda layer: by(Doubled)(by(Doubled)(layer)),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize(("name", "by_name"), in_turns(ASSIGNED, (True, False)))
def test_a_computed_weight_is_assigned(name: str, by_name: bool) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(ASSIGNED[name](nn.Linear(WIDTH, HIDDEN)), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)).double()
    new = torch.randn(HIDDEN, WIDTH, dtype=torch.float64)

    def trained(model: Any) -> list[Tensor]:
        if by_name:
            model[0].weight = new.clone()
        else:
            model[0].parametrizations.weight.right_inverse(new.clone())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        first = model(X)
        first.square().mean().backward()
        optimizer.step()
        return [first.detach(), model.eval()(X).detach()]

    before, wanted = copy.deepcopy(one)(X).detach(), trained(copy.deepcopy(one))
    plan = autotp.plan(one, tp=2, example_inputs={"input": X}, check="graph")
    assert (before - wanted[0]).abs().max() > 1e-3

    def work(_: Any) -> list[Tensor]:
        model: Any = copy.deepcopy(one)
        parallelize_as(model, mesh(), plan)
        for wrong in (new[:3], new.float(), 1.0, None):
            with pytest.raises(autotp.AutoTPError, match="was assigned"):
                model[0].weight = wrong
        return trained(model)

    for found in run("local", work, None, 2, 60):
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
