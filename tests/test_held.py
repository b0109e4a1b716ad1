"""Parameters that more than their module knows of: held elsewhere, read past their module, hooked before, put back whole after."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError, PlanError
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.testing.ranks.run import run
from tests.support.pooled import PLAIN, equivalent
from tests.support.ranks import Pool, mesh
from tests.support.slow import in_turns

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


class Mlp(nn.Module):
    """Two products whose weights the forward takes from `weights`."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 24, bias), nn.Linear(24, 12, bias)
        self.hold()

    def hold(self) -> None:
        pass

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.a.weight, self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weights()
        return F.linear(F.gelu(F.linear(x, a, self.a.bias)), b, self.b.bias)


class InList(Mlp):
    def hold(self) -> None:
        self.held = [self.a.weight, self.b.weight]

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.held[0], self.held[1]


class InTuple(Mlp):
    def hold(self) -> None:
        self.held = {"all": ((self.a.weight,), [self.b.weight])}

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.held["all"][0][0], self.held["all"][1][0]


class InClosure(Mlp):
    def hold(self) -> None:
        a, b = self.a.weight, self.b.weight
        self.first = lambda: a
        self.second = functools.partial(lambda w: w, b)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.first(), self.second()


class Box:
    __slots__ = ("weight",)

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class InObject(Mlp):
    def hold(self) -> None:
        self.box = Box(self.a.weight)
        self.default = lambda w=self.b.weight: w

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.box.weight, self.default()


class ByName(Mlp):
    def weights(self) -> tuple[Tensor, Tensor]:
        found = dict(self.named_parameters())
        return found["a.weight"], found["b.weight"]


class InTables(Mlp):
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.a._parameters["weight"], self.state_dict(keep_vars=True)["b.weight"]  # type: ignore[return-value]


class ByOrder(Mlp):
    def weights(self) -> tuple[Tensor, Tensor]:
        a, _, b, _ = self.parameters()
        return a.view(a.shape[0], -1), b.t().t()


class Frozen(Mlp):
    """Values without gradients."""

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.a.weight.data, list(self.parameters())[2].detach()


class Head(nn.Module):
    """As mobilebert's: a product with another module's weight, transposed and joined to its own."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.decoder = nn.Linear(8, 16, bias=False)
        self.decoder.weight = embedding.weight
        self.dense = nn.Linear(16, 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.decoder.weight.t(), self.dense.weight]) + self.bias


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.mlp = Mlp()
        self.head = Head(self.embed)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.mlp(torch.cat([x, x[..., :4]], -1)))


class Blocks(nn.Module):
    """Blocks alike, each with a list; the model reads the weights of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([InList() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x * sum(p.pow(2).mean() for p in self.parameters())


class Hooked(Mlp):
    def hold(self) -> None:
        self.a.weight.register_hook(lambda g: 0.1 * g)
        self.b.weight.register_hook(lambda g: g - g.mean())
        self.a.bias.register_hook(lambda g: g.flip(0))
        self.b.bias.register_post_accumulate_grad_hook(self.tripled)

    @staticmethod
    def tripled(p: Tensor) -> None:
        p.grad.mul_(3)


MODELS: list[type[nn.Module]] = [InList, InTuple, InClosure, InObject, ByName, InTables, ByOrder, Frozen, Blocks, Hooked, Tied]

#: Weights that are squared and summed; those whose holders a copy of the model shares, so that no copy can be tried.
WHOLE = (Blocks, InClosure, InObject)


def built_again(model: nn.Module) -> nn.Module:
    """A model with the same values; a deep copy shares holders with it."""
    made = type(model)().to(next(model.parameters()).dtype).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize(("model", "world"), in_turns(MODELS, (2, 3)))
def test_equal(pool: Pool, model: type[nn.Module], world: int) -> None:
    inputs = {"ids": torch.arange(8).view(2, 4)} if model is Tied else {"x": X}
    found = equivalent(pool, model, inputs, tp=world, needs=PLAIN, again=built_again)
    assert found.local_share < 0.8 or model in WHOLE


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 64,
    },
    "gpt2": {"n_embd": 24, "n_layer": 1, "n_head": 4, "vocab_size": 62, "n_positions": 32},
}
IDS = torch.arange(3, 12)[None]


def language_model(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).double().eval()


