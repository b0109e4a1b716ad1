"""Operators on tensors whose vocabulary is in parts give the values and gradients that they give whole ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from autotp.errors import AutoTPError
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.in_parts.tensor import InParts, parted
from autotp.rewrite.logits.logits import ParallelLogits
from autotp.rewrite.logits.vocabulary import Along, Vocabulary
from tests.support.ranks import Pool

Operator = Callable[[Tensor], Any]


def other(x: Tensor) -> Tensor:
    """A plain tensor of the same shape."""
    return torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape)


#: name → an operator of a tensor [3, 4, V] that stays in parts, or whose result is small. V comes last.
ON_PARTS: dict[str, Operator] = {
    "arithmetic": lambda x: (2 * x + 1 - x / 3) ** 2,
    "with a whole tensor": lambda x: x * other(x) + other(x)[0] - other(x)[:1, :1],
    "with a number a token": lambda x: x / other(x)[..., :1] + torch.tensor(2.0, dtype=torch.float64),
    "more dims": lambda x: x + torch.ones(2, 1, 1, 1, dtype=torch.float64),
    "masks": lambda x: x.masked_fill(other(x) > 1, 0.5).clamp(min=0.1),
    "where": lambda x: torch.where(other(x)[..., :1] > 1, x, -x),
    "dtypes": lambda x: x.to(torch.float32).double().type_as(other(x)),
    "clones": lambda x: x.clone().contiguous().detach() + x,
    "slices": lambda x: (x[:, 1:], x[0], x[..., -1:, :], x[None], x[:, 2], x[1:, ..., :]),
    "whole slice": lambda x: x[..., : x.shape[-1]],
    "lists": lambda x: x[[0, 2]],
    "tensors": lambda x: x[torch.tensor([0, 2, 1]), torch.tensor([1, 1, 3])],
    "boolean": lambda x: x[other(x)[..., 0] > 0.9],
    "transposed": lambda x: (x.transpose(1, 2), x.permute(2, 0, 1), x.movedim(-1, 0), x.transpose(0, -1)),
    "views": lambda x: (x.view(-1, x.size(-1)), x.reshape(2, 6, x.shape[-1]), x.flatten(0, 1), x.unsqueeze(0), x[:1].squeeze(0)),
    "pieces": lambda x: (*x.split(2, 1), *x.chunk(3), *x.unbind(0), x.narrow(1, 1, 2), x.select(1, 0)),
    "expanded": lambda x: x[:1].expand(2, -1, -1),
    "joined": lambda x: torch.cat([x, 2 * x], 1),
    "sums": lambda x: (x.sum(), x.sum(-1), x.sum((0, 2), keepdim=True), x.mean(), x.mean(-1, keepdim=True)),
    "sums over others": lambda x: (x.sum(0), x.mean(1, keepdim=True), x.sum((0, 1))),
    "logsumexp": lambda x: (x.logsumexp(-1), torch.logsumexp(x, 2, keepdim=True)),
    "softmax": lambda x: (x.softmax(-1), F.softmax(x, dim=2), torch.softmax(x, -1), F.softmax(x, -1, dtype=torch.float64)),
    "log_softmax": lambda x: (x.log_softmax(-1), F.log_softmax(x, -1), torch.log_softmax(x, 2)),
    "gather": lambda x: x.gather(-1, torch.arange(12).view(3, 4, 1) % x.shape[-1]),
    "argmax": lambda x: (x.argmax(-1), torch.argmax(x, 2, keepdim=True)),
    "nll": lambda x: F.nll_loss(x.flatten(0, 1), torch.arange(12) % x.shape[-1], weight=other(x)[0, 0]),
    "shapes": lambda x: torch.tensor([x.dim(), x.numel(), len(x), *x.shape]),
}
#: They get the whole tensor.
WHOLE: dict[str, Operator] = {
    "other indices": lambda x: (x[..., 1], x[..., 1:3], x[..., torch.tensor([0, 1])], x[0, 1, 2], x[..., ::2]),
    "sorted": lambda x: (x.sort(-1).values, x.topk(2).values, x.cumsum(-1), x.flip(-1), x.roll(1, -1)),
    "norms": lambda x: (x.norm(), x.std(-1), x.amax(-1), x.max(), x.prod(-1)),
    "products": lambda x: (x @ torch.ones(x.shape[-1], 2, dtype=torch.float64), torch.outer(x[0, 0], x[0, 1])),
    "other softmax": lambda x: (x.softmax(0), x.log_softmax(1), x.logsumexp((1, 2)), x.argmax()),
    "other views": lambda x: (x.flatten(), x.view(-1), x.flatten(1), x.repeat(1, 2, 2), x.squeeze(), x.split(1, -1)[0]),
    "joined along": lambda x: (torch.cat([x, x], -1), torch.stack([x, x])),
    "two places": lambda x: x[:, :, : x.shape[-1]] + x.flatten(0, 1)[:4].unsqueeze(0) + (x[:1, :1] * x[:1, :1].mT).sum(),
    "places": lambda x: torch.where(torch.isnan(x / x)),
    "tests": lambda x: torch.tensor([bool((x > 0).all()), bool(torch.isnan(x).any()), torch.equal(x, x)]),
}


def in_half() -> list[float]:
    """Errors of half precision beside float64, as a multiple of those of torch's own operator."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    vocabulary = Vocabulary(44, 22, GroupComm(mesh.get_group(), mesh), mesh)
    x = (torch.linspace(-4, 4, 200 * 44, dtype=torch.float64).view(200, 44).sin() * 3 + 10).to(torch.bfloat16)
    parts = parted(ParallelLogits, Along(1, vocabulary), x[:, vocabulary.start : vocabulary.start + 22].contiguous())
    targets = torch.arange(200) % 44
    found = []
    for operator in (
        lambda t: t.softmax(-1),
        lambda t: t.log_softmax(-1),
        lambda t: t.logsumexp(-1),
        lambda t: F.cross_entropy(t, targets, reduction="none"),
        lambda t: t.mean(),
    ):
        exact, own, got = operator(x.double()), operator(x), operator(parts)
        assert got.dtype is own.dtype is torch.bfloat16
        got = got.full_tensor() if isinstance(got, DTensor) else got
        found.append(float((got - exact).abs().max() / (own - exact).abs().max().clamp(min=1e-9)))
    return found


