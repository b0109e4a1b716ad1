"""Training with padding and shared indices equals training on one device: weights, norms, and padding that stays zero."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.plan.spec import GradSum, ModulePlan, ParamPlan
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.modules import linear
from autotp.rewrite.parameters import reads
from autotp.rewrite.parameters.full import full_grads, full_state_dict
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from tests.rewrite.plans import error, rewrite, worst_grad
from tests.rewrite.uneven import Uneven, uneven_plan
from tests.support.ranks import Pool
from tests.support.slow import in_turns

IDS = torch.tensor([[1, 5, 9, 10, 8], [2, 3, 4, 7, 0]])
CASES = [(2, 3, 2, 4), (3, 3, 2, 2)]  # kv heads, query heads of each, pieces, ranks
Step = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Step] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


def made(kv: int, group: int, pieces: int, drop: str = "") -> tuple[Uneven, Uneven, dict[str, ParamPlan], GroupComm]:
    """The model on one device and over all ranks; `drop` names what a negative control leaves out."""
    reference, model = Uneven(kv, group), Uneven(kv, group)
    tp = torch.distributed.get_world_size()
    params, modules = uneven_plan(model, tp, pieces)

    def without(m: ModulePlan) -> ModulePlan:
        uses = tuple(replace(u, grad=GradSum.NONE) if drop == "sums" else u for u in m.uses)
        return replace(m, uses=uses, sites=tuple(replace(s, over=None) if drop == "over" else s for s in m.sites))

    comm, undo = rewrite(model, params, [without(m) for m in modules])
    undo.release()
    return reference, model, params, comm


def loss_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flip(1).flatten())


@contextmanager
def without_zeros(drop: str) -> Iterator[None]:
    """A negative control: padding keeps what gradient it gets."""
    own, clear = reads.GradFix.__init__, LayoutDTensor._clear_padding_

    def init(self: reads.GradFix, *args: Any) -> None:
        own(self, *args)
        self.padding = ()

    try:
        if drop == "zeros":
            reads.GradFix.__init__ = init  # type: ignore[method-assign]
            LayoutDTensor._clear_padding_ = lambda self: None  # type: ignore[method-assign]
        yield
    finally:
        reads.GradFix.__init__, LayoutDTensor._clear_padding_ = own, clear  # type: ignore[method-assign]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def largest_padding(model: nn.Module, params: dict[str, ParamPlan], rank: int) -> float:
    found = [0.0]
    for name, p in model.named_parameters():
        layout = params[name].layout
        found += [float(p._local_tensor.detach().narrow(layout.dim, a, b - a).abs().max()) for a, b in layout.padding(rank)]
    return max(found)


def training(kind: str, kv: int, group: int, pieces: int, drop: str = "") -> dict[str, float]:
    """Errors after three clipped steps, each of two batches."""
    with without_zeros(drop):
        return three_steps(kind, made(kv, group, pieces, drop))


def three_steps(kind: str, models: tuple[nn.Module, nn.Module, dict[str, ParamPlan], Any]) -> dict[str, float]:
    reference, model, params, comm = models
    errors, norms = {}, []
    with torch.no_grad():
        errors["inference"] = error(reference(IDS), model(IDS))
    for m in (reference, model):
        optimizer = OPTIMIZERS[kind](list(m.parameters()))
        for _ in range(3):
            for ids in (IDS, IDS.roll(2, 1)):
                loss_of(m, ids).backward()
            norms.append(whole(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach="foreach" in kind)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=kind != "sgd")
    errors["norm"] = max(error(a, b) for a, b in zip(norms[:3], norms[3:], strict=True))
    full = full_state_dict(model, params, comm)
    errors["weights"] = max(error(v, full[k]) for k, v in reference.state_dict().items())
    errors["padding"] = largest_padding(model, params, comm.rank)
    return errors


@pytest.mark.parametrize(("kind", "case"), in_turns(OPTIMIZERS, CASES))
def test_three_steps_are_those_of_one_device(pool: Pool, kind: str, case: tuple[int, int, int, int]) -> None:
    kv, group, pieces, world = case
    for errors in pool.run(training, kind, kv, group, pieces, world=world):
        assert errors["padding"] == 0.0
        assert all(e <= 1e-9 for e in errors.values()), errors


@pytest.mark.parametrize(("drop", "fails"), [("sums", "weights"), ("zeros", "padding"), ("over", "inference")])
def test_negative_controls(pool: Pool, drop: str, fails: str) -> None:
    errors = pool.run(training, "adamw", 3, 3, 2, drop)
    assert max(e[fails] for e in errors) > 1e-6, errors


def norms(as_one_device: bool = True) -> dict[str, float]:
    """Errors of gradient norms of every kind; not `as_one_device`: of gradients that are ordinary DTensors."""
    reference, model, params, comm = made(3, 3, 2)
    for m in (reference, model):
        loss_of(m).backward()
    errors = {"grad": worst_grad(reference, model, params, comm)}
    grads = [[p.grad for p in m.parameters()] for m in (reference, model)]
    layouts = [params[n].layout for n, _ in model.named_parameters()]
    assert {type(g) for g in grads[1]} == {LayoutDTensor}
    assert sum(layout.is_shared for layout in layouts) == 6
    if not as_one_device:
        grads[1] = [DTensor(g._local_tensor, g._spec, requires_grad=False) for g in grads[1]]
    for order in (1, 2, 3, float("inf")):
        for foreach in (False, True):
            a, b = (torch.nn.utils.get_total_norm(g, order, foreach=foreach) for g in grads)
            errors[f"{order} {foreach}"] = error(a, whole(b))
    by_hand: list[Callable[[Tensor], Tensor]] = [
        lambda g: g.norm(), lambda g: g.norm(p=1), lambda g: g.pow(2).sum(), lambda g: g.clone().mul(2).norm(), lambda g: g.float().norm(),
        lambda g: torch.linalg.vector_norm(g, 2, tuple(range(g.ndim))), lambda g: g.abs().max(),
    ]  # fmt: skip
    for i, fn in enumerate(by_hand):
        errors[f"by hand {i}"] = max(error(fn(a).double(), whole(fn(b)).double()) for a, b in zip(*grads, strict=True)) * (
            1e-3 if i == 4 else 1
        )
    return errors


def test_norms(pool: Pool) -> None:
    for errors in pool.run(norms):
        assert all(e <= 1e-9 for e in errors.values()), errors
    errors = pool.run(norms, False)[0]
    assert errors["2 False"] > 1e-3 and errors["1 True"] > 1e-3 and errors["by hand 2"] > 1e-3 and errors["inf False"] <= 1e-9


def life_of_a_gradient() -> None:
    """What users do with gradients and parameters."""
    reference, model, params, comm = made(3, 3, 2)
    k = model.attention.k.weight
    assert type(k) is LayoutDTensor and isinstance(k, nn.Parameter)
    calls = []
    own = linear._Linear.forward
    linear._Linear.forward = staticmethod(lambda *args: calls.append(args) or own(*args))
    try:
        loss_of(model).backward()
    finally:
        linear._Linear.forward = staticmethod(own)
    assert len(calls) == 4 + 2 + 3 + 1  # every Linear took its fast path
    loss_of(reference).backward()
    first = k.grad.full_tensor()
    assert first.shape == reference.attention.k.weight.shape and error(reference.attention.k.weight.grad, first) < 1e-9
    before = k.grad
    loss_of(model).backward()
    assert k.grad is before and type(before) is LayoutDTensor and error(2 * first, before.full_tensor()) < 1e-9
    assert k.grad.mul_(0.5) is k.grad and error(first, k.grad.full_tensor()) < 1e-9
    assert type(k.grad.clone()) is type(k.grad.detach()) is type(k.grad * 2) is type(k.grad.float()) is LayoutDTensor
    assert [type(t) for t in torch._foreach_mul([k.grad, k.detach(), k._plain()], 2)] == [LayoutDTensor, LayoutDTensor, DTensor]
    assert (k.grad.float()).dtype == torch.float32 and k.grad.sum(1).shape == first.shape[:1]

    twin = copy.deepcopy(k.grad)
    twin.zero_()
    assert type(twin) is LayoutDTensor and error(first, k.grad.full_tensor()) < 1e-9
    back = pickle.loads(pickle.dumps(k.grad.cpu()))
    assert type(back) is LayoutDTensor and error(first, back.full_tensor()) < 1e-9 and torch.equal(back._local_tensor, k.grad._local_tensor)
    file = io.BytesIO()
    torch.save({"grad": k.grad}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["grad"]._local_tensor, k.grad._local_tensor)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    assert type(k.grad) is LayoutDTensor and error(first, k.grad.full_tensor()) < 1e-9
    scaler.step(optimizer)
    scaler.update()
    found = torch.autograd.grad(loss_of(model), [k])[0]
    assert type(found) is LayoutDTensor and error(first, found.full_tensor()) < 1e-9
    k.grad = None
    optimizer.zero_grad(set_to_none=False)
    loss_of(model).backward()
    assert error(first, full_grads(model, params, comm)["attention.k.weight"]) < 1e-9

    model.float()
    assert k.dtype == torch.float32 and type(k.grad) is LayoutDTensor and k.grad.dtype == torch.float32
    assert {type(p.grad) for p in model.parameters()} == {LayoutDTensor}


def test_what_users_do_with_gradients(pool: Pool) -> None:
    pool.run(life_of_a_gradient)


def full_tensors() -> None:
    """In the model's order and shape, after copies and conversions too."""
    reference, model, _, _ = made(3, 3, 2)
    wanted = dict(reference.named_parameters())

    def check(m: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        for name, p in m.named_parameters():
            assert isinstance(p, DTensor) and torch.equal(p.full_tensor(), wanted[name].to(dtype)), name

    check(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p._local_tensor.mul_(2)
    check(model)
    with torch.no_grad():
        for p in twin.parameters():
            p._local_tensor.div_(2)
    check(twin)
    check(copy.deepcopy(twin).float(), torch.float32)
    for m in (reference, model, twin):
        sum((whole(p) ** 3).sum() for p in m.parameters()).backward()
    for m in (model, twin):
        for name, p in m.named_parameters():
            if p.shape == wanted[name].shape:
                continue
            grad = getattr(p.grad, "_local_tensor", None)
            assert grad is not None and torch.allclose(grad, 3 * p._local_tensor**2), name
    alone = copy.deepcopy(model.attention.k.weight)
    assert torch.equal(alone.full_tensor(), wanted["attention.k.weight"])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file)) == list(model.state_dict())


def test_full_tensors(pool: Pool) -> None:
    pool.run(full_tensors)


@pytest.mark.filterwarnings("ignore")
def compiled() -> dict[str, float]:
    torch._dynamo.reset()
    reference, model, params, comm = made(3, 3, 2)
    model = copy.deepcopy(model)
    run = torch.compile(model, backend="aot_eager")
    loss_of(reference).backward()
    loss_of(run).backward()
    assert {type(p.grad) for p in model.parameters()} == {LayoutDTensor}
    a, b = (torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in (reference, model))
    return {"grad": worst_grad(reference, model, params, comm), "norm": error(a, whole(b))}


@pytest.mark.sweep
def test_compiled(pool: Pool) -> None:
    for errors in pool.run(compiled, timeout=120.0):
        assert all(e <= 1e-9 for e in errors.values()), errors
