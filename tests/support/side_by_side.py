"""A model and its parallel copy run side by side on each rank: several calls, in training and in eval mode, buffers and arguments too.

`equivalent` of `support.pooled` compares what a call returns. Here calls follow each other: what one of them leaves behind (a
buffer, a changed argument) shows in the next. Ranks are threads that take turns; with a `Pool` they are processes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import autotp
from autotp.testing.equivalence.compare import error_of
from autotp.testing.equivalence.observe import weighted
from autotp.testing.ranks.run import run
from tests.support.ranks import Pool, mesh

LIMIT = 1e-9
#: Gradients that are rounding errors of zero are compared as numbers of this size.
FLOOR = 1e-3


class Between(nn.Module):
    """A function of the activations between two Linears of width `width`."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, width, bias), nn.Linear(width, 16, bias)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))  # type: ignore[no-any-return]


def _calls(model: nn.Module, inputs: Mapping[str, Tensor], grads: Callable[[], Mapping[str, Tensor]], train: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for mode in ["train", "train again", "eval"] if train else ["eval"]:
        model.train(mode != "eval")
        model.zero_grad()
        leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
        torch.manual_seed(1)
        out = model(**{n: t * 1 for n, t in leaves.items()})
        found[mode] = out.detach().clone()
        total = weighted({"": out})
        if total is not None:
            total.backward()  # type: ignore[no-untyped-call]
            found |= {f"{mode}: gradient of {n}": t.detach().clone() for n, t in grads().items()}
            found |= {f"{mode}: gradient of the argument {n}": t.grad for n, t in leaves.items() if t.grad is not None}
    given = {n: t.clone() for n, t in inputs.items()}
    with torch.no_grad():
        found["without gradients"] = model(**given).clone()
    return found | {f"the argument {n} afterwards": t for n, t in given.items()}


def _plain_grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(factory: Callable[[], nn.Module], inputs: Mapping[str, Tensor], train: bool) -> tuple[float, str]:
    """On one rank: the plan's local share, and what differs most ("" where nothing does)."""
    torch.manual_seed(0)
    plain = factory().double()
    parallel = copy.deepcopy(plain)
    autotp.parallelize(parallel, mesh(), example_inputs=inputs, check="graph")  # the rules, without what would catch their faults
    wanted = _calls(plain, inputs, lambda: _plain_grads(plain), train)
    got = _calls(parallel, inputs, lambda: autotp.full_grads(parallel), train)
    wanted |= {f"state {n}": t for n, t in plain.state_dict().items()}
    got |= {f"state {n}": t for n, t in autotp.full_state_dict(parallel).items()}
    errors = {n: error_of(t, got[n], FLOOR) if n in got else float("inf") for n, t in wanted.items()}
    errors |= {n: float("inf") for n in got if n not in wanted}
    where = max(errors, key=errors.__getitem__)
    wrong = f"{where} is off by {errors[where]:.1e}" if not errors[where] <= LIMIT else ""
    return autotp.plan_of(parallel).local_share, wrong


def equal(
    factory: Callable[[], nn.Module], inputs: Mapping[str, Tensor], tp: int = 2, *, train: bool = False, pool: Pool | None = None
) -> bool:
    """Check that both do the same on every rank; whether anything is sharded.

    Raises:
        AssertionError: something differs.
    """
    if pool is not None:
        found = pool.run(compare, factory, dict(inputs), train, world=tp)
    else:
        found = run("local", functools.partial(_apply, compare), (factory, inputs, train), tp, 60.0)
    wrong = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text]
    assert not wrong, wrong
    return bool(found[0][0] < 0.99)


def _apply(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)