def far(model: nn.Module, other: nn.Module) -> float:
    """Distance of outputs, gradients and states of a plain model and a parallel one."""
    found: list[Tensor] = []
    for m in (model, other):
        m.zero_grad()
        found.append(m(IDS).logits)
        found[-1].pow(2).mean().backward()
    pairs = [(found[0], found[1])]
    grads, state = autotp.full_grads(other), autotp.full_state_dict(other)
    pairs += [(p.grad, grads[n]) for n, p in model.named_parameters() if p.grad is not None]
    pairs += [(v, state[n]) for n, v in model.state_dict().items()]
    return max(float((p.detach() - q.detach()).abs().max() / p.detach().abs().max().clamp_min(1e-3)) for p, q in pairs)


def functional(model: nn.Module, m: nn.Module, whole: dict[str, Tensor]) -> float:
    """`functional_call` with whole tensors: outputs, and gradients of those tensors."""
    results = []
    for called in (model, m):
        given = {n: whole[n].clone().requires_grad_() for n, _ in model.named_parameters()}
        out = torch.func.functional_call(called, given, (IDS,)).logits
        results.append([out, *torch.autograd.grad(out.pow(2).mean(), list(given.values()))])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def assign_all(m: nn.Module, whole: dict[str, Tensor]) -> None:
    tied: dict[int, nn.Parameter] = {}
    for name, p in list(m.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        new = tied.setdefault(id(p), nn.Parameter(whole[name].clone()))
        setattr(m.get_submodule(owner), leaf, new)


@torch.no_grad()
def copy_all(m: nn.Module, whole: dict[str, Tensor]) -> None:
    for name, p in m.named_parameters():
        p.copy_(whole[name])


def data_all(m: nn.Module, whole: dict[str, Tensor]) -> None:
    for name, p in m.named_parameters():
        p.data = whole[name]


def vector_all(m: nn.Module, whole: dict[str, Tensor]) -> None:
    vector = torch.nn.utils.parameters_to_vector([whole[n] for n, _ in m.named_parameters()])
    torch.nn.utils.vector_to_parameters(vector, m.parameters())


def draw_all(m: nn.Module, whole: dict[str, Tensor]) -> None:
    torch.manual_seed(5 if torch.distributed.get_rank() == 0 or not isinstance(next(m.parameters()), LayoutDTensor) else 6)
    for p in m.parameters():
        nn.init.normal_(p)


def load_inner(m: nn.Module, whole: dict[str, Tensor]) -> None:
    m.base_model.load_state_dict({n.split(".", 1)[1]: v for n, v in whole.items() if not n.startswith("lm_head")})
    m.lm_head.load_state_dict({"weight": whole["lm_head.weight"]})


def cast(m: nn.Module, whole: dict[str, Tensor]) -> None:
    m.float().double()
    copy_all(m, whole)


PUT: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "load": lambda m, whole: m.load_state_dict(whole),
    "inner": load_inner,
    "copies": copy_all,
    "data": data_all,
    "vector": vector_all,
    "after a cast": cast,
    "drawn": draw_all,
    "assign": lambda m, whole: m.load_state_dict(whole, assign=True),  # the last two take other parameters
    "attributes": assign_all,
}


def put_back(kind: str) -> dict[str, float]:
    """Whole tensors put into a parallel model by every way that there is, one after the other."""
    plain = language_model(kind)
    m = autotp.parallelize(language_model(kind), mesh())
    generator = torch.Generator().manual_seed(9)
    errors = {}
    for name, put in PUT.items():
        drawn = {id(p): torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in plain.parameters()}
        whole = {n: drawn[id(p)] for n, p in plain.state_dict(keep_vars=True).items()}
        put(plain, {n: v.clone() for n, v in whole.items()})
        put(m, whole)
        errors[name] = far(plain, m)
        assert name == "attributes" or {type(p) for p in m.parameters()} == {LayoutDTensor}, name
        errors[f"functional_call after {name}"] = functional(plain, m, whole)
    return errors


@pytest.mark.parametrize("kind", CONFIGS)
def test_whole_tensors_put_back(pool: Pool, kind: str) -> None:
    for errors in pool.run(put_back, kind, timeout=120.0):
        assert max(errors.values()) < 1e-9, errors


