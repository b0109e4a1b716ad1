"""Code on a rank's part is called as it was traced: other flags, masks where there were none and other data are traced too, or refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError
from autotp.rewrite import entry
from autotp.testing.outcome import Outcome, equal_or_refused
from autotp.testing.tiny import randomise
from tests.support.ranks import Pool, mesh

X, MASK = torch.randn(2, 5, 32), torch.ones(5, 5).triu(1).bool()


class Attend(nn.Module):
    """Attention over parts of which a mask and a flag take other paths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, mode: str = "plain", **more: Any) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        w = q @ k.transpose(-1, -2)
        if mask is not None:
            w = w.masked_fill(mask, -1e9)
        if mode == "mixed" or more.get("mixed"):
            w = w - w.mean(1, keepdim=True)
        return self.o((w.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two blocks; `how` says in which way the arguments reach them."""

    def __init__(self, how: str = "position") -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(Attend() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None, mixed: bool = False) -> Tensor:
        for layer in self.layers:
            mode = "mixed" if mixed else "plain"
            if self.how == "position":
                x = x + layer(x, mask, mode)
            elif self.how == "keyword":
                x = x + layer(x, mask=mask, mode=mode)
            else:
                x = x + layer(x, mask=mask, **({"mixed": True} if mixed else {}))
        return x


class Between(nn.Module):
    """The model's own code holds parts between two Linears."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(32, 64), nn.Linear(64, 32), kind

    def forward(self, x: Tensor, bias: Tensor | None = None, options: dict[str, Any] | None = None) -> Tensor:
        if self.kind == "checks" and torch.isnan(x).any():
            raise ValueError("not a number")
        h = self.a(x)
        if bias is not None:
            h = (h + bias).softmax(-1)
        if options is not None and options.get("centred"):
            h = h - h.mean(-1, keepdim=True)
        if self.kind and (x > 100).any():
            h = h - h.mean(-1, keepdim=True)
        return self.b(h)


def build(factory: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = factory()
    randomise(model, seed=3)
    return model


def outcome(factory: Any, inputs: dict[str, Any], tp: int = 2, **more: Any) -> Outcome:
    changed = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in more.items()}
    return equal_or_refused(partial(build, factory), inputs=inputs, tp=tp, more={"changed": changed}, certificate="graph")


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("how", ["position", "keyword", "rest"])
def test_a_flag_that_was_off_is_traced_on(how: str, tp: int) -> None:
    assert outcome(partial(Net, how), {"x": X}, tp, mixed=True).equal is not None


def test_an_argument_that_was_given_is_left_out() -> None:
    assert outcome(Net, {"x": X, "mask": MASK}, mask=None).sharded


@pytest.mark.parametrize("how", ["position", "keyword", "rest"])
def test_a_mask_where_there_was_none_is_refused(how: str) -> None:
    found = outcome(partial(Net, how), {"x": X}, mask=MASK)
    assert (
        "layers.0 (Attend) is called with mask as a tensor of 2 dims (bool); the calls that were traced had mask as None" in found.refused
    )
    assert "a list of several calls" in found.refused


def test_the_models_own_code_too() -> None:
    assert "the model (Between) is called with bias as a tensor of 1 dims" in outcome(Between, {"x": X}, bias=torch.randn(64)).refused
    off = {"x": X, "options": {"centred": False}}
    assert "options as a dict (centred: True)" in outcome(Between, off, options={"centred": True}).refused


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("kind", ["asks", "checks"])
def test_what_code_asks_of_data_is_traced_both_ways(kind: str, tp: int) -> None:
    assert outcome(partial(Between, kind), {"x": X}, tp, x=X + 200).equal is not None


def several(how: str) -> list[float]:
    """Plan with two calls; both are equal, and so is their gradient."""
    plain = build(partial(Net, how)).double()
    parallel = copy.deepcopy(plain)
    x = X.double()
    autotp.parallelize(parallel, mesh(), example_inputs=[{"x": x}, {"x": x, "mask": MASK}])
    assert autotp.plan_of(parallel).local_share < 0.6
    errors = []
    for call in ({"x": x}, {"x": x, "mask": MASK}):
        wanted, got = plain(**call), parallel(**call)
        wanted.square().sum().backward()
        got.square().sum().backward()
        errors.append(float((wanted - got).abs().max()))
    grads = autotp.full_grads(parallel)
    return [*errors, *(float((p.grad - grads[n]).abs().max()) for n, p in plain.named_parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", ["position", "rest"])
def test_several_calls_are_planned_for(pool: Pool, how: str) -> None:
    assert max(max(errors) for errors in pool.run(several, how)) < 1e-9


def test_bad_calls_in_a_list() -> None:
    with pytest.raises(AutoTPError, match="forward takes no 'y'"):
        autotp.plan(Net(), tp=2, example_inputs=[{"x": X}, {"y": X}])
    with pytest.raises(AutoTPError, match="wanted a mapping"):
        autotp.plan(Net(), tp=2, example_inputs=[])


def test_without_the_guard_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(entry, "install_called", lambda *_: None)
    with pytest.raises(AssertionError, match=r"output changed|differ"):
        outcome(Between, {"x": X, "options": {"centred": False}}, options={"centred": True})
