"""Whatever users do with a parameter outside of a forward is what it is on one device, or is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_leaves

from autotp.errors import AutoTPError
from autotp.plan.expressions import Concat, Factor, Product
from autotp.plan.layout import Layout, replicated
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.parameters.full import unshard
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.make import as_dtensor
from tests.support.ranks import Pool, mesh
from tests.support.slow import halved, swept


def layouts(tp: int) -> dict[str, Layout]:
    """One of each kind for tensors [12, 6] (or [6, 12])."""
    rows, width = Factor("rows", 12, True), Factor("width", 6)
    piece = Product((Factor("kv", 1), Factor("heads", 2, True), Factor("d", 2)))
    kinds = {
        "whole": replicated((12, 6), tp),
        "rows": Layout((12, 6), (rows, width), tp),
        "columns": Layout((6, 12), (width, rows), tp),
        "fused": Layout((12, 6), (Product((Factor("three", 2), Factor("x", 6, True))), width), tp),
        "padded": Layout((10, 6), (Product((Factor("heads", 5, True), Factor("d", 2))), width), tp),
        "parts": Layout((12, 6), (Concat((piece, piece, piece)), width), tp),
        "vector": Layout((12,), (rows,), tp),
    }
    kv, group = Factor("kv", 3, True, pieces=2), Factor("group", 2, True, pieces=2, of="kv")
    if tp == 2:
        kinds["shared"] = Layout((6, 6), (Product((Factor("kv", 3, True, pieces=2), Factor("d", 2))), width), tp)
        kinds["shared queries"] = Layout((12, 6), (Product((kv, group, Factor("d", 2))), width), tp)
    return kinds


def whole(tree: Any) -> list[Any]:
    """The leaves of a result, DTensors whole."""
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in tree_leaves(tree)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
        )
    return math.isclose(a, b, rel_tol=1e-12) if isinstance(a, float) else bool(a == b)


def full(layout: Layout) -> Tensor:
    return torch.randn(layout.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def other(x: Tensor, seed: int = 2) -> Tensor:
    """A plain whole tensor that goes with the whole `x`."""
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


#: Functions of (a parameter, the plain whole tensor).
READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "statistics": lambda w, x: (
        w.std(),
        w.var(0),
        w.mean(),
        w.mean(-1),
        torch.var_mean(w),
        w.median(),
        w.sum(),
        w.sum(0),
        w.sum(-1, keepdim=True),
    ),
    "extremes": lambda w, x: (w.max(), w.min(), w.amax(0), w.argmax(), w.abs().max(), w.topk(2, 0), w.sort(0)[0], w.flatten().kthvalue(3)),
    "norms": lambda w, x: (
        w.norm().pow_(2).add_(1),
        x.sum().mul_(w.sum()),
        w.norm(),
        w.norm(p=1),
        w.norm(dim=-1),
        torch.linalg.vector_norm(w, float("-inf")),
        w.norm(p=float("inf")),
    ),
    "shifted": lambda w, x: (w.cos().sum(), (w + 1).norm(), w.exp().mean(), (w * 0 + 2).std(), torch.ones_like(w).sum()),
    "parts": lambda w, x: (
        w[0],
        w[-1],
        w[-3:],
        w[1:5],
        w[::2],
        w[w > 0],
        w[torch.tensor([3, 0])],
        list(w)[:2],
        w.chunk(2)[1],
        w.unbind(0)[1],
    ),
    "shapes": lambda w, x: (
        w.t(),
        w.T,
        w.view(-1),
        w.flatten(),
        w.reshape(2, -1),
        w.unsqueeze(0),
        w.view(-1)[5],
        w.t()[0],
        w.flip(0),
        w.roll(1, 0),
    ),
    "with whole ones": lambda w, x: (
        w + x,
        x - w,
        w * x,
        torch.cat([w, x]),
        torch.stack([x, w]),
        torch.where(w > x, w, x),
        w.T @ x,
        x.T @ w,
    ),
    "compared": lambda w, x: (
        torch.equal(w, w),
        torch.equal(w, x),
        torch.allclose(w, w),
        torch.allclose(x, w),
        (w == w).all(),
        (w != x).any(),
    ),
    "broadcast": lambda w, x: (w + x[0], w * x[..., :1], w - w.mean(0), w / w.norm(dim=-1, keepdim=True)),
    "of two": lambda w, x: ((w * w).sum(), torch.dot(w.flatten(), w.flatten()), torch.cat([w, w]), torch.cat([w.view(-1), w.view(-1)])),
    "numbers": lambda w, x: (
        w.sum().item(),
        w[1].sum().item(),
        float(w.flatten()[3]),
        f"{w.sum():.6f} {w[0].sum():.6f}",
        w.isnan().any().item(),
        w.count_nonzero(),
    ),
    "outside of torch": lambda w, x: (
        w.tolist(),
        w[1].tolist(),
        w.sum(0).tolist(),
        w.norm().tolist(),
        torch.tensor(w.detach().numpy().copy()),
        torch.tensor(np.asarray(w.detach()) + 1),
        torch.tensor(np.where(w.detach().flip(0) > 0, 1.0, 2.0)),
        torch.tensor(w.sum(-1).detach().numpy(force=True).copy()),
        torch.tensor(w.tolist()),
    ),
    "new": lambda w, x: (torch.zeros_like(w), w.clone(), w.float(), w.new_zeros(3), w.detach() * 2, w.double().neg().abs()),
    "into a plain one": lambda w, x: (x.clone().copy_(w), torch.zeros_like(x).add_(w), x.clone().lerp_(w, 0.5)),
    "foreach": lambda w, x: (
        torch._foreach_mul([w, w], 2),
        torch._foreach_add([w], [x]),
        torch._foreach_norm([w]),
        torch._foreach_max([w]),
    ),
}


def _set(w: Any, at: Any, value: Any) -> None:
    w[at] = value


#: Functions that write.
WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "row": lambda w, x: w[5].zero_(),
    "rows": lambda w, x: _set(w, slice(-3, None), 7.0),
    "rows of another": lambda w, x: _set(w, slice(1, 4), x[1:4]),
    "rows by number": lambda w, x: _set(w, torch.tensor([0, 4]), x[0]),
    "chosen": lambda w, x: _set(w, w > 0, 0.25),
    "masked": lambda w, x: w.masked_fill_(x > 0, 3.0),
    "column": lambda w, x: w.t()[0].fill_(2.0),
    "view of a view": lambda w, x: w[2:].view(-1)[1::2].mul_(-1),
    "first": lambda w, x: w.view(-1)[0].fill_(9.0),
    "data": lambda w, x: w.data[3].add_(1),
    "copied": lambda w, x: w.copy_(x),
    "added": lambda w, x: w.add_(x, alpha=0.5).mul_(2).clamp_(-1, 1),
    "shifted": lambda w, x: w.add_(1),
    "filled": lambda w, x: (w.zero_(), w.fill_(2.0), w[0].copy_(x[0])),
    "sorted in place": lambda w, x: w.copy_(w.sort(0)[0]),
    "index_add": lambda w, x: w.index_add_(0, torch.tensor([1, 2]), x[:2]),
    "foreach": lambda w, x: torch._foreach_add_([w], [x]),
    "lists": lambda w, x: (torch._foreach_mul_([w, w.view(-1)[:2]], 3.0),),
    "out": lambda w, x: torch.mul(x, 2, out=w),
    "assigned": lambda w, x: setattr(w, "data", x),
    "assigned another": lambda w, x: setattr(w, "data", w.detach() * 3),
    "split": lambda w, x: w.chunk(2)[1].zero_(),
}


def on_all_layouts(write: bool) -> list[str]:
    functions = WRITES if write else READS
    wrong: list[str] = []
    line = mesh()
    for kind, layout in layouts(line.size()).items():
        for name, function in functions.items():
            plain = full(layout)
            x = other(plain)
            with torch.no_grad():
                w = nn.Parameter(as_dtensor(layout.shard(plain.clone(), line.get_local_rank()), layout, line))
                try:
                    wanted = function(plain, x)
                except (IndexError, RuntimeError):
                    continue
                try:
                    got = function(w, x)
                except Exception as error:
                    wrong.append(f"{kind}, {name}: {type(error).__name__}: {error}")
                    continue
                if write:
                    wanted, got = (plain, tree_leaves(wanted)), (w, tree_leaves(got))
                    padding = [
                        float(w._local_tensor.narrow(layout.dim, a, b - a).abs().max()) for a, b in layout.padding(line.get_local_rank())
                    ]
                    if any(padding):
                        wrong.append(f"{kind}, {name}: padding became {padding}")
                    if not same(plain, full(layout)) and same(full(layout), w.full_tensor()):
                        wrong.append(f"{kind}, {name}: the write was lost")
                a, b = whole(wanted), whole(got)
                if len(a) != len(b) or not all(map(same, a, b)):
                    wrong.append(f"{kind}, {name}: differs at {[i for i, p in enumerate(zip(a, b, strict=False)) if not same(*p)]}")
    return wrong


@pytest.mark.parametrize("world", halved([2, 3]))
@pytest.mark.parametrize("write", [False, True])
def test_operators_give_what_they_give_on_one_device(pool: Pool, write: bool, world: int) -> None:
    for wrong in pool.run(on_all_layouts, write, world=world):
        assert not wrong, "\n".join(wrong)


#: Differentiable functions of a parameter, made into a scalar.
LOSSES: dict[str, Callable[[Any, Tensor], Any]] = {
    "decay": lambda w, x: w.pow(2).sum() * 0.1 + x.sum(),
    "norm": lambda w, x: x.sum() + w.norm(),
    "sum": lambda w, x: w.sum() + x.sum(),
    "product": lambda w, x: (x[..., :3].T @ w).pow(2).sum() if w.ndim > 1 else (w @ x) ** 2,
    "transposed": lambda w, x: (w.T.sin() @ x).sum(),
    "parts": lambda w, x: (w[1:3] * w[-1]).sum() + w[5].sum(),
    "flat": lambda w, x: (w.view(-1)[1:] * w.view(-1)[:-1]).sum(),
    "statistics": lambda w, x: w.std() + w.mean() + w.var(0).sum(),
    "with a whole one": lambda w, x: (w * x).sin().sum(),
    "joined": lambda w, x: torch.cat([w, x, w]).pow(3).sum(),
}
HOOKS: dict[str, Callable[[Any], Any]] = {
    "scaled": lambda g: 0.1 * g,
    "centred": lambda g: g - g.mean(),
    "flipped": lambda g: g.flip(0),
    "row": lambda g: g.clone().index_fill_(0, torch.tensor([1]), 0.0),
    "written": lambda g: (g[2:].zero_(), None)[1],
    "read": lambda g: (g.std(), None)[1],
    "clipped": lambda g: g / g.norm(),
}


def gradients() -> list[str]:
    wrong: list[str] = []
    line = mesh()
    cases = [(name, loss, None) for name, loss in LOSSES.items()] + [(n, LOSSES["parts"], hook) for n, hook in HOOKS.items()]
    for kind, layout in layouts(line.size()).items():
        for name, loss, hook in cases:
            plain = nn.Parameter(full(layout))
            w = nn.Parameter(as_dtensor(layout.shard(plain.detach().clone(), line.get_local_rank()), layout, line))
            x = other(plain)
            grads = []
            for p in (plain, w):
                if hook is not None:
                    p.register_hook(hook)
                for _ in range(2):
                    try:
                        value = loss(p, x)
                    except IndexError:
                        break
                    value.backward()
                grads.append(p.grad)
            if not grads[0] is grads[1] is None and not same(grads[0], unshard(w.grad, layout, GroupComm(line.get_group()))):
                wrong.append(f"{kind}, {name}: the gradient differs")
            optimizers = [torch.optim.AdamW([p], lr=0.1, weight_decay=0.0) for p in (plain, w)]
            for optimizer in optimizers:
                optimizer.step()
            if not same(plain.detach(), w.full_tensor().detach()):
                wrong.append(f"{kind}, {name}: differs after a step")
    return wrong


@pytest.mark.parametrize("world", swept([2, 3], 2))
def test_gradients_of_what_users_compute(pool: Pool, world: int) -> None:
    for wrong in pool.run(gradients, world=world):
        assert not wrong, "\n".join(wrong)


INITIALISERS: dict[str, Callable[[Any], Any]] = {
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "truncated": nn.init.trunc_normal_,
    "uniform": nn.init.uniform_,
    "kaiming": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
    "eye": nn.init.eye_,
    "sparse": lambda w: nn.init.sparse_(w, 0.5),
    "constant": lambda w: nn.init.constant_(w, 3.0),
    "data": lambda w: w.data.normal_(),
    "noise": lambda w: w.data.add_(torch.randn_like(w)),
    "dropped": lambda w: w.data.copy_(torch.nn.functional.dropout(w.data, 0.5)),
    "drawn by number": lambda w: w.data.bernoulli_(0.3),
}


def initialised(seed_by_rank: bool) -> list[str]:
    wrong: list[str] = []
    line = mesh()
    for kind, layout in layouts(line.size()).items():
        for name, function in INITIALISERS.items():
            if seed_by_rank and name == "sparse":  # it draws indices that no parameter knows of
                continue
            if len(layout.shape) < 2 and name not in ("normal", "uniform", "constant", "data", "noise"):
                continue
            plain = nn.Parameter(full(layout))
            w = nn.Parameter(as_dtensor(layout.shard(plain.detach().clone(), line.get_local_rank()), layout, line))
            torch.manual_seed(3)
            function(plain)
            torch.manual_seed(3 + seed_by_rank * line.get_local_rank())
            function(w)
            if not same(plain.detach(), w.full_tensor().detach()):
                wrong.append(f"{kind}, {name}")
    return wrong


@pytest.mark.parametrize("seed_by_rank", [False, True])
def test_initialising_draws_the_whole_and_rank_0_decides(pool: Pool, seed_by_rank: bool) -> None:
    for wrong in pool.run(initialised, seed_by_rank):
        assert not wrong, "\n".join(wrong)


def refused() -> list[str]:
    """What cannot be told apart from a mistake names what to do."""
    wrong: list[str] = []
    line = mesh()
    for kind, layout in layouts(line.size()).items():
        if layout.dim is None:
            continue
        w = nn.Parameter(as_dtensor(layout.shard(full(layout), line.get_local_rank()), layout, line))
        part = torch.zeros(layout.local_shape, dtype=torch.float64)
        even = distribute_tensor(torch.zeros(layout.shape, dtype=torch.float64), line, [Shard(1 - layout.dim if w.ndim > 1 else 0)])
        attempts: dict[str, Callable[[], object]] = {"part": lambda w=w, part=part: setattr(w, "data", part)}
        if tuple(part.shape) != layout.shape:
            attempts["copied part"] = lambda w=w, part=part: w.detach().copy_(part)
        if w.ndim > 1:
            attempts["another placement"] = lambda w=w, even=even: setattr(w, "data", even)
        attempts["shared memory"] = lambda w=w: torch.from_dlpack(w.detach())
        attempts["local view"] = lambda w=w: w.detach()[0].to_local()
        for name, attempt in attempts.items():
            if name == "part" and tuple(part.shape) == layout.shape:
                continue
            try:
                attempt()
                wrong.append(f"{kind}, {name}")
            except AutoTPError as error:
                if len(str(error)) <= 40:
                    wrong.append(f"{kind}, {name}: {error}")
        with pytest.raises(ValueError, match="read-only"):  # it would be in no part
            w.detach().numpy()[0] = 1.0
        replicated_one = distribute_tensor(other(full(layout)), line, [Replicate()])
        w.data = replicated_one
        assert type(w) is LayoutDTensor and same(w.full_tensor().detach(), other(full(layout)))
    return wrong


def test_parts_are_not_taken_for_whole_tensors(pool: Pool) -> None:
    for wrong in pool.run(refused):
        assert not wrong, "\n".join(wrong)


def vectors() -> None:
    line = mesh()
    kinds = layouts(line.size())
    plain = [nn.Parameter(full(layout)) for layout in kinds.values()]
    laid = [
        nn.Parameter(as_dtensor(k.shard(p.detach().clone(), line.get_local_rank()), k, line))
        for p, k in zip(plain, kinds.values(), strict=True)
    ]
    to, back = torch.nn.utils.parameters_to_vector, torch.nn.utils.vector_to_parameters
    assert same(to(plain).detach(), to(laid).full_tensor().detach())
    for ps in (plain, laid):
        back(to(ps).detach() * 2, ps)
    assert all(same(p.detach(), w.full_tensor().detach()) for p, w in zip(plain, laid, strict=True))
    back(to(plain).detach() * 2, laid)
    assert all(same(2 * p.detach(), w.full_tensor().detach()) for p, w in zip(plain, laid, strict=True))


def test_parameters_as_vectors(pool: Pool) -> None:
    pool.run(vectors)
    pool.run(vectors, world=3)
