"""Code on a rank's part is called as it was traced: other flags, masks where there were none and other data are traced too, or refused."""

from __future__ import annotations

import copy
import enum
import functools
from collections import UserDict, deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError
from autotp.rewrite import entry
from autotp.testing.outcome import Outcome, equal_or_refused
from autotp.testing.ranks.run import run
from autotp.testing.tiny.models import randomise
from tests.support.ranks import Pool, mesh

X, MASK = torch.randn(2, 5, 32), torch.ones(5, 5).triu(1).bool()


class Attend(nn.Module):
    """Attention over parts of which a mask and a flag take other paths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, mode: str = "plain", **more: Any) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        w = q @ k.transpose(-1, -2)
        if mask is not None:
            w = w.masked_fill(mask, -1e9)
        if mode == "mixed" or more.get("mixed"):
            w = w - w.mean(1, keepdim=True)
        return self.o((w.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two blocks; `how` says in which way the arguments reach them."""

    def __init__(self, how: str = "position") -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(Attend() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None, mixed: bool = False) -> Tensor:
        for layer in self.layers:
            mode = "mixed" if mixed else "plain"
            if self.how == "position":
                x = x + layer(x, mask, mode)
            elif self.how == "keyword":
                x = x + layer(x, mask=mask, mode=mode)
            else:
                x = x + layer(x, mask=mask, **({"mixed": True} if mixed else {}))
        return x


class Between(nn.Module):
    """The model's own code holds parts between two Linears."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(32, 64), nn.Linear(64, 32), kind

    def forward(self, x: Tensor, bias: Tensor | None = None, options: dict[str, Any] | None = None) -> Tensor:
        if self.kind == "checks" and torch.isnan(x).any():
            raise ValueError("not a number")
        h = self.a(x)
        if bias is not None:
            h = (h + bias).softmax(-1)
        if options is not None and options.get("centred"):
            h = h - h.mean(-1, keepdim=True)
        if self.kind and (x > 100).any():
            h = h - h.mean(-1, keepdim=True)
        return self.b(h)


def build(factory: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = factory()
    randomise(model, seed=3)
    return model


def outcome(factory: Any, inputs: dict[str, Any], tp: int = 2, **more: Any) -> Outcome:
    changed = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in more.items()}
    return equal_or_refused(partial(build, factory), inputs=inputs, tp=tp, more={"changed": changed}, certificate="graph")


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("how", ["position", "keyword", "rest"])
def test_a_flag_that_was_off_is_traced_on(how: str, tp: int) -> None:
    assert outcome(partial(Net, how), {"x": X}, tp, mixed=True).equal is not None


def test_an_argument_that_was_given_is_left_out() -> None:
    assert outcome(Net, {"x": X, "mask": MASK}, mask=None).sharded


@pytest.mark.parametrize("how", ["position", "keyword", "rest"])
def test_a_mask_where_there_was_none_is_refused(how: str) -> None:
    found = outcome(partial(Net, how), {"x": X}, mask=MASK)
    assert (
        "layers.0 (Attend) is called with mask as a tensor of 2 dims (bool); the calls that were traced had mask as None" in found.refused
    )
    assert "a list of several calls" in found.refused


def test_the_models_own_code_too() -> None:
    assert "the model (Between) is called with bias as a tensor of 1 dims" in outcome(Between, {"x": X}, bias=torch.randn(64)).refused
    off = {"x": X, "options": {"centred": False}}
    assert "options as a dict (centred: True)" in outcome(Between, off, options={"centred": True}).refused


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("kind", ["asks", "checks"])
def test_what_code_asks_of_data_is_traced_both_ways(kind: str, tp: int) -> None:
    assert outcome(partial(Between, kind), {"x": X}, tp, x=X + 200).equal is not None


def several(how: str) -> list[float]:
    """Plan with two calls; both are equal, and so is their gradient."""
    plain = build(partial(Net, how)).double()
    parallel = copy.deepcopy(plain)
    x = X.double()
    autotp.parallelize(parallel, mesh(), example_inputs=[{"x": x}, {"x": x, "mask": MASK}])
    assert autotp.plan_of(parallel).local_share < 0.6
    errors = []
    for call in ({"x": x}, {"x": x, "mask": MASK}):
        wanted, got = plain(**call), parallel(**call)
        wanted.square().sum().backward()
        got.square().sum().backward()
        errors.append(float((wanted - got).abs().max()))
    grads = autotp.full_grads(parallel)
    return [*errors, *(float((p.grad - grads[n]).abs().max()) for n, p in plain.named_parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", ["position", "rest"])
def test_several_calls_are_planned_for(pool: Pool, how: str) -> None:
    assert max(max(errors) for errors in pool.run(several, how)) < 1e-9


def test_bad_calls_in_a_list() -> None:
    with pytest.raises(AutoTPError, match="forward takes no 'y'"):
        autotp.plan(Net(), tp=2, example_inputs=[{"x": X}, {"y": X}])
    with pytest.raises(AutoTPError, match="wanted a mapping"):
        autotp.plan(Net(), tp=2, example_inputs=[])


def test_without_the_guard_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(entry, "install_called", lambda *_: None)
    with pytest.raises(AssertionError, match=r"output changed|differ"):
        outcome(Between, {"x": X, "options": {"centred": False}}, options={"centred": True})


class Chosen(nn.Module):
    """What happens between two Linears is chosen by an argument."""

    def forward(self, x: Tensor, act: Any = torch.relu, dim: int = 1, steps: tuple[int, ...] = (1,)) -> Tensor:
        h = act(self.a(x))
        return self.b(h.softmax(dim) * sum(steps))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)


class ById(nn.Module):
    """Another path for some ids, which are known while tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(16, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.a(self.e(ids))
        if (ids == 7).any():
            h = h - h.mean(-1, keepdim=True)
        return self.b(h)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"act": partial(torch.softmax, dim=-1)}, "act as the function"),
        ({"act": lambda h: h - h.mean(-1, keepdim=True)}, "act as the function"),
        ({"dim": -1}, "dim as -1; the calls that were traced had dim as 1"),
        ({"steps": (1, 2)}, r"steps as a tuple (1, 2)"),
        ({"x": X[0]}, "x as a tensor of 2 dims"),
    ],
)
def test_functions_numbers_and_dims_count(changed: dict[str, Any], says: str) -> None:
    assert says in outcome(Chosen, {"x": X}, **changed).refused


