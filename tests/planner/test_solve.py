"""The search for a plan ends, whatever goes wrong on the way: with everything whole and the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.planner import make_plan, solve
from autotp.planner.bans import Bans
from autotp.planner.certificate import Difference
from autotp.planner.realise import Builder
from autotp.planner.refusals import Refusal

X = torch.zeros(2, 4)


class Stubborn(Builder):
    """No conversion can be realised while anything is sharded; the node at fault has nothing to do with it."""

    def run(self) -> Any:
        if self.choice.on:
            raise Refusal(self.graph.nodes[0], "not today")
        return super().run()


class Never(Builder):
    def run(self) -> Any:
        raise Refusal(self.graph.nodes[0], "not today")


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 6), nn.Linear(6, 4))


def test_what_cannot_be_realised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "Builder", Stubborn)
    plan = autotp.plan(small(), tp=2, example_inputs={"input": X})
    assert plan.local_share == 1
    assert any("not today" in reason for reason in plan.replicated.values())


def test_what_cannot_be_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "Builder", Stubborn)
    monkeypatch.setattr(Bans, "blame", lambda *_: None)
    assert autotp.plan(small(), tp=2, example_inputs={"input": X}).local_share == 1
    monkeypatch.setattr(solve, "Builder", Never)
    with pytest.raises(autotp.AutoTPError, match=r"not today.*nothing is sharded"):
        autotp.plan(small(), tp=2, example_inputs={"input": X})


def test_what_cannot_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    place = solve.place

    def undecided(space: Any, labels: Any, keys: Any) -> Any:
        if labels.cuts:
            raise Refusal(None, "no way out")
        return place(space, labels, keys)

    monkeypatch.setattr(solve, "place", undecided)
    plan = autotp.plan(small(), tp=2, example_inputs={"input": X})
    assert plan.local_share == 1 and "no way out" in " ".join(plan.replicated.values())


@pytest.mark.parametrize("blamed", [True, False])
def test_a_replay_that_never_agrees(monkeypatch: pytest.MonkeyPatch, blamed: bool) -> None:
    monkeypatch.setattr(make_plan, "replay", lambda model, examples, draft, *_, **__: Difference(draft.space.graph.nodes[0], "it differs"))
    if not blamed:
        monkeypatch.setattr(Bans, "blame", lambda *_: None)
    plan = autotp.plan(small(), tp=2, example_inputs={"input": X})
    assert plan.local_share == 1 and "it differs" in " ".join(plan.replicated.values())
