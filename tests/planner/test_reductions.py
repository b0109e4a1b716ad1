"""Where copies and reductions stand in small modules whose answer is known by hand.

An all-reduce forward is a REDUCE of the plan (or a distributed kernel), one backward a COPY, or the sum of a whole parameter's gradient.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp import Plan
from autotp.plan.conversions import Conversion, Op
from autotp.plan.spec import GradSum
from autotp.planner import reductions
from autotp.planner.choice import HEAD_WIDTH
from autotp.planner.mincut import MinCut
from autotp.testing import assert_equivalent

WIDTH, HEADS, SIZE, INNER = 24, 4, 6, 40


def planned(model: nn.Module, tp: int = 2, **inputs: Tensor) -> Plan:
    return autotp.plan(model, tp=tp, example_inputs=inputs or {"x": torch.randn(2, 3, WIDTH)})


def conversions(plan: Plan) -> Iterable[tuple[str, str, Conversion]]:
    """(module, where, conversion) of every conversion in the plan."""
    for m in plan.modules:
        for kind, slots in (("in", m.inputs), ("out", m.outputs)):
            yield from ((m.path, kind, c) for slot in slots for c in slot.conversions)
        for s in m.sites:
            yield from ((m.path, "site", c) for _, cs in (*s.inputs, *s.outputs) for c in cs)


def ops(plan: Plan, under: str = "") -> Counter[Op]:
    return Counter(c.op for path, _, c in conversions(plan) if path.startswith(under))


def at(plan: Plan, op: Op) -> set[tuple[str, str]]:
    return {(path, kind) for path, kind, c in conversions(plan) if c.op is op}


def summed(plan: Plan) -> set[str]:
    """Parameters whose gradient is summed over the ranks."""
    return {f"{u.owner}.{u.name}".lstrip(".") for m in plan.modules for u in m.uses if u.grad is GradSum.ALL}


def once(plan: Plan) -> set[str]:
    """Parameters that are added on one rank."""
    return {f"{u.owner}.{u.name}".lstrip(".") for m in plan.modules for u in m.uses if any(c.op is Op.ONCE for c in u.conversions)}


def backward(plan: Plan) -> int:
    return sum(c.when == "backward" for c in plan.collectives())


def forward(plan: Plan) -> int:
    return sum(c.when == "forward" for c in plan.collectives())


class Attention(nn.Module):
    """Heads, optionally with a norm of each head's query."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.norm = nn.RMSNorm(SIZE) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, SIZE).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.norm(q), k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Gated(nn.Module):
    """A gated mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Sequential(nn.Module):
    """A llama block."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = Attention(normed), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class Parallel(Sequential):
    """Attention and mlp of one norm, added together."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        return x + (self.attention(y) + self.mlp(y))


class Stack(nn.Module):
    """Blocks behind a norm, so that the first block's gradient is needed."""

    def __init__(self, block: type[nn.Module], depth: int) -> None:
        super().__init__()
        self.first = nn.RMSNorm(WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class LowRank(nn.Module):
    """Queries and keys through a whole low-rank projection with a norm, as in multi-head latent attention."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(WIDTH, 5, bias=False), nn.RMSNorm(5)
        self.shared = nn.Linear(WIDTH, SIZE, bias=False)
        self.q, self.v, self.o = nn.Linear(5, HEADS * SIZE), nn.Linear(5, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        c = self.norm(self.down(x))
        q, v = (f(c).view(b, t, -1, SIZE).transpose(1, 2) for f in (self.q, self.v))
        k = self.shared(x)[:, None].expand(-1, q.shape[1], -1, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Scaled(nn.Module):
    """A whole vector multiplied into a sharded region, and one added outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.inside, self.outside = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * self.inside) + self.outside


class Around(nn.Module):
    """A model whose own code only calls another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class TwoExperts(nn.Module):
    """Two partial sums weighted by a router: its weights meet partial sums."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.one, self.two = Gated(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        w = self.router(x).softmax(-1)
        return self.one(x) * w[..., :1] + self.two(x) * w[..., 1:2]


def test_the_megatron_minimum() -> None:
    plan = planned(Stack(Sequential, 1))
    assert {n for n, p in plan.params.items() if p.layout.dim is None} == {
        "first.weight",
        "blocks.0.n1.weight",
        "blocks.0.n2.weight",
        "blocks.0.mlp.down.bias",
    }
    assert ops(plan)[Op.REDUCE] == 2
    assert forward(plan) == 2
    assert backward(plan) == 2
    assert not summed(plan)
    assert ops(plan)[Op.GATHER] == ops(plan)[Op.SLICE] == 0


