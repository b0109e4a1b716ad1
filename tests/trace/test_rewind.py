"""A path that cannot be traced leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autotp.axes.find import keep
from autotp.trace.example import Example
from autotp.trace.graph import Origin
from autotp.trace.run import trace


class Scaled(nn.Module):
    """The scale is handed on by an operator that returns its argument; with `fail` the call does not end."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        y = self.a(x) * self.scale.to(torch.float32)
        if fail:
            raise ValueError("not today")
        return y


def test_values_of_a_path_that_failed_are_forgotten() -> None:
    x = torch.ones(2, 4)
    examples = (
        Example("first", lambda: {"x": x}),
        Example("failing", lambda: {"x": x, "fail": True}, optional=True),
        Example("last", lambda: {"x": x}),
    )
    graph = trace(Scaled(), examples, keep)
    assert [result.name for result in graph.results] == ["first", "last"]
    assert any("failing" in note for note in graph.notes)
    made: set[int] = set()
    for node in graph.nodes:
        assert not [v for v in node.inputs() if v.origin is Origin.NODE and v.id not in made], node
        made |= {o.id for o in node.outputs}


@pytest.mark.parametrize("fails", ["to make the next call", "in the next call"])
def test_a_call_that_ran_stays_where_the_one_after_it_fails(fails: str) -> None:
    x = torch.ones(2, 4)

    def decode(out: Tensor) -> dict[str, object]:
        if fails == "to make the next call":
            raise AttributeError("no cache")
        return {"x": x, "fail": True}

    graph = trace(Scaled(), (Example("first", lambda: {"x": x}), Example("prefill", lambda: {"x": x}, optional=True, decode=decode)), keep)
    alone = trace(Scaled(), (Example("first", lambda: {"x": x}), Example("prefill", lambda: {"x": x})), keep)
    assert [result.name for result in graph.results] == ["first", "prefill"]
    assert [node.opname for node in graph.nodes] == [node.opname for node in alone.nodes]
    assert any("prefill+decode" in note for note in graph.notes) and not alone.notes
