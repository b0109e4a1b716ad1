"""Distributed forms of norms and statistics against the operators themselves, values and gradients, two real ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autotp.plan.layout import Factor
from autotp.plan.model import Kernel
from autotp.rewrite.comm import GroupComm
from autotp.rewrite.convert import copy, gather, once, reduce, slice_part
from autotp.rewrite.kernels import run_kernel
from autotp.rewrite.split import Split
from tests.rewrite.plans import error, tp_mesh
from tests.support.ranks import Pool

N = 8


def kernels() -> dict[str, float]:
    """Error of value and gradient of each kernel on a tensor sharded on its last dim."""
    comm = GroupComm(tp_mesh().get_group())
    split = Split(-1, Factor("n", N, sharded=True), comm)
    torch.manual_seed(0)
    x, w, b, g = (torch.randn(*s).double() for s in ((3, N), (N,), (N,), (3, N)))
    half = N // comm.size

    cases: dict[str, tuple[Kernel, Callable[..., Tensor], tuple[object, ...], bool]] = {
        "mean": (Kernel.MEAN, torch.mean, (-1, True), False),
        "var": (Kernel.VAR, torch.var, (-1, False, True), False),
        "std": (Kernel.VAR, torch.std, (-1, True, True), False),
        "norm": (Kernel.VECTOR_NORM, torch.linalg.vector_norm, (2, -1, True), False),
        "tensor_norm": (Kernel.VECTOR_NORM, torch.Tensor.norm, (2, -1, True), False),
        "rms_norm": (Kernel.RMS_NORM, F.rms_norm, ((N,), "w", 1e-6), True),
        "layer_norm": (Kernel.LAYER_NORM, F.layer_norm, ((N,), "w", "b", 1e-5), True),
    }
    errors = {}
    for name, (kernel, func, rest, sharded) in cases.items():
        full = [t.clone().requires_grad_() for t in (x, w, b)]
        named = dict(zip("xwb", full, strict=True))
        wanted = func(full[0], *(named[r] if isinstance(r, str) else r for r in rest))
        grad = g if sharded else g[:, :1]
        (wanted * full[0] * grad).sum().backward() if not sharded else wanted.backward(grad)

        parts = {k: split.take(t.detach()).clone().requires_grad_() for k, t in named.items()}
        args = [parts[r] if isinstance(r, str) else (half,) if r == (N,) else r for r in rest]
        got = run_kernel(kernel, func, (parts["x"], *args), {}, comm, {})
        if sharded:
            got.backward(split.take(grad))
            value = gather(got.detach(), split)
        else:
            if kernel is Kernel.MEAN:
                got = reduce(got, comm)
            value = got.detach()
            (copy(got * 1, comm) * parts["x"] * grad).sum().backward()
        errors[name] = error(wanted.detach(), value)
        for k, t in named.items():
            if t.grad is not None:
                errors[f"{name}.{k}"] = error(t.grad, gather(parts[k].grad, split))
    return errors


def test_kernels(pool: Pool) -> None:
    for errors in pool.run(kernels):
        assert len(errors) == 7 + 5 + 2 + 3
        assert all(e <= 1e-12 for e in errors.values()), errors


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


def test_conversions(pool: Pool) -> None:
    pool.run(conversions)