@pytest.mark.parametrize("depth", [2, 5])
def test_two_all_reduces_a_block(depth: int) -> None:
    plan = planned(Stack(Sequential, depth))
    assert (forward(plan), backward(plan)) == (2 * depth, 2 * depth)


class Both(Parallel):
    """The sum of attention and mlp is the result of a module: a hook reaches it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        return self.attention(y) + self.mlp(y)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("block", [Both, Parallel])
def test_a_parallel_residual_needs_one(tp: int, block: type[nn.Module]) -> None:
    plan = planned(Stack(block, 1), tp)
    assert ops(plan)[Op.REDUCE] == 1
    assert forward(plan) == 1
    assert backward(plan) == 1
    assert once(plan) == {"blocks.0.mlp.down.bias"}  # a bias added to a sum that is still partial


def test_a_norm_inside_heads_gets_its_gradient_summed() -> None:
    plan = planned(Stack(lambda: Sequential(normed=True), 2))  # type: ignore[arg-type]
    assert summed(plan) == {"blocks.0.attention.norm.weight", "blocks.1.attention.norm.weight"}
    assert summed(planned(Stack(Sequential, 2))) == set()


def test_a_low_rank_path_is_copied_where_it_is_narrow() -> None:
    """The gradient is reduced on the latent, where it enters the heads, so that the whole projections above get whole gradients."""
    plan = planned(LowRank())
    assert {n for n, p in plan.params.items() if p.layout.dim is not None} >= {"q.weight", "v.weight", "o.weight"}
    assert plan.params["down.weight"].layout.dim is None
    assert ops(plan)[Op.REDUCE] == 1
    copied = at(plan, Op.COPY)
    assert ("q", "in") in copied or ("norm", "out") in copied
    above = {"down.weight", "norm.weight", "shared.weight"} & summed(plan)
    # each path into the region is reduced exactly once: on the activation, or on the parameters above it
    assert not ({"down.weight", "norm.weight"} & above)
    assert ("shared.weight" in above) != any(path == "shared" for path, _ in copied)


def test_whole_parameters_inside_and_outside_a_region() -> None:
    plan = planned(Scaled())
    assert summed(plan) == {"inside"}
    assert ops(plan)[Op.REDUCE] == 1
    assert {n for n, p in plan.params.items() if p.layout.dim is None} == {"b.bias", "inside", "outside"}


def test_weighted_partial_sums_are_reduced_together() -> None:
    plan = planned(Around(TwoExperts()))
    assert ops(plan)[Op.REDUCE] == 1
    assert plan.params["inner.router.weight"].layout.dim is None
    # the router's gradient from partial sums is partial: summed once, on its parameters or on its result
    on_way = ("inner.router", "out") in at(plan, Op.COPY)
    assert bool({"inner.router.weight", "inner.router.bias"} <= summed(plan)) != on_way


def test_code_of_the_model_itself_gets_whole_sums() -> None:
    plan = planned(TwoExperts())  # a branch of the model's own forward that no trace took may use a sum before the end
    assert {path for path, _ in at(plan, Op.REDUCE)} == {"one.down", "two.down"}


def test_a_sum_is_reduced_before_what_does_not_commute() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.relu(self.a(x))) * 3
            return y.view(-1, WIDTH).tanh().sum(-1)

    plan = planned(Late())
    assert ops(plan)[Op.REDUCE] == 1
    assert ("", "out") not in at(plan, Op.REDUCE)  # the root's result is tiny, but tanh comes before it


def test_a_sum_that_commutes_is_reduced_where_it_is_small() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return (self.b(F.relu(self.a(x))) * 3).sum(-1)

    assert at(planned(Around(Small())), Op.REDUCE) == {("inner", "out")}
    assert at(planned(Small()), Op.REDUCE) == {("", "site")}  # not at the end of the model itself


def test_a_square_does_not_commute() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.relu(self.a(x)))
            return y * y

    assert at(planned(Square()), Op.REDUCE) == {("b", "out")}


# the cut itself -----------------------------------------------------------------------------------------------------------------


def test_cut_takes_the_cheaper_side() -> None:
    for costs, wanted in (((3.0, 1.0), {"late"}), ((1.0, 3.0), {"early"})):
        cut = MinCut()
        cut.born("p")
        cut.convertible("early", "p", "q", costs[0])
        cut.convertible("late", "q", "r", costs[1])
        cut.needed("r")
        solved = cut.solve()
        assert solved is not None
        assert solved[0] == wanted


def test_cut_that_cannot_be_made() -> None:
    cut = MinCut()
    cut.born("p")
    cut.convertible("key", "p", "q", None)
    cut.needed("q")
    assert cut.solve() is None


def test_cut_without_demands_is_empty() -> None:
    cut = MinCut()
    cut.born("p")
    cut.convertible("key", "p", "q", 1.0)
    solved = cut.solve()
    assert solved is not None
    assert solved[0] == set()


@pytest.mark.parametrize("first", ["a demand", "a cost"])
def test_cut_between_what_demands_each_other_cannot_be_made(first: str) -> None:
    """A loop hands its own result back to one place in the code: a conversion there would act on it again."""
    cut = MinCut()
    cut.born("p")
    for step in (lambda: cut.same("p", "q"), lambda: cut.convertible("key", "p", "q", 1.0))[:: 1 if first == "a demand" else -1]:
        step()
    cut.needed("q")
    assert cut.solve() is None


def test_cut_is_the_cheapest_and_of_those_the_latest() -> None:
    """Against all subsets of vertices, on drawn graphs."""
    found = 0
    for seed in range(300):
        draw = random.Random(seed)
        names = range(draw.randint(2, 8))
        cut, demands, costs = MinCut(), set[tuple[int, int]](), dict[tuple[int, int], float]()
        cut.born(0)
        cut.needed(names[-1])
        for _ in range(draw.randint(1, 12)):
            a, b = draw.sample(names, 2)
            if draw.random() < 0.6:
                cost = draw.choice([1.0, 2.0, 1e12, 1e12 + 1e-3])
                cut.convertible((a, b), a, b, cost)
                costs[a, b] = costs.get((a, b), 0.0) + cost
                demands.add((b, a))
            elif draw.random() < 0.5:
                cut.same(a, b)
                demands |= {(a, b), (b, a)}
            else:
                cut.implies(a, b)
                demands.add((a, b))
        live = {0}
        for _ in names:
            live |= {b for a, b in (*demands, *costs) if a in live}
        best: tuple[float, int, set[int]] | None = None
        for sides in itertools.product((True, False), repeat=len(names)):
            side = {n for n in names if sides[n]}
            if 0 in side and names[-1] not in side and side <= live and all(b in side for a, b in demands if a in side):
                cost = sum(Fraction(c) for (a, b), c in costs.items() if a in side and b not in side)
                best = min(best or (cost, 0, set()), (cost, -len(side), side), key=lambda each: each[:2])
        solved = cut.solve()
        assert (solved is None) == (best is None), seed
        if solved is not None and best is not None:
            assert solved[1] - {"source"} == best[2], seed
            assert solved[0] == {(a, b) for a, b in costs if a in best[2] and b not in best[2]}, seed
            found += bool(solved[0])
    assert found > 30


def test_gradients_of_shared_rows_are_listed_for_every_block() -> None:
    """Two key-value heads over four ranks: each row of k and v is on two of them, in the blocks that were not traced too."""
    from transformers import LlamaConfig

    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
    config = LlamaConfig(hidden_size=24, intermediate_size=32, vocab_size=64, num_hidden_layers=3, **heads)
    listed = {t.module: t.elements for t in autotp.plan(config, tp=4).traffic if t.elements}
    assert listed == {f"model.layers.{i}.self_attn.{n}": 2 * 4 * 24 for i in range(3) for n in ("k_proj", "v_proj")}


class Head(nn.Module):
    """One head, a module of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-2, -1) * self.k.out_features**-0.5
        return scores.softmax(-1, torch.float64).type_as(x) @ self.v(x)  # type: ignore[no-any-return]


class Heads(nn.Module):
    """Attention by a loop over heads, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(SIZE) for _ in range(HEADS))
        self.out = nn.Linear(HEADS * SIZE, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.cat([head(x) for head in self.heads], -1))
        return x + self.mlp(x)


def test_a_place_in_a_block_counts_once_for_each_block_that_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads stay whole. The gradient of what they give is summed where they are together, not once for each of them."""
    found = assert_equivalent(Heads, tp=2, inputs={"x": torch.randn(2, 3, WIDTH).double()}, steps=1)
    assert {p.reason for n, p in found.plan.params.items() if n.startswith("heads.")} == {HEAD_WIDTH}
    assert found.sharded == {"out.weight", "out.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight"}
    assert at(found.plan, Op.COPY) == {("out", "in"), ("mlp.0", "in")} and backward(found.plan) == 2
    monkeypatch.setattr(reductions, "times", lambda *_: 1)
    assert len(at(planned(Heads()), Op.COPY) - {("mlp.0", "in")}) == HEADS
