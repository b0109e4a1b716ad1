"""Which calls of a trace are replayed: where all are run with numbers, those that show every step of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp import Plan, examine
from autotp.numeric.check import Verdict
from autotp.planner import certificate, make_plan
from autotp.planner.replayed import Replayed

OUTER, WIDTH = 6, 16


class Called(nn.Module):
    """Linear, relu, something that a flag asks for, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)

    def between(self, h: Tensor, asked: bool) -> Tensor:
        return h

    def forward(self, x: Tensor, asked: bool) -> Tensor:
        return self.b(self.between(F.relu(self.a(x)), asked))


class Doubling(Called):
    def between(self, h: Tensor, asked: bool) -> Tensor:
        return h * 2 if asked else h


class DoublingShards(Called):
    """Another path, on a shard alone."""

    def between(self, h: Tensor, asked: bool) -> Tensor:
        return h * 2 if asked and h.shape[-1] < WIDTH else h


class Remembering(Called):
    """A call without the flag adds what the call before it left."""

    kept: Tensor | None = None

    def between(self, h: Tensor, asked: bool) -> Tensor:
        kept, self.kept = self.kept, h * 1
        return h + kept if kept is not None and not asked else h


class Casting(Called):
    """A buffer that is handed on as it is becomes a value of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def between(self, h: Tensor, asked: bool) -> Tensor:
        return h * self.scale.to(h.dtype)


def plan(model: nn.Module, **options: Any) -> Plan:
    return autotp.plan(model, tp=2, example_inputs=[{"x": torch.randn(3, OUTER), "asked": asked} for asked in (True, False)], **options)


def cut(found: Plan) -> bool:
    return found.params["a.weight"].layout.dim is not None


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls of each replay, in evaluation mode."""
    found: list[list[str]] = []
    usual = certificate._replay

    def replay(model: nn.Module, calls: Replayed, *rest: Any) -> Any:
        found.append([e.name for e in calls.examples if not e.training])
        return usual(model, calls, *rest)

    monkeypatch.setattr(certificate, "_replay", replay)
    return found


@pytest.mark.parametrize("model", [Called, Casting])
def test_calls_that_do_the_same_are_replayed_once(model: type[Called], replays: list[list[str]]) -> None:
    found = plan(model())
    assert cut(found)
    assert found.checked == "numbers"
    assert replays == [["user 2"]]


def test_a_call_that_does_more_stands_for_one_that_does_less(replays: list[list[str]]) -> None:
    assert cut(plan(Doubling()))
    assert len(replays) == 1
    assert "user" in replays[0]


def test_all_calls_are_replayed_where_no_numbers_are_run(replays: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cut(plan(Called(), check="graph"))
    assert replays == [["user", "user 2"]]
    replays.clear()
    monkeypatch.setattr(examine, "judge", lambda *_: Verdict(unknown="it is late"))
    assert cut(plan(Called()))
    assert replays == [["user 2"], ["user", "user 2"]]


def test_a_call_that_reads_what_another_left_is_not_replayed_alone(replays: list[list[str]]) -> None:
    plan(Remembering())
    assert all(calls == ["user", "user 2"] for calls in replays)


def test_what_a_call_that_is_left_out_does_on_a_shard_is_found_by_numbers(replays: list[list[str]]) -> None:
    found = plan(DoublingShards())
    assert replays[0] == ["user 2"]
    assert not cut(found)
    assert "numbers differ" in found.params["a.weight"].reason


def test_or_by_the_whole_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "judge", lambda *_: Verdict(unknown="it is late"))
    found = plan(DoublingShards())
    assert not cut(found)
    assert "another path" in found.params["a.weight"].reason
    usual = certificate.replay
    monkeypatch.setattr(make_plan, "replay", lambda *rest, few=True: usual(*rest, few=True))
    assert cut(plan(DoublingShards()))  # which is what knows it