class Norm(enum.Enum):
    NO = "no"
    YES = "yes"


class Level(enum.IntEnum):
    NO = 0
    YES = 1


@dataclass
class Options:
    norm: bool = False


class Batch:
    """An object that is no container: its flags count."""

    def __init__(self, norm: bool) -> None:
        self.norm, self.x = norm, torch.zeros(3)


class Slots:
    """An object without a `__dict__`."""

    __slots__ = ("norm",)

    def __init__(self, norm: bool) -> None:
        self.norm = norm

    def says(self) -> bool:
        return self.norm


#: question → (what says no, what says yes)
QUESTIONS: dict[str, tuple[Any, Any, Any]] = {
    "a member": (lambda k: k is Norm.YES, Norm.NO, Norm.YES),
    "a member that is an int": (lambda k: k == Level.YES, Level.NO, Level.YES),
    "a field": (lambda k: k.norm, Options(), Options(norm=True)),
    "a flag of an object": (lambda k: k.norm, Batch(False), Batch(True)),
    "a tensor of an object": (lambda k: k.mask is not None, SimpleNamespace(mask=None), SimpleNamespace(mask=torch.ones(()))),
    "an object of an object": (
        lambda k: k.inner.norm,
        SimpleNamespace(inner=SimpleNamespace(norm=False)),
        SimpleNamespace(inner=SimpleNamespace(norm=True)),
    ),
    "a slot": (lambda k: k.norm, Slots(False), Slots(True)),
    "a key of a mapping": (lambda k: "norm" in k, UserDict(x=1.0), UserDict(x=1.0, norm=1.0)),
    "an item of a deque": (lambda k: "norm" in k, deque(["x"]), deque(["norm"])),
    "a range": (lambda k: len(k) > 2, range(2), range(3)),
    "what a function encloses": (lambda k: k(), *(functools.partial(lambda yes: lambda: yes, y)() for y in (False, True))),
    "a default": (lambda k: k(), *((lambda y: lambda yes=y: yes)(y) for y in (False, True))),
    "a method": (lambda k: k(), Slots(False).says, Slots(True).says),
    "the class of numbers of a mask": (lambda k: k.dtype is torch.bool, torch.ones(()), torch.ones(()).bool()),
    "None for a tensor": (lambda k: k is None, torch.ones(()), None),
    "a flag of numpy's": (bool, numpy.bool_(False), numpy.bool_(True)),
    "a set": (lambda k: "norm" in k, {"x"}, {"x", "norm"}),
    "a dtype": (lambda k: k is torch.float32, torch.float64, torch.float32),
    "a key": (lambda k: "norm" in k, {"x": 1.0}, {"x": 1.0, "norm": 1.0}),
}


