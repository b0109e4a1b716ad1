"""Operators on tokens in parts give what they give on whole tensors, with their gradients, and gather where they have to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autotp.errors import AutoTPError
from autotp.numeric.ranks import LocalComm, run_ranks
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.sequence.tokens import ParallelTokens, tokens_of

Operator = Callable[[Any], Any]


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, max(torch.Size(shape).numel(), 1), dtype=torch.float64).sin().view(shape)


def weight(*shape: int) -> Tensor:
    return numbers(*shape).requires_grad_()


#: They run on rows: no result is whole. `w` are plain tensors beside them, whose gradients are compared too.
ON_ROWS: dict[str, Operator] = {
    "residuals": lambda x: (x + x, x + 2 * x, torch.add(x, x, alpha=3), x.add(x)),
    "numbers": lambda x: (x * 2 - 1, 3 / (x + 4), -x, x**2, abs(x), 1 - x, x.clamp(-0.5, 0.5), x.pow(3)),
    "functions": lambda x: (x.exp(), x.tanh(), torch.sigmoid(x), F.silu(x), F.gelu(x, approximate="tanh"), F.relu(x), F.softplus(x)),
    "casts": lambda x: (x.float().double(), x.to(torch.float32).type_as(x), x.to(x), x.type(torch.float32), x.long(), x.bool()),
    "more functions": lambda x: (x.erf(), x.floor(), torch.round(x), x.lerp(x * 2, 0.3), torch.addcmul(x, x, x), x % 0.7, 2**x),
    "comparisons": lambda x: (x > 0, x.ge(0.5), torch.ne(x, x), (x > 0) & (x < 1), ~(x > 0), x == 0, torch.logical_or(x > 1, x < -1)),
    "rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w(6),
    "norms": lambda x: (F.layer_norm(x, (6,), w(6), w(6)), F.rms_norm(x, [6], w(6)), x / x.norm(dim=-1, keepdim=True)),
    "last dim": lambda x: (x.softmax(-1), F.log_softmax(x, 2), x.amax(-1, keepdim=True) * x, x.sum(-1, True) + x, x.var(-1, keepdim=True)),
    "products": lambda x: (F.linear(x, w(3, 6), w(3)), F.linear(x, w(6, 6)), x @ w(6, 2), torch.matmul(x, w(6, 4))),
    "weights": lambda x: (x * w(6) + w(1, 1, 6), x + w(1, 1), torch.where(x > 0, x, w(6)), x * w()),
    "of each token": lambda x: (x + w(*x.shape), x * w(*x.shape[:2], 1), x.masked_fill(numbers(*x.shape[:2], 1) > 0, 2.0), w(*x.shape) - x),
    "of each batch": lambda x: x * (1 + w(x.shape[0], 1, 6)) + w(x.shape[0], 1, 1),
    "of each place": lambda x: (x + w(x.shape[1], 6), x + w(1, x.shape[1], 1)),
    "rows of other shapes": lambda x: (x.view(-1, 6) * w(6), x.reshape(x.shape[0] * x.shape[1], 1, 6), x.flatten(0, 1).view(x.shape) + x),
    "widths": lambda x: (x[..., 1:4], x[:, :, ::2] + 0, *x.chunk(2, -1), *x.split([1, 5], dim=2), torch.cat([x, x * 2], -1)),
    "all": lambda x: (x[:, slice(None)] * 1, x[...] * 1),
    "aliases": lambda x: (x.contiguous(), x.detach(), x.clone()),
    "not dropped": lambda x: (F.dropout(x, 0.5, False), F.dropout(x, 0.0, True)),
}
#: They get the whole tensor.
WHOLE: dict[str, Operator] = {
    "tokens": lambda x: (x[:, 0], x[:, -1:], x[0], x[:, 1:, :], x.roll(1, 1), x.flip(1), x.select(1, 0)),
    "over tokens": lambda x: (x.mean(1), x.sum(), x.amax(0), x.softmax(1), x.std(), x.norm(), x.cumsum(1), x.mean(1, keepdim=True) + x),
    "dims": lambda x: (x.transpose(1, 2), x.permute(2, 0, 1), x.unsqueeze(1), x.mean(-1), x.view(-1), x.reshape(x.shape[0], -1)),
    "matrices": lambda x: (x @ x.mT, w(2, 3) @ w(3, x.shape[1]) @ x, torch.einsum("bsh,hk->bsk", x, w(6, 2)), torch.bmm(x, x.mT)),
    "joined": lambda x: (torch.cat([x, x], 1), torch.stack([x, x]), torch.cat([x[:, :1], x], 1)),
    "broadcast": lambda x: (x.unsqueeze(0) + w(2, 1, 1, 6), x[:, :1] + x, x.expand(x.shape[0], x.shape[1], 6), x.repeat(1, 2, 1)),
    "convolved": lambda x: F.conv1d(x.transpose(1, 2), w(6, 1, 2), groups=6, padding=1),
    "tests": lambda x: torch.tensor([bool((x > 0).all()), bool(torch.isnan(x).any()), torch.equal(x, x), x[0, 0, 0].item() > 0]),
    "over the last dim": lambda x: (x.var(-1, False), x.sort(-1).values, x.topk(2).values, x.argmax(-1)),
}
_HERE = threading.local()  # ranks are threads


def w(*shape: int) -> Tensor:
    """A weight that the test compares the gradient of."""
    made = weight(*shape)
    _HERE.made.append(made)
    return made


def weighted(results: Any) -> Tensor:
    """A number that every entry of the results moves otherwise."""
    total = torch.zeros((), dtype=torch.float64)
    for r in tree_leaves(results):
        total = total + (r.double() * torch.linspace(1, 2, r.numel(), dtype=torch.float64).view(r.shape)).sum()
    return total


def grads(operator: Operator, x: Tensor, leaf: Tensor) -> tuple[float, list[Tensor], bool]:
    """(value, gradients of the leaf and of the weights beside it, is a result whole?)."""
    leaf.grad = None
    _HERE.made = []
    results = operator(x)
    made = list(_HERE.made)
    value = weighted(results)
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    whole = any(not isinstance(r, ParallelTokens) for r in tree_leaves(results))
    return float(value.detach()), [torch.zeros_like(t) if t.grad is None else t.grad for t in (leaf, *made)], whole


def on_ranks(tp: int, work: Callable[[LocalComm], Any]) -> list[Any]:
    return run_ranks(tp, work, 60)


def compared(comm: LocalComm, shape: tuple[int, int], damage: float = 0) -> list[str]:
    """What differs."""
    kind, said = Rows(shape, comm), []
    for name, operator in {**ON_ROWS, **WHOLE}.items():
        whole = numbers(*shape, 6).requires_grad_()
        value, wanted, _ = grads(operator, whole, whole)
        leaf = kind.own(whole.detach()).clone().requires_grad_()
        got, found, is_whole = grads(operator, tokens_of(leaf, kind), leaf)
        parts = [found[0] - kind.own(wanted[0]), *(a - b for a, b in zip(found[1:], wanted[1:], strict=True))]
        far = max([abs(value - got), *((p + damage).abs().max().item() for p in parts if p.numel())])
        if not far <= 1e-9:
            said.append(f"{name}: {far} apart")
        if is_whole and name in ON_ROWS:
            said.append(f"{name}: a result is whole")
    return said


@pytest.mark.parametrize(("shape", "tp"), [((2, 4), 2), ((3, 5), 2), ((1, 5), 3), ((5, 1), 4), ((1, 7), 4)])
def test_operators(shape: tuple[int, int], tp: int) -> None:
    """With even rows, ragged ones, and ranks that hold none."""
    for said in on_ranks(tp, lambda comm: compared(comm, shape)):
        assert not said, "\n".join(said)
    seen = {line.partition(":")[0] for said in on_ranks(tp, lambda comm: compared(comm, shape, 1e-6)) for line in said}
    assert seen == {*ON_ROWS, *WHOLE}


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 7))
def test_rows(shape: list[int], width: int, tp: int, ones: int) -> None:
    """The parts of all ranks are the whole; sums of summands too; a tensor that broadcasts has the rows of what it stands for."""
    x = numbers(*shape, width)
    beside = numbers(*(1 if ones >> i & 1 else n for i, n in enumerate(shape)), width)

    def work(comm: LocalComm) -> bool:
        kind = Rows(tuple(shape), comm)
        part = kind.own(x)
        other = kind.beside(beside)
        assert other is not None and part.ndim == x.ndim
        return (
            torch.equal(kind.join(part), x)
            and torch.equal(kind.join(part > 0), x > 0)
            and torch.allclose(kind.sum(x * (comm.rank + 1)), part * tp * (tp + 1) / 2)
            and torch.equal(other.expand(part.shape), kind.own(beside.expand(x.shape)))
            and torch.equal(sum(comm.all_gather(kind.pad(part)), torch.zeros(())), x)  # type: ignore[arg-type]
        )

    assert on_ranks(tp, work) == [True] * tp


def test_dropout_draws_as_on_one_device() -> None:
    def work(comm: LocalComm) -> bool:
        kind, x = Rows((3, 5), comm), numbers(3, 5, 64)
        torch.manual_seed(7)
        wanted = F.dropout(x, 0.3)
        torch.manual_seed(7)
        found = F.dropout(tokens_of(kind.own(x), kind), 0.3)
        same = torch.equal(found.full_tensor(), wanted) and isinstance(found, ParallelTokens)  # type: ignore[attr-defined]
        return same and torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0))) is False

    assert all(on_ranks(2, work))


def changed(comm: LocalComm) -> list[bool]:
    """Changes in place: those of the tensor itself are made, those that another tensor would see are refused."""
    kind, x = Rows((2, 3), comm), numbers(2, 3, 4)
    found = []
    for change in (
        lambda t: t.add_(1),
        lambda t: t.__iadd__(numbers(2, 3, 4)),
        lambda t: t.mul_(numbers(4)),
        lambda t: t.masked_fill_(numbers(2, 3, 1) > 0, 3.0),
        lambda t: t.__setitem__((slice(None), 0), 2.0),
    ):
        wanted, leaf = (x * 1), kind.own(x).clone().requires_grad_()
        mine: Any = tokens_of(leaf, kind) * 1
        alias = mine
        change(wanted)
        change(mine)
        mine.sum().backward()
        found.append(torch.equal(alias.full_tensor(), wanted) and leaf.grad is not None)
    for refused in (lambda t: (t.view(-1, 4), t.add_(1)), lambda t: (t.detach().zero_(), t + 1), lambda t: F.relu(t, inplace=True)):
        try:
            refused(tokens_of(kind.own(x).clone().requires_grad_(), kind) * 1)
            found.append(False)
        except AutoTPError as error:
            found.append("hidden_states" in str(error))
    return found


def test_changes_in_place() -> None:
    assert on_ranks(2, changed) == [[True] * 8] * 2


def hooked(comm: LocalComm) -> list[float]:
    """Gradients of tokens, by hooks, `retain_grad` and `torch.autograd.grad`, are whole ones however the tokens are used."""
    kind, x = Rows((2, 3), comm), numbers(2, 3, 4)
    found = []
    for parallel in (False, True):
        leaf = (kind.own(x) if parallel else x).clone().requires_grad_()
        seen: list[Any] = []
        t: Any = (tokens_of(leaf, kind) if parallel else leaf) * 2
        t.register_hook(lambda g, seen=seen: seen.append(g.clone()))
        t.retain_grad()
        loss = (t * t).sum() + t[:, 0].sum() + (t + t).exp().mean(-1, keepdim=True).sum()
        (by_grad,) = torch.autograd.grad(loss, [t], retain_graph=True)
        loss.backward()
        seen += [t.grad, by_grad]
        u: Any = (tokens_of(leaf, kind) if parallel else leaf) * 3
        u.register_hook(lambda g: g * 0.5)
        leaf.grad = None
        (u * u).sum().backward()
        seen.append(tokens_of(leaf.grad, kind) if parallel else leaf.grad)  # type: ignore[arg-type]
        found.append([g.full_tensor() if isinstance(g, ParallelTokens) else g for g in seen])
    return [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]


def test_gradients_of_tokens() -> None:
    for found in on_ranks(2, hooked):
        assert len(found) == 5 and max(found) <= 1e-12


def second(comm: LocalComm) -> list[float]:
    """Gradients of gradients: through rows, entering and leaving."""
    from autotp.rewrite.collectives.conversions import copy

    kind, x, m = Rows((2, 3), comm), numbers(2, 3, 4), numbers(4, 4)
    results = []
    for parallel in (False, True):
        leaf = (kind.own(x) if parallel else x).clone().requires_grad_()
        t: Any = tokens_of(leaf, kind) if parallel else leaf
        h = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1)
        if parallel:
            from autotp.rewrite.sequence.tokens import scattered

            y = (copy(h, comm) @ m[:, comm.rank * 2 : comm.rank * 2 + 2]).tanh()  # column-parallel
            out: Any = t + scattered(y @ m[comm.rank * 2 : comm.rank * 2 + 2], kind)
        else:
            out = t + (h @ m).tanh() @ m
        (first,) = torch.autograd.grad((out * out).sum(), leaf, create_graph=True)
        squared = (first * first).sum()
        squared.backward()
        total = sum(comm.all_gather(squared.detach())) if parallel else squared.detach()  # each rank has its rows'
        results.append((total, leaf.grad))
    return [float((results[0][0] - results[1][0]).detach()), float((kind.own(results[0][1]) - results[1][1]).abs().max())]


def test_second_derivatives() -> None:
    assert all(max(map(abs, found)) <= 1e-9 for found in on_ranks(2, second))


def written_gradients(comm: LocalComm) -> list[float]:
    """Gradients that are kept may be changed, taken away and replaced."""
    kind, x = Rows((2, 3), comm), numbers(2, 3, 4)
    found = []
    for parallel in (False, True):
        leaf = (kind.own(x) if parallel else x).clone().requires_grad_()
        t: Any = (tokens_of(leaf, kind) if parallel else leaf) * 2
        t.retain_grad()
        seen: list[Any] = []
        for change in ("", "zero_", "mul_", "none", "assigned"):
            if change == "zero_":
                t.grad.zero_()
            elif change == "mul_":
                t.grad.mul_(0.5)
            elif change == "none":
                t.grad = None
            elif change == "assigned":
                t.grad = t.grad * 3
            (t * t).sum().backward(retain_graph=True)
            seen.append(t.grad.full_tensor().clone() if parallel else t.grad.clone())
        found.append(seen)
    return [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]


def test_gradients_may_be_written() -> None:
    assert on_ranks(2, written_gradients) == [[0.0] * 5] * 2


class Flipped(torch.autograd.Function):
    """Its backward gives whole gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.flip(1) * 2


