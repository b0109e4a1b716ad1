"""Every optimizer of torch that works on each element, in each of its forms, and Adafactor, gives the parameters of one device."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.plan.layout import replicated
from autotp.rewrite.parameters.make import as_dtensor
from tests.rewrite.parameters.test_dtensor_operators import full, layouts, other
from tests.support.ranks import Pool, mesh

Make = Callable[[Any], torch.optim.Optimizer]
NAMES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and cls not in (torch.optim.Optimizer, torch.optim.SparseAdam, torch.optim.LBFGS, torch.optim.Muon)
)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}, {"maximize": True}],
    "Adam": [{"amsgrad": True, "weight_decay": 0.01}, {"lr": torch.tensor(0.01, dtype=torch.float64)}],
    "AdamW": [{"amsgrad": True}, {"maximize": True}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "Adagrad": [{"lr_decay": 0.1, "weight_decay": 0.01}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.01}],
    "RAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.01}],
}


def forms(name: str) -> Iterator[dict[str, Any]]:
    known = inspect.signature(getattr(torch.optim, name)).parameters
    for options in [{}, *VARIANTS.get(name, [])]:
        yield options
        for form in ("foreach", "fused"):
            if form in known and not (form == "foreach" and "lr" in options):  # torch has no form for a learning rate that is a tensor
                yield options | {form: True}


def parameters(line: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """One of each layout, transposed in memory, and a number: plain ones, and the same laid out."""
    kinds = layouts(line.size())
    turned = full(kinds["whole"]).t().contiguous().t()
    made = [*((full(layout), layout) for layout in kinds.values()), (turned, kinds["whole"])]
    made += [
        (full(kinds["rows"]).t().contiguous().t(), kinds["rows"]),
        (torch.tensor(0.5, dtype=torch.float64), replicated((), line.size())),
    ]
    rank = line.get_local_rank()
    return (
        [nn.Parameter(whole.clone()) for whole, _ in made],
        [nn.Parameter(as_dtensor(layout.shard(whole.clone(), rank), layout, line)) for whole, layout in made],
    )


def steps(params: list[nn.Parameter], make: Make) -> list[Tensor]:
    optimizer = make(params)
    for i in range(3):

        def loss(i: int = i) -> Tensor:
            optimizer.zero_grad()
            total = torch.stack([(p * other(p, i + 3)).sin().sum() for p in params]).sum()
            total.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(params, 10.0)
            return total

        optimizer.step(loss)  # type: ignore[arg-type]
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


def stepped(name: str) -> dict[str, str]:
    """Form → what is wrong with it."""
    wrong: dict[str, str] = {}
    line = mesh()
    for options in forms(name):

        def make(params: Any, options: dict[str, Any] = options) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = getattr(torch.optim, name)(params, **copy.deepcopy(options))
            return made

        plain, laid = parameters(line)
        wanted = steps(plain, make)
        try:
            got = steps(laid, make)
        except Exception as error:
            wrong[str(options)] = f"{type(error).__name__}: {error}"
            continue
        worst = max(float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True))
        if worst > 1e-9:
            wrong[str(options)] = f"differs by {worst}"
    return wrong


@pytest.mark.parametrize(
    ("name", "world"),
    [pytest.param(*c, marks=pytest.mark.sweep) if at % 3 else c for at, c in enumerate((n, w) for n in NAMES for w in (2, 3))],
)
def test_the_steps_of_one_device(pool: Pool, name: str, world: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for wrong in pool.run(stepped, name, world=world):
            assert not wrong, wrong