class Asked(nn.Module):
    """Mixes what is between two Linears if the argument says so."""

    def __init__(self, question: Any) -> None:
        super().__init__()
        self.a, self.b, self.question = nn.Linear(32, 64), nn.Linear(64, 32), question

    def mixed(self, h: Tensor, yes: bool) -> Tensor:
        return h.softmax(-1) if yes else torch.relu(h)

    def forward(self, x: Tensor, k: Any) -> Tensor:
        return self.b(self.mixed(self.a(x), self.question(k)))


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_objects_hold_counts(name: str) -> None:
    question, no, yes = QUESTIONS[name]
    found = outcome(partial(Asked, question), {"x": X, "k": no}, k=yes)
    assert "is called with k as" in found.refused
    assert outcome(partial(Asked, question), {"x": X, "k": no}, k=no).sharded  # the same again


class Rest(Asked):
    """Arguments that have no name of their own; a `Net` hands them on."""

    def __init__(self, how: str) -> None:
        super().__init__(None)
        self.how = how

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.how == "positions":
            yes = bool(args)
        elif self.how == "a helper":
            return self.b(self.helper(self.a(x), **kwargs))
        else:
            yes = bool(kwargs)
        return self.b(self.mixed(self.a(x), yes))

    def helper(self, h: Tensor, norm: bool = False) -> Tensor:
        return self.mixed(h, norm)


def hidden(function: Any) -> Any:
    """A decorator that says nothing of what it wraps."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return call


class Decorated(Rest):
    @hidden
    def forward(self, x: Tensor, norm: bool = False) -> Tensor:
        return self.b(self.mixed(self.a(x), norm))


class Around(nn.Module):
    def __init__(self, inner: Any, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner(how), how

    def forward(self, x: Tensor, norm: Any = None) -> Tensor:
        if norm is None or norm.dim():
            return self.inner(x)
        return self.inner(x, True) if self.how == "positions" else self.inner(x, norm=True)


@pytest.mark.parametrize("inner", [Rest, Decorated])
@pytest.mark.parametrize("how", ["positions", "a helper", "any keyword"])
def test_arguments_without_a_name_count(how: str, inner: Any) -> None:
    found = outcome(partial(Around, inner, how), {"x": X}, norm=torch.ones(()))
    assert f"inner ({inner.__name__}) is called with" in found.refused
    assert outcome(partial(Around, inner, how), {"x": X}, norm=torch.ones(1)).sharded


class Pair(Asked):
    def forward(self, x: Tensor, p: bool = False, q: bool = False, m: Tensor | None = None) -> Tensor:
        return self.b(self.mixed(self.a(x) if m is None else self.a(x) * m, p and (q or m is not None)))


@pytest.mark.parametrize("more", [{"q": True}, {"m": torch.ones(()).double()}])
def test_what_is_given_together_counts(more: dict[str, Any]) -> None:
    x = X.double()
    plain = build(partial(Pair, None)).double()

    def rank(_: object) -> str:
        model = copy.deepcopy(plain)
        autotp.parallelize(model, mesh(), example_inputs=[{"x": x}, {"x": x, "p": True}, {"x": x, **more}], check="graph")
        for call in ({}, {"p": True}, more):
            assert (model(x, **call) - plain(x, **call)).abs().max() < 1e-9
        with pytest.raises(AutoTPError) as refused:
            model(x, p=True, **more)
        return str(refused.value)

    assert "but not together with the others" in run("local", rank, None, 2, 60.0)[0]


class AsksDims(Asked):
    """Asks for the number of dims in a method of its own."""

    def helper(self, h: Tensor) -> Tensor:
        return self.mixed(h, h.dim() == 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.helper(self.a(x)))


def test_another_class_of_numbers_is_refused_after_the_code_has_had_its_say() -> None:
    """Where one device refuses it, its own error comes first: `tests/test_held.py` looks at that."""
    asks = partial(Asked, lambda k: k.dtype is torch.bool)
    found = outcome(asks, {"x": X, "k": torch.ones(()).int()}, k=torch.ones(()).bool())
    assert "k as a tensor of 0 dims (bool); the calls that were traced had k as a tensor (int)" in found.refused


def test_dims_that_a_method_asks_for_count() -> None:
    assert "x as a tensor of 2 dims" in outcome(partial(AsksDims, None), {"x": X}, x=X[0]).refused


class HandsSizes(nn.Module):
    """Hands on sizes, and more tensors for fewer tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sizes(None)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.shape, (x.shape[0], x.shape[1] * 2), [x, x] if x.shape[1] > 4 else [x, x, x])


