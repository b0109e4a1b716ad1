"""What people do with parameters after parallelize gives what it gives on one device, on every layout, or is refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from autotp.api import parallelize_as
from autotp.plan.plan import Plan
from autotp.rewrite.parameters import reads
from autotp.rewrite.parameters.dtensor_operators import dispatch
from tests.rewrite.parameters import uses
from tests.support.ranks import Pool, mesh
from tests.support.slow import swept

KINDS = ["even", "tied", "fused", "concatenated", "padded", "shared", "experts", "biased", "joint"]
_PLANS: dict[tuple[str, bool, int], Plan] = {}


def pair(kind: str, eager: bool) -> tuple[nn.Module, nn.Module]:
    """The model on one device and over the ranks."""
    alone = uses.build(kind, eager=eager)
    model, line = copy.deepcopy(alone), mesh()
    key = kind, eager, line.size()
    if key in _PLANS:
        return alone, parallelize_as(model, line, _PLANS[key])
    autotp.parallelize(model, line, check="graph")
    _PLANS[key] = autotp.plan_of(model)
    assert _PLANS[key].local_share < 0.8
    return alone, model


def said_of(use: str, kind: str) -> str:
    """ "" where a use is as on one device; else what is wrong with it."""
    alone, model = pair(kind, use in uses.SECOND)
    wanted = uses.observed(use, alone)
    refused = uses.REFUSED.get(use)
    try:
        got = uses.observed(use, model)
    except autotp.AutoTPError as error:
        return "" if refused and refused in str(error) else f"{use}: {error}"
    except Exception as error:
        return f"{use}: {type(error).__name__}: {error}"
    far = {name: by for name, by in uses.apart(wanted, got).items() if not by <= 1e-9}
    return f"{use}: differs, {far}" if far else f"{use}: was not refused" if refused else ""


def said_of_all(kind: str, names: list[str]) -> list[str]:
    return [said for use in names if (said := said_of(use, kind))]


def check(pool: Pool, kind: str, world: int) -> None:
    names = list(uses.USES)
    for at in range(0, len(names), 12):  # a job of a pool has a limit of time
        for said in pool.run(said_of_all, kind, names[at : at + 12], world=world):
            assert not said, "\n".join(said)


@pytest.mark.parametrize("kind", swept(KINDS, "padded"))
def test_uses(pool: Pool, kind: str) -> None:
    check(pool, kind, 2)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["fused", "padded", "concatenated", "experts"])
def test_uses_on_three_ranks(pool: Pool, kind: str) -> None:
    check(pool, kind, 3)


def plain_results() -> None:
    """What is computed beside plain tensors is plain: other code takes it without knowing of ranks."""
    _, model = pair("fused", False)
    ids = uses.Data(1).ids(0)
    h, w = uses.hidden(model, ids), uses.head(model).weight
    loss = (h @ w.T).sum()
    made = [h @ w.T, w[ids], torch.cat([w, torch.zeros(1, w.shape[1], dtype=w.dtype)]), loss + w.pow(2).sum(), loss + w.norm()]
    assert not any(isinstance(x, DTensor) for x in made)
    (grad,) = torch.autograd.grad(made[-1] + (h * w[:1]).sum(), h)
    assert type(grad) is Tensor


def test_results_beside_plain_tensors_are_plain(pool: Pool) -> None:
    pool.run(plain_results)


def kind_of_gradient() -> str:
    _, model = pair("fused", False)
    w = uses.inner(model).weight
    x = torch.ones(w.shape, dtype=w.dtype, requires_grad=True)
    try:
        (w * x).sum().backward()
    except RuntimeError as error:
        return str(error)
    return type(x.grad).__name__


def test_the_gradient_of_a_plain_tensor_is_plain(pool: Pool) -> None:
    assert pool.run(kind_of_gradient) == ["Tensor"] * 2


def without(owner: Any, name: str, other: Callable[..., Any], use: Callable[[], str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, other)
        return use()


def without_kinds() -> str:
    return without(dispatch, "keep_kinds", lambda args, kwargs: None, kind_of_gradient)


def without_a_dual() -> str:
    lost = staticmethod(lambda ctx, grad: (ctx.fix.layout and torch.zeros(ctx.fix.layout.local_shape, dtype=grad.dtype), None, None))
    return without(reads._Give, "backward", lost, lambda: said_of("hvp of parameters", "fused"))  # type: ignore[arg-type]


def test_the_table_notices_lost_gradients(pool: Pool) -> None:
    """The controls."""
    assert "Tensor" not in pool.run(without_kinds)
    assert all("differs" in said for said in pool.run(without_a_dual))