def refused() -> None:
    m = autotp.parallelize(Mlp(), mesh(), example_inputs={"x": X})
    weight = m.a.weight
    m.a.weight = nn.Parameter(torch.zeros(weight.to_local().shape))
    with pytest.raises(AutoTPError, match=r"Linear\.weight was replaced"):
        m(X)
    with pytest.raises(AutoTPError, match=r"weight was replaced"):
        torch.func.functional_call(m, {"b.weight": torch.zeros(3, 3)}, (X,))
    m.a.weight = weight
    with pytest.raises(AutoTPError, match="takes a whole tensor"):
        m.a.weight.data = torch.zeros(weight.to_local().shape)
    with pytest.raises(RuntimeError, match="size mismatch"):
        m.load_state_dict({n: p.to_local() for n, p in m.state_dict().items()})


def test_parts_put_back_are_refused(pool: Pool) -> None:
    pool.run(refused)


def optimizer_before(kind: str) -> float:
    """An optimizer made, and stepped, before; everything that held a parameter holds the parallel one."""
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)}[kind]
    states = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = Hooked().double()
        mine = {"params": [*model.parameters()], "set": {model.a.weight}, "by": {model.b.weight: 3}}
        optimizer = make(list(model.parameters()))
        stale = model.a.weight
        for step in range(4):
            if parallel and step == 2:
                model = autotp.parallelize(model, mesh(), example_inputs={"x": X.double()})
                assert all(p is q for p, q in zip(mine["params"], model.parameters(), strict=True))
                assert mine["set"] == {model.a.weight} and list(mine["by"]) == [model.b.weight]
                with pytest.raises(AutoTPError, match=r"'a.weight' was taken from the model before parallelize"):
                    stale.sum()
                assert "replaced" in repr(stale)
            optimizer.zero_grad()
            model(X.double()).pow(2).sum().backward()
            optimizer.step()
        states.append(autotp.full_state_dict(model) if parallel else model.state_dict())
    return max(float((states[0][n] - states[1][n]).abs().max()) for n in states[0])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_made_before(pool: Pool, kind: str) -> None:
    for world in (2, 3):
        assert max(pool.run(optimizer_before, kind, world=world)) < 1e-12


def graph_before() -> str:
    """The backward of a penalty that was computed of a parameter before it was replaced."""
    model = Hooked().double()
    penalty = model.a.weight.pow(2).sum()
    model = autotp.parallelize(model, mesh(), example_inputs={"x": X.double()})
    try:
        (model(X.double()).pow(2).sum() + penalty).backward()
    except AutoTPError as error:
        return str(error)
    return "nothing"


def test_a_gradient_is_not_lost(pool: Pool) -> None:
    for said in pool.run(graph_before):
        assert "'a.weight' was used before it was replaced" in said


def failed_attempt() -> None:
    """Where parallelize fails everyone holds what they held."""
    m = InTuple()
    hook = Hooked()
    for model in (m, hook):
        model.c = nn.Linear(12, 12)
    before, hooks = dict(m.named_parameters()), list(hook.a.weight._backward_hooks.values())
    outside = nn.Linear(24, 12)
    outside.weight = m.b.weight
    with pytest.raises(PlanError, match="also a parameter of a module outside"):
        autotp.parallelize(m, mesh(), example_inputs={"x": X})
    assert all(p is before[n] for n, p in m.named_parameters())
    assert m.held["all"][0][0] is m.a.weight and m.held["all"][1][0] is m.b.weight and outside.weight is m.b.weight
    shared = nn.Linear(12, 24)
    shared.weight = hook.a.weight
    with pytest.raises(PlanError):
        autotp.parallelize(hook, mesh(), example_inputs={"x": X})
    assert list(hook.a.weight._backward_hooks.values()) == hooks
    del outside
    autotp.parallelize(m, mesh(), example_inputs={"x": X})
    assert m.held["all"][0][0] is m.a.weight and isinstance(m.a.weight, LayoutDTensor)


def test_undone(pool: Pool) -> None:
    pool.run(failed_attempt)


