"""Reductions of parameters, and of their sums and norms: equal to one device, gradients included, whoever holds the extremes.

Ties within a rank and between ranks share a gradient; padding, and further copies of an index, are in no tie and get none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_leaves

from autotp.errors import AutoTPError
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.compiled_grads import _Ordered
from autotp.rewrite.parameters.dtensor_operators import dispatch
from autotp.rewrite.parameters.dtensor_operators.sums import Summed
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.make import as_dtensor
from autotp.rewrite.parameters.numbers import Numbers
from tests.rewrite.parameters.test_dtensor_operators import full, layouts, same, whole
from tests.support.ranks import Pool, mesh
from tests.support.slow import swept

_norm = torch.linalg.vector_norm
_inf = math.inf


def _old(w: Any) -> Tensor:
    """A plain tensor of the shape of a parameter, as the weights at the start."""
    return torch.linspace(0.5, 2, w.numel(), dtype=w.dtype).view(w.shape)


def _made_whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _placed_whole(x: Any) -> Any:
    return x.redistribute(placements=[Replicate()]).to_local() if isinstance(x, DTensor) else x


#: Parameter → tensors, all differentiable.
REDUCTIONS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "extremes": lambda w: (w.amax(), w.amin() * 2, w.max() ** 2, w.min(), w.abs().amax(), w.amax() - w.amin()),
    "both": lambda w: (w.aminmax()[1], w.aminmax(dim=0)[0], w.aminmax(dim=-1)[1] ** 2),
    "extremes along dims": lambda w: (w.amax(0), w.amin(-1) ** 2, w.max(0)[0], w.min(-1)[0].sin(), w.max(0, keepdim=True)[0]),
    "no dim is all": lambda w: (w.amax(dim=()), w.sum(dim=()), w.sum(dim=(), keepdim=True), w.mean(dim=()), _norm(w, 2, dim=())),
    "all dims": lambda w: (w.amax(tuple(range(w.ndim)), keepdim=True), w.sum(tuple(range(w.ndim)), keepdim=True) ** 2, w.logsumexp(0)),
    "norms": lambda w: (w.norm(_inf), w.norm(-_inf), _norm(w, _inf, dim=0), _norm(w, -_inf, dim=-1), w.norm(1), _norm(w, 3, keepdim=True)),
    "of what is not zero in padding": lambda w: ((w + 1).norm(), w.exp().amin(), w.cos().amax(), (w.abs() + 1).norm(-_inf), (w + 2).var()),
    "order": lambda w: (w.median(), w.median(0)[0], w.flatten().kthvalue(4)[0], w.topk(2, 0)[0], w.sort(0)[0][1:].sin(), w.quantile(0.3)),
    "running": lambda w: (w.cummax(0)[0], w.cumprod(0), w.cumsum(-1).sin(), w.mode(0)[0], w.flatten()[w.argmax()]),
    "products": lambda w: (w.prod(), w.prod(0), (w + 1).prod(), w.std(), w.logsumexp(-1), w.softmax(0) ** 2),
    "scaled": lambda w: (w / (w.abs().amax() + 1), w / (w.abs().amax(0, keepdim=True) + 1), w.clamp(max=0.5).amax(), w.clamp(min=w.mean())),
    "norms of norms": lambda w: (w.norm(dim=0), w.norm(dim=-1).amax(), w.norm(dim=0).amax(), _norm(w.norm(dim=-1), _inf), w.norm(3, dim=0)),
    "of sums": lambda w: (w.sum(-1).amax(), w.sum(0).max(), w.sum(-1).aminmax()[0], w.sum(-1).flatten().std(), w.sum(-1).softmax(-1) ** 2),
    "on with sums": lambda w: (w.sum(0).flatten() @ w.sum(0).flatten(), w.sum(-1).flatten()[1:3], w.sum(-1).logsumexp(-1), w.norm() ** 2),
    "joined": lambda w: (torch.stack([w.sum(), w.norm(), w.amax()]).amax(), torch.cat([w.sum(-1).flatten(), w.norm().flatten()]) ** 2),
    "low precision": lambda w: (w.bfloat16().double().sum() ** 2, w.float().amax().double(), (w.bfloat16() * 2).double().amin()),
    "losses": lambda w: (
        F.l1_loss(w, torch.ones_like(w)),
        F.huber_loss(w, torch.zeros_like(w)),
        torch.dist(w, torch.ones(w.shape).to(w.dtype), _inf),
    ),
    "made whole": lambda w: (
        _made_whole((w * _old(w)).sum()) * 0.1,
        _made_whole((w / _old(w)).sum(-1)) ** 2,
        _made_whole(torch.where(_old(w) > 1, w, 0.0).sum(0)).sin(),
        _made_whole((w * _old(w)).norm()),
        _made_whole(F.cosine_similarity(w.flatten(), _old(w).flatten(), dim=0)) * _made_whole((w * _old(w)).mean()),
    ),
    "placed whole": lambda w: (
        _placed_whole((w * _old(w)).sum()) ** 2,
        _placed_whole((w * _old(w)).sum(-1)).sin(),
        _placed_whole(torch.linalg.vecdot(w, _old(w))) * _made_whole(w.sum()),
        _placed_whole(w * _old(w)) ** 2,
    ),
    "lists": lambda w: (
        torch._foreach_max([w - 2])[0],
        torch._foreach_norm([w.exp()], -_inf)[0],
        torch._foreach_norm([w + 1], _inf)[0],
        nn.utils.get_total_norm([w, w * 2]),
    ),
}


def values(layout: Layout) -> dict[str, Tensor]:
    x = full(layout)
    return {"ties": (x * 1.5).round().clamp(-1, 1), "zeros": x * 0, "negative": -x.abs() - 0.5}


def reductions(every: bool = False) -> list[str]:
    """What differs from one device; `every`: with all layouts and values, also those much like others."""
    wrong: list[str] = []
    line = mesh()
    rank = line.get_local_rank()
    for kind, layout in layouts(line.size()).items():
        if not every and kind in ("whole", "fused", "parts", "vector", "shared queries"):
            continue
        for filled, value in values(layout).items():
            if not every and filled != "ties" and kind != "padded":
                continue
            for name, function in REDUCTIONS.items():
                plain = nn.Parameter(value.clone())
                w = nn.Parameter(as_dtensor(layout.shard(value.clone(), rank), layout, line))
                DTensor.register_hook(w, _Ordered(layout, line))  # type: ignore[no-untyped-call]
                case, results = f"{kind}, {filled}, {name}", []
                try:
                    for p in (plain, w):
                        made = function(p)
                        results.append([x.detach() for x in whole(made)])
                        made = [x for x in tree_leaves(made) if x.requires_grad]
                        sum((x.sum() * (0.5 + i) for i, x in enumerate(made)), torch.zeros((), dtype=torch.float64)).backward()
                except Exception as error:
                    wrong.append(f"{case}: {type(error).__name__}: {error}")
                    continue
                if not all(map(same, *results)):
                    wrong.append(f"{case}: differs at {[i for i, p in enumerate(zip(*results, strict=True)) if not same(*p)]}")
                assert plain.grad is not None and isinstance(w.grad, LayoutDTensor)
                if not same(plain.grad, w.grad.full_tensor()):
                    wrong.append(f"{case}: the gradient differs")
                if any(bool(w.grad._local_tensor.narrow(layout.dim or 0, a, b - a).any()) for a, b in layout.padding(rank)):
                    wrong.append(f"{case}: padding has a gradient")
    return wrong


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
@pytest.mark.parametrize("world", swept([2, 3], 2))
def test_reductions_and_their_gradients(pool: Pool, world: int, every: bool) -> None:
    for wrong in pool.run(reductions, every, world=world):
        assert not wrong, "\n".join(wrong)


def parts() -> None:
    """What a rank takes of tensors that were made of a parameter and plain tensors has gradients, second ones too."""
    line = mesh()
    for kind, layout in layouts(line.size()).items():
        old = _old(full(layout))
        plain = nn.Parameter(full(layout))
        w = nn.Parameter(as_dtensor(layout.shard(full(layout), line.get_local_rank()), layout, line))
        made = (w * old).to_local()
        (first,) = torch.autograd.grad(made.pow(3).sum(), w, create_graph=True)
        first.to_local().sin().sum().backward()  # type: ignore[no-untyped-call]
        (wanted,) = torch.autograd.grad((plain * old).pow(3).sum(), plain, create_graph=True)
        wanted.sin().sum().backward()  # type: ignore[no-untyped-call]
        assert same(wanted.detach(), first.full_tensor().detach()), kind
        assert plain.grad is not None and w.grad is not None and same(plain.grad, w.grad.full_tensor()), kind
        number = (w * old).sum()
        assert isinstance(number, Summed)
        with pytest.raises(AutoTPError, match="can be made whole, not placed as"):
            number.redistribute(placements=[Shard(0)])
        with pytest.raises(AutoTPError, match="gradients that are whole only"):
            number.full_tensor(grad_placements=[Replicate()])


@pytest.mark.parametrize("world", swept([2, 3], 2))
def test_parts_and_their_gradients(pool: Pool, world: int) -> None:
    pool.run(parts, world=world)


def unmended(attribute: str) -> list[str]:
    """What differs where one part of the rules is left out."""
    kept = dispatch.with_dims, LayoutDTensor._clear_padding_
    whole_of = Numbers.full_tensor
    try:
        if attribute == "whole":
            Numbers.full_tensor = DTensor.full_tensor  # type: ignore[method-assign]
        elif attribute == "dims":
            dispatch.with_dims = lambda func, args, kwargs: (args, dict(kwargs))
        else:
            LayoutDTensor._clear_padding_ = lambda self: None  # type: ignore[method-assign]
        return reductions()
    finally:
        Numbers.full_tensor = whole_of  # type: ignore[method-assign]
        dispatch.with_dims, LayoutDTensor._clear_padding_ = kept  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attribute", "sign"),
    [("dims", "extremes: the gradient differs"), ("padding", "padding has a gradient"), ("whole", "made whole: RuntimeError")],
)
def test_the_comparison_sees_each_rule(pool: Pool, attribute: str, sign: str) -> None:
    assert any(sign in wrong for of_rank in pool.run(unmended, attribute) for wrong in of_rank)
