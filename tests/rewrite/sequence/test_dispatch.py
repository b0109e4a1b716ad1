"""Hidden states in token parts go to the ranks of their experts alone, and come back as sums."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.numeric.exact import DOUBLE
from autotp.plan.conversions import Op
from autotp.plan.experts import whole_experts
from autotp.plan.plan import Plan
from autotp.plan.sequence_parallel import with_tokens_in_parts, with_whole_tokens
from autotp.rewrite.sequence import dispatch
from autotp.rewrite.sequence.dispatch import Route
from autotp.rewrite.sequence.rows import Rows
from autotp.testing import NotEquivalent, assert_equivalent
from autotp.testing.sabotage import mutations
from tests.composition.training import Data, adamw, apart, by_block, loss_of, mesh_of, train
from tests.experts.models import Batched, Checkpointed, Experts, Model
from tests.support.collectives import noted
from tests.support.families import transformer
from tests.support.ranks import Pool
from tests.support.slow import swept

BOTH: dict[str, Any] = {"sequence_parallel": True, "experts": "whole"}
ALWAYS = 9e3


@given(experts=st.integers(1, 7), ranks=st.integers(2, 4), tokens=st.integers(0, 9), slots=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_token_goes_where_its_experts_are(experts: int, ranks: int, tokens: int, slots: int, seed: int) -> None:
    """What ranks send and get fits together, and the sums are those of one device."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(experts, (tokens, slots), generator=g)
    x = torch.randn(tokens, 2, dtype=torch.float64, generator=g)
    each = -(-experts // ranks)
    spans = [(min(r * each, experts), min((r + 1) * each, experts)) for r in range(ranks)]
    kinds = [Rows((tokens,), SimpleNamespace(rank=r, size=ranks)) for r in range(ranks)]  # type: ignore[arg-type]
    routes = [Route.of(index, spans, kind) for kind in kinds]
    mine = [x[k.start : k.start + k.held] for k in kinds]
    got = exchanged([m[r.own] for m, r in zip(mine, routes, strict=True)], [r.sent for r in routes])
    for r, rows, (start, stop) in zip(routes, got, spans, strict=True):
        assert torch.equal(rows, x[r.tokens]) and len(rows) == sum(r.received)
        assert r.tokens.tolist() == [t for t in range(tokens) if any(start <= int(e) < stop for e in index[t])]
    weigh = torch.arange(1, experts + 1, dtype=torch.float64)
    summands = [
        sum((weigh[index[r.tokens, s]] * ((index[r.tokens, s] >= a) & (index[r.tokens, s] < b)))[:, None] * rows for s in range(slots))
        for r, rows, (a, b) in zip(routes, got, spans, strict=True)
    ]
    back = exchanged(summands, [r.received for r in routes])  # type: ignore[arg-type]
    sums = torch.cat([b.new_zeros(k.held, 2).index_add(0, r.own, b) for b, r, k in zip(back, routes, kinds, strict=True)])
    assert torch.allclose(sums, weigh[index].sum(-1, keepdim=True) * x)


def exchanged(rows: list[Tensor], sent: list[tuple[int, ...]]) -> list[Tensor]:
    """What an all-to-all gives each rank."""
    pieces = [torch.split(r, list(s)) for r, s in zip(rows, sent, strict=True)]
    return [torch.cat([p[rank] for p in pieces]) for rank in range(len(rows))]


def biased(number: int, k: int, *wanted: int) -> nn.Module:
    """Every token goes to `wanted` experts, where there are some."""
    return Model(Experts, number, tuple(ALWAYS * (e in wanted) for e in range(number)), k)


#: model → (how it is made, its ranks): experts that tp does not divide, ranks without any, all tokens to one, none to the last
OWN: dict[str, tuple[Any, int]] = {
    "loop": (Model, 2),
    "uneven": (lambda: Model(Experts, 5), 3),
    "a rank has none": (lambda: Model(Batched, 5), 4),
    "all to one": (lambda: biased(4, 1, 2), 2),
    "none to the last": (lambda: biased(4, 2, 0, 1), 4),
    "run again": (Checkpointed, 2),
}
#: shapes of a batch: ragged over the ranks, one token a rank, fewer tokens than ranks
SHAPES = ((2, 5), (1, 4), (3, 7), (1, 1))


def observed(model: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = torch.randn(*shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out = model(x)
    (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    parallel = hasattr(next(model.parameters()), "full_tensor")
    grads = autotp.full_grads(model) if parallel else {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def watched(model: Any, shape: tuple[int, int]) -> tuple[dict[str, Tensor], list[str]]:
    """As `observed`, and the collectives that ran."""
    ran: list[str] = []
    with noted(lambda comm, kind, tensor, nbytes: ran.append(kind)):
        return observed(model, shape), ran


def compared(name: str) -> list[str]:
    torch.manual_seed(0)
    make, tp = OWN[name]
    alone, said = make().double(), []
    given = {"x": torch.randn(2, 5, 5, dtype=torch.float64)}
    model = autotp.parallelize(copy.deepcopy(alone), mesh_of(1, tp), example_inputs=given, **BOTH)
    plan = autotp.plan_of(model)
    assert len(dispatching(plan)) == len(whole_experts(plan)) == 2
    for shape in SHAPES:
        wanted, (got, ran) = observed(alone, shape), watched(model, shape)
        if wanted.keys() != got.keys():
            said.append(f"{shape}: {wanted.keys() ^ got.keys()}")
        far = {n: float((wanted[n] - got[n]).abs().max()) for n in wanted.keys() & got.keys()}
        if not max(far.values()) <= 1e-9:
            said.append(f"{shape}: {far}")
        if ("all_to_all" in ran) is not (shape[0] * shape[1] >= tp):  # fewer tokens than ranks stay whole
            said.append(f"{shape}: {ran}")
        with torch.no_grad():
            if not torch.allclose(model(given["x"]), alone(given["x"]), rtol=0, atol=1e-9):
                said.append(f"{shape}: without gradients")
    return said


def dispatching(plan: Plan) -> list[str]:
    return [m.path for m in plan.modules for s in m.inputs if any(c.op is Op.DISPATCH for c in s.conversions)]


@pytest.mark.parametrize("name", swept(OWN, "uneven", "a rank has none", "all to one", "run again"))
def test_own(pool: Pool, name: str) -> None:
    for said in pool.run(compared, name, world=OWN[name][1]):
        assert not said, "\n".join(said)


def spoilt(how: str) -> list[str]:
    """Mistakes of a route; every rank makes them."""
    real = Route.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: Any, index: Tensor, spans: Any, kind: Rows) -> Route:
        route = real(cls, index, spans, kind)
        if how == "other rows":
            return Route(route.own.flip(0), route.sent, route.tokens, route.received, kind)  # type: ignore[no-any-return]
        return Route(route.own, route.sent, route.tokens.flip(0), route.received, kind)

    with pytest.MonkeyPatch.context() as patch:
        if how == "gradients stay":
            patch.setattr(
                dispatch._AllToAll, "backward", staticmethod(lambda ctx, grad: (dispatch._sent(grad * 0, *ctx_of(ctx)), None, None, None))
            )
        else:
            patch.setattr(dispatch.Route, "of", classmethod(wrong))
        return compared("loop")


def ctx_of(ctx: Any) -> Any:
    comm, sent, received = ctx.of
    return comm, received, sent


@pytest.mark.parametrize("how", ["other rows", "other tokens", "gradients stay"])
def test_mistakes_show(pool: Pool, how: str) -> None:
    """The controls."""
    assert all(pool.run(spoilt, how))


#: (family, how its experts are computed)
FAMILIES = [("mixtral", "eager"), ("qwen3_moe", "batched_mm"), ("deepseek_v3", "eager"), ("gpt_oss", "eager"), ("mixtral", "batched_mm")]


def family(name: str, how: str) -> tuple[float, list[str]]:
    """(the farthest of the norms of gradients and weights of two steps, what ran in one of them)."""
    alone = transformer(name, experts=how).double().train()
    model = autotp.parallelize(copy.deepcopy(alone), mesh_of(1, 2), check="graph", **BOTH)
    assert len(dispatching(autotp.plan_of(model))) == len(whole_experts(autotp.plan_of(model))) >= 1
    ran: list[str] = []
    with DOUBLE.mode():
        with noted(lambda comm, kind, tensor, nbytes: ran.append(kind)):
            loss_of(model, Data(1).ids(0)).backward()
        model.zero_grad()
        wanted, got = (train(m, adamw(m), Data(1), range(2)) for m in (alone, model))
    return max(apart(alone.state_dict(), autotp.full_state_dict(model)), *(abs(a - b) for a, b in zip(wanted, got, strict=True))), ran


@pytest.mark.parametrize(("name", "how"), swept(FAMILIES, ("deepseek_v3", "eager"), ("gpt_oss", "eager")))
def test_families(pool: Pool, name: str, how: str) -> None:
    """Shared experts have a sum of their own."""
    for far, ran in pool.run(family, name, how):
        assert far <= 1e-9 and ran.count("all_to_all") % 4 == 0 and "all_to_all" in ran


@pytest.mark.parametrize("word", ["dispatch", pytest.param("combine", marks=pytest.mark.sweep)])
def test_mistakes_in_the_plan_show(word: str) -> None:
    """A conversion that is left out."""
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 5, 5)}
    plan = autotp.plan(Model(), tp=2, example_inputs=given, check="graph", **BOTH)
    found = [m for m in mutations(plan) if word in str(m)]
    assert found
    for mutation in found:
        with pytest.raises(NotEquivalent):
            assert_equivalent(Model, tp=2, inputs=given, recipe={"placements": BOTH}, sabotage=mutation)


def under_fsdp() -> float:
    """Three clipped steps of AdamW beside one device with all batches."""
    mesh, alone = mesh_of(2, 2), transformer("mixtral", experts="eager").double().train()
    model = by_block(autotp.parallelize(copy.deepcopy(alone), mesh, check="graph", **BOTH), mesh)
    assert dispatching(autotp.plan_of(model))
    norms = train(model, adamw(model), Data.here(mesh), range(3))
    wanted = train(alone, adamw(alone), Data(2), range(3))
    return max(apart(alone.state_dict(), autotp.full_state_dict(model)), *(abs(a - b) for a, b in zip(norms, wanted, strict=True)))


def test_under_fsdp(pool: Pool) -> None:
    assert max(pool.run(under_fsdp, world=4)) <= 1e-9


class Whole(Model):
    """Checkpoints its blocks in either way."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.leave(x)  # type: ignore[no-any-return]


def second_derivative() -> list[float]:
    """Gradients of a gradient's norm; and of blocks that run again in a reentrant checkpoint."""
    torch.manual_seed(0)
    found = []
    for make in (Model, Whole):
        Whole.reentrant = True
        alone = make().double()
        given = {"x": torch.randn(2, 5, 5, dtype=torch.float64)}
        model = autotp.parallelize(copy.deepcopy(alone), mesh_of(1, 2), example_inputs=given, **BOTH)
        results = []
        for m in (alone, model):
            x = given["x"].clone().requires_grad_()
            loss = m(x).pow(2).sum()
            if make is Model:
                (loss,) = (g.pow(2).sum() for g in torch.autograd.grad(loss, x, create_graph=True))
            loss.backward()
            results.append(autotp.full_grads(m) if m is model else {n: p.grad for n, p in m.named_parameters() if p.grad is not None})
        found.append(apart(*results))  # type: ignore[arg-type]
    return found


def test_second_derivatives_and_reentrant_checkpoints(pool: Pool) -> None:
    assert max(max(found) for found in pool.run(second_derivative)) <= 1e-9


def test_the_plan() -> None:
    """The sums that are exchanged are said, and a plan without tokens in parts is the one that was proven."""
    model = transformer("mixtral")
    whole = autotp.plan(model, tp=2, experts="whole", sequence_parallel=True, check="graph")
    path = whole_experts(whole)[0]
    found = [(t.when.value, t.kind.value) for t in whole.traffic if t.module == path and t.width == 64]
    assert sorted(found) == [("backward", "all_to_all")] * 2 + [("forward", "all_to_all")] * 2
    plain = with_whole_tokens(whole)
    assert not dispatching(plain) and not any(t.kind.value == "all_to_all" for t in plain.traffic)
    assert with_tokens_in_parts(plain) == whole
    assert "dispatch" in whole.explain(path) and "combine" in whole.explain(path)
    width = autotp.plan(model, tp=2, sequence_parallel=True, check="graph")
    assert not dispatching(width)
