"""Blocks that are built alike are planned alike only where they are used alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotp.axes.find import keep
from autotp.testing import assert_equivalent
from autotp.trace.example import Example
from autotp.trace.run import trace
from tests.models.entry import built
from tests.models.repeated import OUTER, Acts, Counting, Hooked, Idle, Leaves, Nested, Used, Writes
from tests.support.slow import halved

USES = ("method", "forward", "past", "weight", "sizes", "softmax", "in place", "other arguments", "tied", "hook", "plainly")
ACTS = ("functions", "lambdas", "closures", "defaults", "partials", "objects", "methods")
CASES: list[tuple[Any, ...]] = [
    *((Nested, kind) for kind in ("list", "dict", "sequential", "deep")),
    *((Used, how) for how in USES),
    *((Acts, kind) for kind in ACTS),
    *((Counting, how) for how in ("compare", "compute", "set", "list", "not at all")),
    *((Leaves, how) for how in ("plainly", "inside", "shared list")),
    *((Writes, how) for how in ("list", "tensor")),
    (Idle,),
    (Hooked,),
]
#: The blocks that the first one stands for; none where a case is not here.
BOTH, LAST = {"l.1", "l.2"}, {"l.2"}
ALIKE = {
    (Used, "plainly"): BOTH,
    (Used, "forward"): BOTH,
    (Used, "softmax"): BOTH,
    (Used, "in place"): BOTH,
    (Counting, "not at all"): BOTH,
    (Leaves, "plainly"): BOTH,
    (Leaves, "inside"): BOTH,
    (Hooked,): BOTH,
    (Used, "tied"): LAST,
    (Used, "hook"): LAST,
    (Idle,): {"l.1"},
}


def inputs() -> dict[str, Any]:
    return {"x": torch.randn(2, 4, OUTER, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


@pytest.mark.parametrize("case", halved(CASES), ids=lambda c: "-".join(map(str, (c[0].__name__, *c[1:]))))
def test_equal(case: tuple[Any, ...]) -> None:
    cls, *args = case
    for tp in (2, 3):
        result = assert_equivalent(built(cls, *args), tp=tp, inputs=inputs())
        assert result.plan.local_share < 1 or args == ["sizes"], "everything stayed whole"


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, (c[0].__name__, *c[1:]))))
def test_what_is_traced_once(case: tuple[Any, ...]) -> None:
    cls, *args = case
    x = inputs()["x"].float()
    graph = trace(cls(*args), (Example("user", lambda: {"x": x}),), keep)
    assert set(graph.repeats) == ALIKE.get(tuple(case), set())
