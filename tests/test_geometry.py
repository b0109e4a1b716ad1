"""Any geometry: a parallel decoder trains as on one device, whatever tp does not divide.

For drawn numbers of heads, sizes, variants, ranks and optimizers, three clipped steps are compared in float64 with those of
one device: logits, loss, gradient norm, parameters after each step. Padding stays exactly zero, and nothing falls back to
replication: every Linear weight is sharded that can be.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from autotp.plan.expressions import Concat, Expr, Factor
from autotp.plan.plan import Plan
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.reads import GradFix
from autotp.testing.equivalence.compare import error_of
from autotp.testing.ranks.threads import ThreadRanks
from tests.models.geometry import ACTIVATIONS, Geometry, Mlp, Product, Projection, QKNorm, batch, decoder
from tests.support.ranks import mesh

STEPS, LIMIT = 3, 1e-9
#: A tensor is measured against its own size, but at least this: biases and norms may be small.
FLOOR = 1e-2
#: AdamW's ε keeps gradients that are rounding errors of zero (a key's bias without positions) from becoming whole steps.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, eps=1e-6),
}


@dataclass(slots=True)
class History:
    """What training shows, step by step; the last forward follows the last step."""

    logits: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def train(model: nn.Module, g: Geometry, optimizer: str, state: Callable[[nn.Module], dict[str, Tensor]]) -> History:
    history = History()
    steps = OPTIMIZERS[optimizer](model.parameters())
    for step in range(STEPS + 1):
        logits, loss = model(**batch(g, step))
        history.logits.append(logits.detach())
        history.losses.append(loss.detach())
        if step == STEPS:
            break
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        history.norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        steps.step()
        steps.zero_grad()
        history.weights.append({name: tensor.clone() for name, tensor in state(model).items()})
    return history


def rank_errors(model: nn.Module, g: Geometry, optimizer: str, wanted: History) -> tuple[dict[str, float], Plan]:
    """On one rank: the largest errors by aspect, and the plan."""
    model = copy.deepcopy(model)
    autotp.parallelize(model, mesh(), example_inputs=batch(g), check="graph")  # or its own check would see a sabotage first
    got, plan = train(model, g, optimizer, autotp.full_state_dict), autotp.plan_of(model)
    errors = {
        name: max(error_of(a, b, FLOOR) for a, b in zip(getattr(wanted, name), getattr(got, name), strict=True))
        for name in ("logits", "losses", "norms")
    }
    errors["keys"] = float(any(list(a) != list(b) for a, b in zip(wanted.weights, got.weights, strict=True)))
    errors["weights"] = max(error_of(v, b[k], FLOOR) for a, b in zip(wanted.weights, got.weights, strict=True) for k, v in a.items())
    errors["padding"] = 0.0
    for name, p in model.named_parameters():
        layout = plan.params[name].layout
        for a, b in layout.padding(torch.distributed.get_rank()):
            errors["padding"] = max(errors["padding"], float(p._local_tensor.detach().narrow(layout.dim, a, b - a).abs().max()))
    return errors, plan


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], ThreadRanks]]:
    found = lru_cache(partial(ThreadRanks, timeout=60.0))
    started: list[ThreadRanks] = []

    def of(world: int) -> ThreadRanks:
        started.append(found(world))
        return started[-1]

    yield of
    for each in started:
        each.stop()


def compared(ranks: Callable[[int], ThreadRanks], g: Geometry, tp: int, optimizer: str) -> tuple[dict[str, float], Plan]:
    """The largest errors over all ranks, and the plan."""
    model = decoder(g)
    wanted = train(copy.deepcopy(model), g, optimizer, lambda m: m.state_dict())
    found = ranks(tp).run(rank_errors, model, g, optimizer, wanted)
    return {aspect: max(errors[aspect] for errors, _ in found) for aspect in found[0][0]}, found[0][1]


def wrong(errors: dict[str, float]) -> dict[str, float]:
    return {aspect: e for aspect, e in errors.items() if not e <= (LIMIT if aspect not in ("padding", "keys") else 0.0)}


def keepable(g: Geometry, tp: int) -> set[str]:
    """Weights that the planner may keep whole.

    Keys and values where every rank needs all of them (`held` says that this is cheapest), the projections of a single head,
    which is not cut, and a tied vocabulary of few rows.
    """
    names = ["k", "v"] if g.heads > 1 else ["q", "k", "v", "qkv", "o"]
    table = {"embed.weight", "head.weight"} if g.tied and g.vocab < 8 * tp else set()
    return {f"blocks.{i}.attention.{n}.weight" for i in range(g.layers) for n in names} | table


def held(plan: Plan) -> tuple[int, int]:
    """Rows of queries and of keys on a rank."""
    shapes = {n.split(".")[-2]: p.layout.local_shape for n, p in plan.params.items() if n.startswith("blocks.0.") and n.endswith("weight")}
    queries = shapes["o"][1]
    return queries, shapes["k"][0] if "k" in shapes else (shapes["qkv"][0] - queries) // 2


def fewest(g: Geometry, tp: int) -> int:
    """The least that `held` can add up to: each group cut into 1, 2, … pieces, the pieces dealt over the ranks."""
    pieces = ((ceil(g.kv * n / tp), ceil(g.group / n)) for n in range(1, max(g.group, tp) + 1))
    return g.size * min(slots * heads + slots for slots, heads in pieces)


def factors(expr: Expr) -> Iterator[Factor]:
    if isinstance(expr, Factor):
        yield expr
    else:
        for part in expr.parts:
            yield from factors(part)


def kinds(g: Geometry, plan: Plan) -> set[str]:
    """What the example is an example of."""
    layouts = {n: p.layout for n, p in plan.params.items()}
    cut = [f for x in layouts.values() for e in x.dims for f in factors(e) if f.sharded]
    found = {"padding"} if any(x.is_padded for x in layouts.values()) else {"even"}
    found |= {"padded heads"} if any(x.is_padded for n, x in layouts.items() if "attention" in n) else set()
    found |= {"padded mlp"} if any(x.is_padded for n, x in layouts.items() if "feed" in n) else set()
    found |= {"padded vocabulary"} if layouts["head.weight"].is_padded else set()
    found |= {"cut vocabulary"} if layouts["embed.weight"].dim is not None else set()
    found |= {"pieces"} if any(f.pieces > 1 for f in cut) else set()
    found |= {"shared"} if any(x.is_shared for x in layouts.values()) else set()
    found |= {"concatenated"} if any(isinstance(e, Concat) for x in layouts.values() for e in x.dims) else set()
    idle = any(not any(a >= 0 for a, _ in x.runs(rank)) for x in layouts.values() for rank in range(x.tp))
    found |= {"idle rank"} if idle else set()
    found |= {"a head for each key"} if g.group > 1 and len(set(held(plan))) == 1 else set()
    return (
        found | {g.projection, g.norm, g.product, g.mlp, g.activation} | ({"tied"} if g.tied else set()) | ({"bias"} if g.bias else set())
    )


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    kv = draw(st.integers(1, 6))
    rotary = draw(st.booleans())
    return Geometry(
        kv=kv,
        group=draw(st.integers(1, max(1, min(7, 18 // kv)))),
        size=draw(st.sampled_from((2, 4) if rotary else (1, 2, 3))),
        width=draw(st.integers(2, 21)),
        vocab=draw(st.integers(4, 99)),
        hidden=draw(st.sampled_from((0, 6, 7))),
        layers=draw(st.sampled_from((1, 1, 2))),
        projection=draw(st.sampled_from(Projection)),
        norm=draw(st.sampled_from(QKNorm)),
        mlp=draw(st.sampled_from(Mlp)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        rotary=rotary,
        product=draw(st.sampled_from(Product)),
    )


NAMED = (
    (Geometry(3, 3, bias=True), 2, "adamw"),  # SmolLM-135M's 9 heads
    (Geometry(3, 3, norm=QKNorm.FULL), 4, "adamw"),
    (Geometry(3, 3, projection=Projection.CONCAT, mlp=Mlp.FUSED), 8, "sgd"),
    (Geometry(4, 7, bias=True, width=37, vocab=64, tied=True), 8, "adamw"),  # Qwen2.5-7B's 28
    (Geometry(2, 7, bias=True, vocab=35, tied=True), 4, "adamw"),  # Qwen2.5-0.5B's 14
    (Geometry(2, 7, norm=QKNorm.HEAD, layers=2), 8, "sgd"),
    (Geometry(1, 8, bias=True), 3, "adamw"),
    (Geometry(1, 8, product=Product.GROUPED), 8, "sgd"),  # Gemma-2B's: one head a rank
    (Geometry(2, 3, product=Product.WRITTEN), 6, "sgd"),
    (Geometry(1, 7, projection=Projection.GROUPED), 7, "adamw"),
    (Geometry(5, 2, norm=QKNorm.HEAD, projection=Projection.CONCAT), 7, "sgd"),
    (Geometry(5, 1, norm=QKNorm.FULL, mlp=Mlp.PLAIN, rotary=False), 2, "adamw"),
    (Geometry(2, 2, vocab=61, tied=True), 4, "sgd"),
    (Geometry(2, 2, vocab=53, width=3), 8, "adamw"),
)


@pytest.mark.parametrize(("g", "tp", "optimizer"), NAMED[::2], ids=str)
def test_named_geometries(ranks: Callable[[int], ThreadRanks], g: Geometry, tp: int, optimizer: str) -> None:
    errors, plan = compared(ranks, g, tp, optimizer)
    assert not wrong(errors)
    assert set(plan.replicated_products) <= keepable(g, tp) and plan.local_share < 1


@pytest.mark.sweep
@pytest.mark.timeout(900)  # shrinking a failure takes a while
def test_training_is_that_of_one_device(ranks: Callable[[int], ThreadRanks]) -> None:
    seen: Counter[Any] = Counter()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(geometries(), st.integers(2, 8), st.sampled_from(sorted(OPTIMIZERS)))
    def check(g: Geometry, tp: int, optimizer: str) -> None:
        errors, plan = compared(ranks, g, tp, optimizer)
        assert not wrong(errors)
        assert set(plan.replicated_products) <= keepable(g, tp)
        if g.heads > 1 and g.norm is not QKNorm.FULL and plan.params["norm.weight"].layout.dim is None:
            assert sum(held(plan)) == fewest(g, tp)  # elsewhere what statistics and the residual stream cost counts too
        assert plan.local_share < 1
        seen.update({tp, optimizer, *kinds(g, plan)})

    for g, tp, optimizer in NAMED:
        check = example(g, tp, optimizer)(check)
    check()
    wanted = ["padded heads", "padded mlp", "padded vocabulary", "cut vocabulary", "pieces", "shared", "concatenated", "idle rank", "even"]
    wanted += ["a head for each key", *Projection, *QKNorm, *Product, *Mlp, *ACTIVATIONS, *OPTIMIZERS, "tied", "bias", *range(2, 9)]
    assert not {kind: seen[kind] for kind in wanted if seen[kind] < 3}


def without_zeros(patch: pytest.MonkeyPatch) -> None:
    """Padding keeps what gradient it gets, and what an optimizer writes to it."""
    own = GradFix.__init__

    def init(self: GradFix, *args: Any) -> None:
        own(self, *args)
        self.padding = ()

    patch.setattr(GradFix, "__init__", init)
    patch.setattr(LayoutDTensor, "_clear_padding_", lambda self: None)


def without_sums(patch: pytest.MonkeyPatch) -> None:
    """Copies of a shared row keep their own part of its gradient."""
    patch.setattr(GradFix, "_sum_copies_", lambda self, grad: None)


def counted_twice(patch: pytest.MonkeyPatch) -> None:
    """Norms count every copy of a shared row."""
    patch.setattr(LayoutDTensor, "_owned", lambda self: self._local_tensor)


@pytest.mark.parametrize(
    ("sabotage", "aspect"), [(without_zeros, "padding"), (without_sums, "weights"), (counted_twice, "norms"), (None, None)]
)
def test_negative_controls(
    ranks: Callable[[int], ThreadRanks], monkeypatch: pytest.MonkeyPatch, sabotage: Callable[..., None] | None, aspect: str | None
) -> None:
    if sabotage is not None:
        sabotage(monkeypatch)
    found = wrong(compared(ranks, Geometry(2, 7, width=5, mlp=Mlp.PLAIN, activation="sigmoid"), 4, "sgd")[0])
    assert found.get(aspect, 0.0) > 1e-5 if aspect else not found
