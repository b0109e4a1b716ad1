"""Distributed forms of norms and statistics against the operators themselves, values and gradients, two real ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autotp.errors import PlanError
from autotp.plan.conversions import Conversion, Op
from autotp.plan.expressions import Concat, Expr, Factor, Product, size
from autotp.plan.layout import Layout, padding
from autotp.plan.spec import DistributedForm
from autotp.rewrite.collectives.comm import DryComm, GroupComm
from autotp.rewrite.collectives.conversions import bind, copy, gather, once, reduce, slice_part
from autotp.rewrite.collectives.split import Split
from autotp.rewrite.operators.distributed import run_form
from autotp.rewrite.operators.statistics import Across
from tests.rewrite.plans import error, tp_mesh
from tests.support.ranks import Pool

HEADS = Factor("kv", 3, True, 2)  # over two ranks: kv heads 0, 0, 1 and 1, 2, 2
DIMS: dict[str, Expr] = {
    "even": Factor("n", 8, sharded=True),
    "padded": Factor("n", 7, sharded=True),
    "padded heads": Product((Factor("h", 3, sharded=True), Factor("d", 2))),
    "shared": Product((HEADS, Factor("d", 2))),
    "whole segment": Concat((Factor("h", 3, sharded=True), Factor("k", 2))),
}


def kernels(dim: str, told: bool = True) -> dict[str, float]:
    """Error of value and gradient of each kernel on a tensor sharded on its last dim; `told`: what of it counts."""
    comm = GroupComm(tp_mesh().get_group())
    expr = DIMS[dim]
    n, local = size(expr), size(expr, comm.size)
    split = Split(-1, expr, comm)
    across = Across(comm, expr) if told else None
    counts = split.own(torch.ones(n).double())
    torch.manual_seed(0)
    x, w, b, g = (torch.randn(*s).double() for s in ((3, n), (n,), (n,), (3, n)))

    cases: dict[str, tuple[DistributedForm, Callable[..., Tensor], tuple[object, ...], bool]] = {
        "mean": (DistributedForm.MEAN, torch.mean, (-1, True), False),
        "var": (DistributedForm.VAR, torch.var, (-1, False, True), False),
        "std": (DistributedForm.VAR, torch.std, (-1, True, True), False),
        "norm": (DistributedForm.VECTOR_NORM, torch.linalg.vector_norm, (2, -1, True), False),
        "tensor_norm": (DistributedForm.VECTOR_NORM, torch.Tensor.norm, (2, -1, True), False),
        "rms_norm": (DistributedForm.RMS_NORM, F.rms_norm, ((n,), "w", 1e-6), True),
        "layer_norm": (DistributedForm.LAYER_NORM, F.layer_norm, ((n,), "w", "b", 1e-5), True),
        "weight_norm": (DistributedForm.WEIGHT_NORM, torch._weight_norm, (g[:, :1], 0), True),
        "weight_norm of all": (DistributedForm.WEIGHT_NORM, torch._weight_norm, (g[0, 0], -1), True),
    }
    errors = {}
    for name, (kernel, func, rest, sharded) in cases.items():
        full = [t.clone().requires_grad_() for t in (x, w, b)]
        named = dict(zip("xwb", full, strict=True))
        wanted = func(full[0], *(named[r] if isinstance(r, str) else r for r in rest))
        grad = g if sharded else g[:, :1]
        (wanted * full[0] * grad).sum().backward() if not sharded else wanted.backward(grad)

        parts = {k: split.take(t.detach()).clone() for k, t in named.items()}
        for a, e in padding(expr, comm.rank, comm.size):
            parts["x"][:, a:e] = 7.0
        parts = {k: t.requires_grad_() for k, t in parts.items()}
        args = [parts[r] if isinstance(r, str) else (local,) if isinstance(r, tuple) else r for r in rest]
        got = run_form(kernel, func, (parts["x"], *args), {}, comm, {}, across)
        if sharded:
            got.backward(split.own(grad))
            value = gather(got.detach(), split)
        else:
            if kernel is DistributedForm.MEAN:
                got = reduce(got, comm)
            value = got.detach()
            (copy(got * 1, comm) * parts["x"] * counts * grad).sum().backward()
        errors[name] = error(wanted.detach(), value)
        for k, t in named.items():
            if t.grad is not None:
                errors[f"{name}.{k}"] = error(t.grad, comm.all_reduce(split.pad(parts[k].grad)))
    return errors


@pytest.mark.parametrize("dim", DIMS)
def test_kernels(pool: Pool, dim: str) -> None:
    for errors in pool.run(kernels, dim):
        assert len(errors) == 9 + 7 + 2 + 3
        assert all(e <= 1e-12 for e in errors.values()), errors


@pytest.mark.parametrize("dim", list(DIMS)[1:])
def test_statistics_are_wrong_where_nobody_says_what_counts(pool: Pool, dim: str) -> None:
    errors = pool.run(kernels, dim, False)[0]
    # Heads that are all held equally often leave a mean as it is.
    every = ("mean", "var", "std", "norm", "rms_norm", "layer_norm", "weight_norm", "weight_norm of all")
    wrong = ("norm", "tensor_norm") if dim == "shared" else every
    assert all(errors[name] > 1e-3 for name in wrong), errors


def test_a_statistic_has_to_cross_the_dim_of_the_plan() -> None:
    across = Across(DryComm(2), DIMS["padded"], -2)
    assert across.count(torch.ones(4, 3), (0, 1)) == 7 * 3
    assert across.count(torch.ones(5, 4, 3), (-2,)) == 7
    with pytest.raises(PlanError, match="does not cross dim -2"):
        across.count(torch.ones(4, 3), (-1,))
    with pytest.raises(PlanError, match="wants 4 entries in dim 0"):
        across.count(torch.ones(3, 3), (0,))
    with pytest.raises(PlanError, match="counted from the right"):
        Across(DryComm(2), DIMS["padded"], 0)


def lookups() -> None:
    """Rows with padding and shared rows: each id is found once."""
    comm = GroupComm(tp_mesh().get_group())
    for expr in DIMS.values():
        n = size(expr)
        table, ids = torch.randn(n, 3).double(), torch.arange(n).flip(0).view(1, n)
        layout = Layout((n, 3), (expr, Factor("e", 3)), comm.size)
        part = layout.shard(table, comm.rank).requires_grad_()
        found = run_form(DistributedForm.LOOKUP, F.embedding, (ids, part, n - 1), {}, comm, {id(part): layout})
        assert torch.equal(reduce(found.detach(), comm), F.embedding(ids, table))
        found.sum().backward()
        wanted = torch.ones(n, 3).double()
        wanted[n - 1] = 0
        whole = comm.all_reduce(Split(0, expr, comm).pad(part.grad))
        assert torch.equal(whole, wanted)


def test_lookups(pool: Pool) -> None:
    pool.run(lookups)


def conversions() -> None:
    """Values and gradients of each conversion by their definition."""
    comm = GroupComm(tp_mesh().get_group())
    split = Split(-1, Factor("n", 4, sharded=True), comm)
    rank = comm.rank
    x = torch.arange(4.0).requires_grad_()

    def grad_of(y: Tensor, weight: Tensor) -> list[float]:
        return torch.autograd.grad(y, x, weight)[0].tolist()

    ranked = torch.full((4,), rank + 1.0)
    assert grad_of(copy(x, comm), ranked) == [3.0] * 4
    assert reduce(x * (rank + 1), comm).tolist() == [0.0, 3.0, 6.0, 9.0]
    assert grad_of(reduce(x, comm), torch.ones(4)) == [1.0] * 4
    assert slice_part(x, split).tolist() == [2.0 * rank, 2.0 * rank + 1]
    assert grad_of(slice_part(x, split), torch.ones(2)) == [1.0 - rank, 1.0 - rank, float(rank), float(rank)]
    part = split.take(x.detach()).clone().requires_grad_()
    assert gather(part, split).tolist() == x.tolist()
    assert torch.autograd.grad(gather(part, split), part, torch.arange(4.0))[0].tolist() == [2.0 * rank, 2.0 * rank + 1]
    assert once(x, comm).tolist() == ([0.0, 1.0, 2.0, 3.0] if rank == 0 else [0.0] * 4)
    assert grad_of(once(x, comm), ranked) == [rank + 1.0] * 4
    second = torch.autograd.grad(reduce(x * x, comm).sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(second.sum(), x)[0].tolist() == [2.0] * 4
    whole = slice_part(torch.ones(1, requires_grad=True), split)  # it broadcasts
    assert whole.tolist() == [1.0]


def irregular_conversions() -> None:
    """Kv heads 0, 0, 1 on rank 0 and 1, 2, 2 on rank 1; five entries over two ranks."""
    comm = GroupComm(tp_mesh().get_group())
    split, padded = Split(-1, HEADS, comm), Split(-1, Factor("n", 5, sharded=True), comm)
    x, weight = torch.tensor([10.0, 20.0, 30.0], requires_grad=True), torch.tensor([1.0, 2.0, 4.0])
    part = slice_part(x, split)
    assert part.tolist() == [[10.0, 10.0, 20.0], [20.0, 30.0, 30.0]][comm.rank]
    assert torch.autograd.grad(part, x, weight)[0].tolist() == [[3.0, 4.0, 0.0], [0.0, 1.0, 6.0]][comm.rank]
    part = part.detach().requires_grad_()
    assert gather(part, split).tolist() == x.tolist()
    assert torch.autograd.grad(gather(part, split), part, weight)[0].tolist() == [[1.0, 0.0, 2.0], [0.0, 4.0, 0.0]][comm.rank]

    x, weight = torch.arange(5.0, requires_grad=True), torch.tensor([1.0, 2.0, 4.0])
    part = slice_part(x, padded)
    assert part.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 4.0]][comm.rank]
    assert torch.autograd.grad(part, x, weight)[0].tolist() == [[1.0, 2.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 2.0]][comm.rank]
    part = part.detach().requires_grad_()
    assert gather(part, padded).tolist() == x.tolist()
    assert torch.autograd.grad(gather(part, padded), part, torch.arange(1.0, 6.0))[0].tolist() == [[1, 2, 3], [4, 5, 0]][comm.rank]


def second_derivatives() -> None:
    """`x → slice → square → gather → sum cubed`, differentiated twice, against one device."""
    comm = GroupComm(tp_mesh().get_group())
    for expr in DIMS.values():
        split = Split(-1, expr, comm)
        x = torch.linspace(1, 2, size(expr), dtype=torch.float64).requires_grad_()

        def loss(t: Tensor) -> Tensor:
            return (t * torch.arange(1, t.numel() + 1)).sum() ** 3

        wanted = torch.autograd.grad(loss(x**2), x, create_graph=True)[0]
        second = torch.autograd.grad(wanted.square().sum(), x)[0]
        got = torch.autograd.grad(loss(gather(slice_part(copy(x, comm), split) ** 2, split)), x, create_graph=True)[0]
        assert error(wanted.detach(), got.detach()) < 1e-12
        assert error(second, torch.autograd.grad(got.square().sum(), x)[0]) < 1e-12


@pytest.mark.parametrize("check", [irregular_conversions, second_derivatives])
def test_conversions_with_padding_and_shared_indices(pool: Pool, check: Callable[[], None]) -> None:
    pool.run(check)


@pytest.mark.parametrize("op", Op)
def test_every_conversion_is_bound_to_its_own_function_or_to_none(op: Op) -> None:
    """HOLD and JOIN are halves of a sum of several tensors; a new conversion must not run as an old one."""
    conversion = Conversion(op, -1, DIMS["even"])
    if op in (Op.HOLD, Op.JOIN, Op.LAZY_GATHER, Op.SCATTER, Op.DISPATCH, Op.COMBINE):  # the last four are bound at modules' boundaries
        with pytest.raises(PlanError, match="no function of one tensor"):
            bind(conversion, DryComm(2))
        return
    functions = {Op.COPY: copy, Op.ENTER: copy, Op.REDUCE: reduce, Op.GATHER: gather, Op.SLICE: slice_part, Op.ONCE: once}
    assert bind(conversion, DryComm(2)).func is functions[op]


def test_conversions(pool: Pool) -> None:
    pool.run(conversions)