def test_half_precision_is_rounded_once(pool: Pool) -> None:
    for found in pool.run(in_half):
        assert max(found) <= 1.5, found


def weighted(results: Any) -> Tensor:
    """A number that every entry of the results moves otherwise."""
    total = torch.zeros((), dtype=torch.float64)
    for r in tree_leaves(results):
        r = r.full_tensor() if isinstance(r, DTensor) else r
        total = total + (r.double() * torch.linspace(1, 2, r.numel(), dtype=torch.float64).view(r.shape)).sum()
    return total


def grads(operator: Operator, x: Tensor, leaf: Tensor) -> tuple[float, Tensor, bool]:
    """(value, gradient of the leaf, is a result plain that has the leaf's vocabulary?)."""
    leaf.grad = None
    results = operator(x)
    value = weighted(results)
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    size = x.shape[-1]
    plain = any(not isinstance(r, InParts) and size in r.shape for r in tree_leaves(results))
    return float(value), torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, plain


def compared(entries: int, damage: int = 0) -> list[str]:
    """What differs, of a vocabulary of so many entries over all ranks."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    vocabulary = Vocabulary(entries, -(-entries // mesh.size()), GroupComm(mesh.get_group(), mesh), mesh)
    said = []
    for name, operator in {**ON_PARTS, **WHOLE}.items():
        whole = torch.linspace(-1, 1, 12 * entries, dtype=torch.float64).view(3, 4, entries).sin().requires_grad_()
        wanted = grads(operator, whole, whole)
        start, held = vocabulary.start, vocabulary.held
        leaf = whole.detach()[..., start : start + held].clone().requires_grad_()
        value, grad, plain = grads(operator, parted(ParallelLogits, Along(2, vocabulary), leaf), leaf)
        here = wanted[1][..., start : start + held]
        far = max([abs(value - wanted[0]), *(grad - here + damage).abs().flatten().tolist()])
        if not far <= 1e-9:
            said.append(f"{name}: {far} apart")
        if plain and name in ON_PARTS:
            said.append(f"{name}: a result is whole")
    return said


@pytest.mark.parametrize(("entries", "tp"), [(7, 3), (5, 4), (13, 2)])
def test_operators(pool: Pool, entries: int, tp: int) -> None:
    """With padding, and with ranks that hold one entry, or none."""
    for said in pool.run(compared, entries, world=tp):
        assert not said, "\n".join(said)


def no_dims() -> list[str]:
    """Dims that a tensor does not have are torch's errors, as on one device."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    vocabulary = Vocabulary(4, 2, GroupComm(mesh.get_group(), mesh), mesh)
    x = parted(ParallelLogits, Along(2, vocabulary), torch.ones(3, 4, 2))
    accepted = []
    for name in ("softmax", "logsumexp", "sum", "argmax", "squeeze"):
        try:
            getattr(x, name)(5)
            accepted.append(name)
        except IndexError:
            pass
    with pytest.raises(AutoTPError, match="another shape in place"):
        x.unsqueeze_(0)
    return accepted


def test_dims_that_are_none(pool: Pool) -> None:
    assert pool.run(no_dims) == [[], []]


def test_wrong_gradients_are_noticed(pool: Pool) -> None:
    assert all(len(said) >= len(ON_PARTS) - 1 for said in pool.run(compared, 7, 1))