class Dirty(torch.autograd.Function):
    """Changes its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        x.mul_(0.5)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 0.5


def functions(comm: LocalComm) -> list[Any]:
    kind, x = Rows((2, 3), comm), numbers(2, 3, 4)
    found: list[Any] = []
    for made in (lambda t: t, lambda t: t * 1):
        leaf, alone = kind.own(x).clone().requires_grad_(), x.clone().requires_grad_()
        t: Any = made(tokens_of(leaf, kind))
        u = made(alone)
        got = torch.autograd.grad((Flipped.apply(t) ** 2).sum(), [t])[0]
        wanted = torch.autograd.grad((Flipped.apply(u) ** 2).sum(), [u])[0]
        got = got.full_tensor() if isinstance(got, ParallelTokens) else got
        found.append(float((got - wanted).abs().max()))
    try:
        Dirty.apply(tokens_of(kind.own(x).clone().requires_grad_(), kind) * 1)
    except AutoTPError as error:
        found.append("no mark_dirty" in str(error))
    return found


def test_functions_of_users() -> None:
    assert on_ranks(2, functions) == [[0.0, 0.0, True]] * 2


def nodes(comm: LocalComm) -> list[Any]:
    """Hooks on nodes of the graph see whole gradients if they are there before the tokens are used, and are refused after."""
    kind, x = Rows((2, 3), comm), numbers(2, 3, 4)
    leaf, seen = kind.own(x).clone().requires_grad_(), []
    t: Any = tokens_of(leaf, kind) * 2
    t.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
    u: Any = tokens_of(leaf, kind) * 2
    torch.autograd.graph.register_multi_grad_hook([u], lambda grads: seen.append(grads[0].full_tensor()))
    (t.exp().sum() + (u * u).mean(-1, keepdim=True).sum()).backward()
    y = x.clone().requires_grad_()
    v = y * 2
    v.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
    w = y * 2
    torch.autograd.graph.register_multi_grad_hook([w], lambda grads: seen.append(grads[0]))
    (v.exp().sum() + (w * w).mean(-1, keepdim=True).sum()).backward()
    assert leaf.grad is not None and y.grad is not None
    used: Any = tokens_of(leaf, kind) * 2
    used.exp()
    try:
        torch.autograd.graph.get_gradient_edge(used)
        refused = ""
    except AutoTPError as error:
        refused = str(error)
    return [float((leaf.grad - kind.own(y.grad)).abs().max()), float((seen[0] - seen[1]).abs().max()), "were used before" in refused]


def test_nodes_of_the_graph() -> None:
    for found in on_ranks(2, nodes):
        assert max(found[:2]) <= 1e-12 and found[2]


def entered_again(comm: LocalComm) -> list[Any]:
    """What a region got is not kept past a change in place, and a view that was changed is told when the tokens enter or leave."""
    kind, x = Rows((2, 3), comm), numbers(2, 3, 4)
    t: Any = tokens_of(kind.own(x).clone().requires_grad_(), kind) * 1
    with torch.no_grad():
        t.enter()
        t.clamp_(min=0)
        found: list[Any] = [torch.equal(t.enter(), x.clamp(min=0))]
    for read in (lambda u: u.enter(), lambda u: u.full_tensor(), lambda u: F.layer_norm(u, (4,))):
        u: Any = tokens_of(kind.own(x).clone().requires_grad_(), kind) * 1
        u.select(1, 0).mul_(2.0)
        try:
            read(u)
            found.append(False)
        except AutoTPError as error:
            found.append("was changed in place" in str(error))
    return found


def test_what_was_read_before_a_change() -> None:
    assert on_ranks(2, entered_again) == [[True] * 4] * 2