def hooks_stay() -> None:
    """Handles of hooks made before work after; hooks outlive `to`; new ones see whole statistics."""
    torch.manual_seed(0)
    model = Mlp().double()
    handle = model.a.weight.register_hook(lambda g: g * 0)
    kept = model.b.weight.register_hook(lambda g: g * 2)
    autotp.parallelize(model, mesh(), example_inputs={"x": X.double()})
    seen: list[float] = []
    model.a.weight.register_hook(lambda g: seen.append(float(g.std())))
    torch.manual_seed(0)
    plain = Mlp().double()
    plain.b.weight.register_hook(lambda g: g * 2)
    wanted: list[float] = []
    plain.a.weight.register_hook(lambda g: wanted.append(float(g.std())))
    model(X.double()).sum().backward()
    assert float(model.a.weight.grad.full_tensor().abs().max()) == 0
    handle.remove()
    model.zero_grad()
    model.float().double()
    plain.float().double()
    for m in (plain, model):
        m(X.double()).sum().backward()
    grads = autotp.full_grads(model)
    assert all(torch.allclose(p.grad, grads[n], rtol=1e-9) for n, p in plain.named_parameters())
    assert seen[-1] == pytest.approx(wanted[-1], rel=1e-9)
    kept.remove()
    model.zero_grad()
    model(X.double()).sum().backward()
    assert torch.allclose(2 * autotp.full_grads(model)["b.weight"], grads["b.weight"])


def test_hooks_stay(pool: Pool) -> None:
    pool.run(hooks_stay)


class Lookup(nn.Module):
    """A table whose rows are cut; `direct`: looked up by a call in the forward."""

    def __init__(self, rows: int, direct: bool) -> None:
        super().__init__()
        self.embed, self.direct = nn.Embedding(rows, 8, padding_idx=3), direct
        self.head = nn.Linear(8, rows, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed.weight, 3) if self.direct else self.embed(ids)
        return self.head(x.softmax(-1))


def strange_ids() -> dict[str, str]:
    """What a lookup says to ids that one device refuses; nothing where it does not."""
    wrong: dict[str, str] = {}
    for rows in (60, 61):
        for direct in (False, True):
            torch.manual_seed(0)
            plain = Lookup(rows, direct).double()
            good = torch.tensor([[0, 3, rows - 1, 1]])
            parallel = autotp.parallelize(copy.deepcopy(plain), mesh(), example_inputs={"ids": good})
            assert parallel.embed.weight.to_local().shape[0] < rows
            cases = {"-1": good - 1, "rows": good + 1, "far": good * 1000, "bool": good > 0, "float": good * 1.0}
            cases |= {"good": good, "one": good[:, :1], "last": good[:, 2:3], "none": good[:, :0], "int32": good.int()}
            for name, ids in cases.items():
                for record in (False, True):
                    said = []
                    for model in (plain, parallel):
                        model.zero_grad()
                        with torch.set_grad_enabled(record):
                            try:
                                out = model(ids)
                            except (IndexError, RuntimeError) as error:
                                said.append(f"{type(error).__name__}: {error}")
                                continue
                        if record:
                            out.pow(2).sum().backward()
                        weight = model.embed.weight
                        grad = weight.grad.full_tensor() if model is parallel and record else weight.grad
                        said.append((out.detach(), grad))
                    a, b = said
                    same = a == b if isinstance(a, str) or isinstance(b, str) else torch.allclose(a[0], b[0], rtol=1e-12, atol=1e-12)
                    same = same and (isinstance(a, str) or not record or torch.allclose(a[1], b[1], rtol=1e-12, atol=1e-12))
                    if not same:
                        wrong[f"{rows} {direct} {name} {record}"] = f"{a} | {b}"
            if rows == 61 and not direct and torch.distributed.get_world_size() == 2:
                with pytest.raises(Exception, match="out of range"):
                    torch.compile(parallel, backend="aot_eager")(good + 1)
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_ids_outside_of_the_table(pool: Pool, world: int) -> None:
    for wrong in pool.run(strange_ids, world=world, timeout=120.0):
        assert not wrong, wrong


def test_what_holds_parameters_and_cannot_be_changed() -> None:
    """Tuples and frozensets, in one another, are made again; whoever held them holds the new ones."""
    x = torch.randn(2, 16, dtype=torch.float64)

    def rank(_: object) -> None:
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).double()
        up, down = model[0].weight, model[2].weight
        decay = [frozenset((up, down))]
        nested = {"all": (up, (down, frozenset((up,))), decay[0])}
        del up, down
        autotp.parallelize(model, mesh(), example_inputs={"input": x}, check="graph")
        up, down = model[0].weight, model[2].weight
        assert isinstance(up, LayoutDTensor)
        assert up in decay[0] and down in decay[0] and len(decay[0]) == 2
        assert nested["all"][0] is up and nested["all"][1][0] is down
        assert up in nested["all"][1][1] and nested["all"][2] == decay[0]

    run("local", rank, None, 2, 60.0)
