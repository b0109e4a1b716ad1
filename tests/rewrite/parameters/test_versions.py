"""What changes a parameter in place between a forward and its backward is an error where it is one on one device, or changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.api import parallelize_as
from autotp.plan.plan import Plan
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from tests.composition.training import Data, exact, loss_of
from tests.rewrite.parameters import uses
from tests.support.ranks import Pool, mesh
from tests.support.slow import swept

Changes = dict[str, Callable[[Any], object]]
CHANGES: Changes = {
    "multiplied": lambda p: p.mul_(2),
    "a row": lambda p: p.__setitem__(0, 0.5),
    "rows": lambda p: p[:2].mul_(2),
    "copied": lambda p: p.copy_(p.full_tensor() if isinstance(p, LayoutDTensor) else p.clone()),
    "in a list": lambda p: torch._foreach_mul_([p], 2.0),
    "detached": lambda p: p.detach().mul_(2),
    "data": lambda p: p.data.mul_(2),
    "a row of data": lambda p: p.data.__setitem__(0, 0.5),
    "data in a list": lambda p: torch._foreach_mul_([p.data], 2.0),
}


def stepped(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Any], object]:
    """An optimizer's step with a gradient that is there already."""

    def change(p: Any) -> None:
        p.grad = torch.ones_like(p)
        make([p], lr=0.1, **options).step()
        p.grad = None

    return change


OPTIMIZERS: Changes = {
    f"{make.__name__} {how}": stepped(make, **options)
    for make in (torch.optim.SGD, torch.optim.AdamW)
    for how, options in (("foreach", {"foreach": True}), ("each", {"foreach": False}), ("fused", {"fused": True}))
}
_PLANS: dict[tuple[str, int], Plan] = {}


def gradients(model: nn.Module, name: str, change: Callable[[Any], object]) -> dict[str, Tensor] | None:
    """Gradients of a backward after `change` of one parameter, which is undone then; None where the backward is refused."""
    p: Any = model.get_parameter(name)
    before = uses.whole(p)
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, Data(1).ids(0))
    with torch.no_grad():
        change(p)
    try:
        with exact(model):
            loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if not isinstance(error, autotp.AutoTPError) and "modified by an inplace operation" not in str(error):
            raise
        return None
    finally:
        with torch.no_grad():
            p.copy_(before)
    return {n: uses.whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def compared(kind: str, every: int) -> tuple[list[str], int]:
    """(what is not as on one device, how many changes were refused); `every`: of so many changes of each parameter, one is made."""
    alone, line = uses.build(kind, eager=False), mesh()
    key = kind, line.size()
    if key not in _PLANS:
        _PLANS[key] = autotp.plan(alone, tp=line.size(), check="graph")
    model = parallelize_as(copy.deepcopy(alone), line, _PLANS[key])
    said, refused, at = [], 0, 0
    for name, _ in alone.named_parameters():
        for how, change in {**CHANGES, **OPTIMIZERS}.items():
            at += 1
            if at % every:
                continue
            wanted, got = gradients(alone, name, change), gradients(model, name, change)
            if wanted is None or got is None:
                refused += got is None
                if got is not wanted:
                    said.append(f"{name}, {how}: {'is not refused' if wanted is None else 'is refused'}")
            elif far := {n: by for n, by in uses.apart(wanted, got).items() if not by <= 1e-9}:
                said.append(f"{name}, {how}: {far}")
    return said, refused


@pytest.mark.parametrize("kind", swept(uses.MODELS, "even", "fused", "padded", "joint"))
def test_as_on_one_device(pool: Pool, kind: str) -> None:
    for said, refused in pool.run(compared, kind, 37):
        assert not said and refused, "\n".join(said)


#: What code does with a parameter in inference mode: (what it gives, which is compared).
IN_INFERENCE: dict[str, Callable[[Any], Tensor]] = {
    "a view": lambda p: p.view(-1),
    "a row": lambda p: p[0],
    "detached": lambda p: p.detach().unsqueeze(0),
    "a clone": lambda p: p.clone().mul_(3),
    "multiplied": lambda p: p.mul_(2),
    "copied": lambda p: p.copy_(p.detach() * 3),
    "data": lambda p: p.data.mul_(2),
}


def in_inference(modes: bool) -> list[str]:
    """What of `IN_INFERENCE` is not as on one device; `modes`: False where the mode is not asked for."""
    alone, said = uses.build("fused", eager=False), []
    model = autotp.parallelize(copy.deepcopy(alone), mesh(), check="graph")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if not modes:
            patch.setattr(torch, "is_inference_mode_enabled", lambda: False)
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            for how, does in IN_INFERENCE.items():
                versions = p._version, q._version
                try:
                    wanted, got = does(p), uses.whole(does(q))
                except RuntimeError as error:
                    said.append(f"{name}, {how}: {error}")
                    continue
                if not torch.allclose(wanted.detach(), got, rtol=1e-9) or p._version - versions[0] != q._version - versions[1]:
                    said.append(f"{name}, {how}: {wanted}, {got}")
    return said


def test_in_inference_mode(pool: Pool) -> None:
    assert pool.run(in_inference, True) == [[], []]
    for said in pool.run(in_inference, False):  # the control
        assert any("version_counter" in each for each in said)


def uncounted() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_SetExcludeDispatchKeyGuard", lambda *_: nullcontext())
        return compared("even", 37)[0]


def test_changes_that_are_not_counted_show(pool: Pool) -> None:
    """The control."""
    assert all("is not refused" in " ".join(said) for said in pool.run(uncounted))