class Sizes(Asked):
    def forward(self, x: Tensor, size: Any, pair: Any, parts: Any) -> Tensor:
        h = self.a(x).reshape(size[0], size[1], -1).repeat(1, pair[1] // size[1], 1)
        return self.b(torch.relu(h)) + sum(p.sum() for p in parts)


def test_sizes_may_be_others() -> None:
    assert outcome(HandsSizes, {"x": X}, x=X[:, :3]).sharded


def test_a_function_that_holds_a_tensor() -> None:
    act = partial(torch.add, torch.ones(()).double())
    assert outcome(partial(Chosen), {"x": X, "act": act}, act=act).sharded


def test_known_data_may_be_other_data() -> None:
    assert outcome(ById, {"ids": torch.zeros(2, 5).long()}, ids=torch.full((2, 5), 7)).equal is not None


class Elementwise(nn.Module):
    """What works on any number of dims may be called with any."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_other_numbers_of_dims_where_they_do_not_matter() -> None:
    assert outcome(Elementwise, {"x": X}, x=X[0]).sharded


class Filling(nn.Module):
    """Leaves a value between two Linears in what its caller gave it, or in a list of its own that a user may change."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(32, 64), nn.Linear(64, 32), how
        self.more: list[Any] = []

    def forward(self, x: Tensor, out: Any = None) -> Tensor:
        h = torch.relu(self.a(x))
        for function in self.more:
            h = function(h)
        if self.how == "list":
            out.append(h)
        elif self.how == "dict":
            out["h"] = [h]
        elif self.how == "object":
            out.h = h
        return self.b(h)


GIVEN = {"list": list, "dict": dict, "object": SimpleNamespace}


def filled(how: str) -> float:
    def taken(out: Any) -> Tensor:
        found: Tensor = out[0] if how == "list" else out["h"][0] if how == "dict" else out.h
        return found

    plain = build(partial(Filling, how)).double()
    parallel, example = copy.deepcopy(plain), GIVEN[how]()
    autotp.parallelize(parallel, mesh(), example_inputs={"x": X.double(), "out": example}, check="graph")
    assert example == GIVEN[how]()  # it is as it was given
    one, other = GIVEN[how](), GIVEN[how]()
    error = (plain(X.double(), one) - parallel(X.double(), other)).abs().max()
    return max(float(error), float((taken(one) - taken(other)).abs().max()))


@pytest.mark.parametrize("how", GIVEN)
def test_what_a_call_leaves_in_its_arguments_is_whole(pool: Pool, how: str) -> None:
    assert max(pool.run(filled, how)) < 1e-9


def listed() -> str:
    model = build(partial(Filling, "")).double()
    autotp.parallelize(model, mesh(), example_inputs={"x": X.double()})
    assert autotp.plan_of(model).local_share < 0.6
    model(X.double())
    model.more.append(partial(torch.softmax, dim=-1))  # type: ignore[union-attr]
    return failure(lambda: model(X.double()))


def test_a_list_of_functions_that_was_empty(pool: Pool) -> None:
    assert "more was [] when the model was made parallel" in pool.run(listed)[0]


def alone() -> list[str]:
    torch.manual_seed(0)
    model = build(Elementwise).double()
    model.c = nn.Sequential(nn.Linear(2, 2)).double()  # type: ignore[assignment]
    plain = copy.deepcopy(model)
    autotp.parallelize(model, mesh(), example_inputs={"x": X.double()})
    for each in (model, copy.deepcopy(model)):
        assert (plain(X.double()) - torch.utils.checkpoint.checkpoint(each, X.double(), use_reentrant=False)).abs().max() < 1e-9
    model(X.double().requires_grad_()).sum().backward()
    return [
        failure(lambda: model.a(X.double())),
        failure(lambda: model.b(torch.randn(2, 64).double())),
        failure(lambda: model.c(X[..., :2].double())),
    ]


def test_a_module_that_gives_a_part_is_not_called_by_itself(pool: Pool) -> None:
    for first, second, third in pool.run(alone):
        assert "a (Linear) is called outside of a call of the model: its result is a rank's part" in first
        assert "b (Linear) is called outside of a call of the model: its argument input is a rank's part" in second
        assert third == ""


class Attending(nn.Module):
    """Its result has the weights of its heads, where they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, weights: bool = False, named: bool = True) -> Any:
        y = torch.tanh(self.q(x))
        if not named:
            return (self.o(y), y) if weights else (self.o(y),)
        return {"y": self.o(y), "weights": {"first": y}} if weights else {"y": self.o(y)}


class Asks(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.block, self.named = Attending(), named

    def forward(self, x: Tensor, weights: bool = False) -> Tensor:
        found = self.block(x, weights=weights, named=self.named)
        (y, *more) = (found["y"], *found.get("weights", {}).values()) if self.named else found
        return y + sum(w.square().sum(-1, keepdim=True) for w in more)


def named_results(named: bool) -> tuple[float, list[str]]:
    torch.manual_seed(0)
    model = build(partial(Asks, named)).double()
    plain = copy.deepcopy(model)
    autotp.parallelize(model, mesh(), example_inputs={"x": X.double()})
    assert autotp.plan_of(model).local_share < 0.6
    error = max(float((plain(X.double(), w) - model(X.double(), w)).abs().max()) for w in (False, True))
    without = failure(lambda: model.block(X.double(), named=named))
    if not without:
        found, wanted = model.block(X.double(), named=named), plain.block(X.double(), named=named)
        error = max(error, float((found["y"] - wanted["y"]).abs().max()))
    asked = failure(lambda: model.block(X.double(), weights=True, named=named))
    if not asked:
        found, wanted = model.block(X.double(), weights=True), plain.block(X.double(), weights=True)
        error = max(error, float((found["weights"]["first"] - wanted["weights"]["first"]).abs().max()))
    return error, [without, asked]


def test_a_part_that_has_a_name_is_made_whole(pool: Pool) -> None:
    text = "block (Attending) is called outside of a call of the model: its result {} is a rank's part"
    for error, (without, asked) in pool.run(named_results, True):
        assert error < 1e-9 and without == asked == ""
    for error, (without, asked) in pool.run(named_results, False):
        assert error < 1e-9 and text.format("1") in without and text.format("1") in asked


def failure(call: Any) -> str:
    try:
        call()
    except AutoTPError as error:
        return str(error)
    return ""


class Flags(Asked):
    def forward(self, x: Tensor, p: bool = False, q: bool = False) -> Tensor:
        return self.b(self.mixed(self.a(x), p and q))


def test_all_flags_are_turned_together_too() -> None:
    assert outcome(partial(Flags, None), {"x": X}, p=True, q=True).equal is not None
