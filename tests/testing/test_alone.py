"""Modules that no call of the model runs are called by themselves: a wrong number there is a difference, a refusal is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError
from autotp.testing import NotEquivalent, assert_equivalent, sabotage
from autotp.testing.equivalence import subject
from autotp.testing.outcome import equal_or_refused
from tests.planner.test_uncalled import IDS, tied
from tests.support.slow import swept
from tests.testing.equivalence.test_check import Doubled, off_by_a_millionth, raises, rank, refuses, refuses_on_one

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Spare(nn.Linear):
    """A Linear with something done to its result."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__(8, 4)
        self.after = after

    def forward(self, input: Tensor) -> Tensor:
        return self.after(super().forward(input))


class Beside(nn.Module):
    """Linear, relu, Linear, and a Linear and a table that the forward does not use, unless it is asked to."""

    def __init__(self, after: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(8, 16), nn.Linear(16, 8), Spare(after)
        self.table = nn.Embedding(5, 8)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return self.spare(y) if spare else y


@pytest.mark.parametrize("backend", swept(["local", "gloo"], "local"))
def test_what_no_call_runs_is_compared(backend: str) -> None:
    found = assert_equivalent(Beside, tp=2, inputs=X, backend=backend)
    assert found.aspects["outputs"].compared == 1 + 2
    assert found.aspects["gradients"].compared == 5 + (2 + 1) + 1  # the argument of a Linear has one too
    assert set(found.skipped) == {"generation", "steps"}


def test_what_a_further_call_runs_is_not_called_by_itself() -> None:
    found = equal_or_refused(Beside, inputs={"x": X}, tp=2, more={"with the spare": {"spare": True}}).equal
    assert found is not None and found.aspects["outputs"].compared == 3 + 1


@pytest.mark.parametrize("backend", swept(["local", "gloo"], "local"))
def test_a_wrong_number_is_named(backend: str) -> None:
    with pytest.raises(NotEquivalent) as caught:
        assert_equivalent(partial(Beside, off_by_a_millionth), tp=2, inputs=X, backend=backend)
    text = str(caught.value)
    assert "outputs: 1 of 3 differ, the most output of spare by itself: relative error 1.0e-06" in text
    assert "first module that differs, called by itself: spare\n" in text


def test_nothing_else_would_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_uncalled", lambda _: {})
    assert_equivalent(partial(Beside, off_by_a_millionth), tp=2, inputs=X)


def test_a_wrong_gradient_is_named() -> None:
    with pytest.raises(NotEquivalent) as caught:
        assert_equivalent(partial(Beside, Doubled.apply), tp=2, inputs=X, certificate="graph")
    text = str(caught.value)
    assert "outputs: 3 compared" in text and "gradients: 3 of 9 differ" in text
    assert "no module's output differs; first gradient that differs on the way back: spare.weight of spare by itself" in text


def test_an_error_that_is_no_refusal_fails() -> None:
    with pytest.raises(NotEquivalent, match=r"(?s)rank 1.*this rank says no"):
        assert_equivalent(partial(Beside, raises), tp=2, inputs=X)


def test_a_refusal_is_no_difference() -> None:
    found = assert_equivalent(partial(Beside, refuses), tp=2, inputs=X)
    assert found.aspects["outputs"].compared == 1 + 1 and found.aspects["gradients"].compared == 5 + 1
    assert found.skipped["spare by itself"] == "refused: not this call"
    assert "  spare by itself: not compared, refused: not this call" in str(found)


def test_a_refusal_of_one_rank_is_a_difference() -> None:
    with pytest.raises(NotEquivalent, match="not all ranks refuse the same calls of modules by themselves"):
        assert_equivalent(partial(Beside, refuses_on_one), tp=2, inputs=X)


def refuses_every_call(y: Tensor) -> Tensor:
    raise AutoTPError("not on one device either")


@pytest.mark.parametrize("after", [refuses_every_call, lambda y: y / 0 * 0, lambda y: None])
def test_what_gives_nothing_on_one_device_is_left_out(after: Callable[[Tensor], Tensor]) -> None:
    assert assert_equivalent(partial(Beside, after), tp=2, inputs=X).aspects["outputs"].compared == 1 + 1
    assert rank() == -1


# an embedding that owns a tied weight -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "refused"), [("alike", {"spare"}), ("another class", {"shared", "spare"})])
def test_a_module_that_owns_a_tied_parameter(kind: str, refused: set[str]) -> None:
    found = assert_equivalent(partial(tied, kind), tp=2, inputs={"ids": IDS})
    assert {name for name in found.skipped if name.endswith(" by itself")} == {f"{path} by itself" for path in refused}
    assert found.aspects["outputs"].compared == 1 + len({"shared", "spare"} - refused)


def test_mistakes_at_an_embedding_that_no_call_runs_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = autotp.plan(tied("alike"), tp=2, example_inputs={"ids": IDS})
    check = partial(assert_equivalent, partial(tied, "alike"), tp=2, inputs={"ids": IDS})
    there = [m for m in sabotage.mutations(plan) if m.old is not None and m.old.path == "shared"]
    assert len(there) == 3
    for mutation in there:
        with pytest.raises(NotEquivalent):
            check(sabotage=mutation)
    monkeypatch.setattr(subject, "_uncalled", lambda _: {})
    for mutation in there:  # the control: no other call runs it
        check(sabotage=mutation)


def test_every_mistake_is_caught() -> None:
    found = sabotage.survey(partial(tied, "alike"), tp=2, inputs={"ids": IDS})
    assert len(found.caught) > 10 and not found.survived
