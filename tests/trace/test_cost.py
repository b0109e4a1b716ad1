"""What a trace costs grows with the operators that run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.axes.find import keep
from autotp.inputs.paths import user_examples
from autotp.trace.graph import Graph, Pseudo
from autotp.trace.python_mode import PythonMode
from autotp.trace.run import trace
from autotp.trace.tape import Tape


class Rows(nn.Module):
    """Fills a tensor row by row. `held`: the views of the rows are read again at the end."""

    def __init__(self, rows: int, *, held: bool = False) -> None:
        super().__init__()
        self.rows, self.held, self.a = rows, held, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.rows, 8)
        views = []
        for i in range(self.rows):
            view = out[i]
            view.copy_(self.a(x))
            if self.held:
                views.append(view)
        return out.sum(0) + sum(views)


def traced(model: nn.Module) -> Graph:
    return trace(model, user_examples(model, {"x": torch.randn(8)}), keep)


def recorded(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """The nodes that a trace records, those that nothing needs too."""
    count, add = [0], Tape.add

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return add(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tape, "add", counted)
        traced(model)
    return count[0]


def test_rows_that_are_filled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many, more = (recorded(Rows(n), monkeypatch) for n in (10, 20, 40))
    assert more - many == 2 * (many - few)  # linear
    held = [recorded(Rows(n, held=True), monkeypatch) for n in (10, 20, 40)]
    assert held[2] - held[1] > 2 * (held[1] - held[0])  # the negative control: views that the code holds have changed each time


def test_a_view_that_is_held_is_another_value() -> None:
    """Each view that is read at the end has seen all writes."""
    for rows in (2, 3):
        writes = [n for n in traced(Rows(rows, held=True)).nodes if n.op is Pseudo.WRITE]
        last = {o.id for n in writes for o in n.outputs}
        assert len(last) > rows


class Nested(nn.Module):
    """Modules around modules that hand their argument on."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Nested(depth - 1) if depth else nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_crossing_a_module_asks_the_recorder_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recorder itself does with tensors at a boundary goes past its mode, with gradients too."""
    seen: list[int] = []
    usual = PythonMode.__torch_function__

    def counted(self: PythonMode, *rest: Any) -> Any:
        seen[-1] += 1
        return usual(self, *rest)

    monkeypatch.setattr(PythonMode, "__torch_function__", counted)
    for depth in (1, 9):
        seen.append(0)
        graph = traced(Nested(depth))
        assert sum(node.op is Pseudo.ENTER for node in graph.nodes) >= depth
    assert seen[0] == seen[1]
