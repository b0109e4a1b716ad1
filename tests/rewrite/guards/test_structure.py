"""What a plan rests on and that changes after parallelize: equal, or an error of the call that would go wrong."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, prune

import autotp
from autotp.api import parallelize_as
from autotp.errors import PlanError
from autotp.testing import assert_equivalent
from autotp.testing.ranks.run import run
from tests.rewrite.guards.guarded import INNER, WIDTH, Change, Use, build, first_gradient, forward, gradients, inputs, outcome, planned
from tests.support.ranks import Pool, mesh


def _over_the_width(x: Tensor) -> Tensor:
    return x.softmax(-1)


class Lora(nn.Module):
    """A Linear and a product of two small ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, 2).double(), nn.Linear(2, base.out_features).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Around(nn.Module):
    """Scales what the module inside returns."""

    def __init__(self, inner: nn.Module, scale: float = 2.0) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


class Reaches(Around):
    """Uses what a module inside of the wrapped one makes."""

    def forward(self, x: Tensor) -> Tensor:
        """Beside the result."""
        return super().forward(x) + self.inner.up(x).mean()


class ReachesByName(Around):
    """The same, by a name."""

    name = "up"

    def forward(self, x: Tensor) -> Tensor:
        """Beside the result."""
        return super().forward(x) + getattr(self.inner, self.name)(x).mean()


def replaced(path: str, make: Callable[[Any], nn.Module]) -> Change:
    """The module at `path` is replaced by what `make` makes of it, with the same new weights on every rank."""

    def change(model: Any) -> None:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(7)
            setattr(owner, name, make(owner.get_submodule(name)))

    return change


def _forward_of(path: str, make: Callable[[Any], Any]) -> Change:
    return lambda model: setattr(model.get_submodule(path), "forward", make(model.get_submodule(path).forward))


def _new(inside: int, outside: int) -> Callable[[Any], nn.Module]:
    return lambda old: nn.Linear(inside, outside).double()


REFUSED: dict[str, tuple[Change, str]] = {
    "a LoRA layer": (replaced("core.blocks.1.attention.q", Lora), "core.blocks.1.attention.q was a Linear .* is a Lora now"),
    "a LoRA layer on a row": (replaced("core.blocks.1.mlp.down", Lora), "core.blocks.1.mlp.down was a Linear"),
    "another Linear": (replaced("core.blocks.0.mlp.down", _new(INNER, WIDTH)), "core.blocks.0.mlp.down was a Linear .* another Linear"),
    "another mlp": (replaced("core.blocks.0.mlp", _new(WIDTH, WIDTH)), "core.blocks.0.mlp was a Mlp"),
    "a wrapper inside": (replaced("core.blocks.0.mlp.up", Around), "core.blocks.0.mlp.up was a Linear .* is a Around now"),
    "a wrapper that reaches inside": (replaced("core.blocks.0.mlp", Reaches), "is a Reaches now, whose code reads up of what it wraps"),
    "a wrapper that reaches by a name": (
        replaced("core.blocks.0.mlp", ReachesByName),
        "is a ReachesByName now, whose code reads something",
    ),
    "other modules of a list": (lambda m: m.core.blocks.__setitem__(0, nn.Identity()), "core.blocks.0 was a Block"),
    "swapped": (lambda m: (a := m.core.blocks[0].attention, *map(a.__setattr__, "qk", (a.k, a.q))), "another Linear"),
    "a block again": (
        lambda m: m.core.blocks.append(m.core.blocks[0]),
        "blocks.2, a Block .* is core.blocks.0 of the parallel model under",
    ),
    "a copy of a block": (
        lambda m: m.core.blocks.append(copy.deepcopy(m.core.blocks[0])),
        "blocks.2, a Block .* holds a rank's part of attention.q.weight of a parallel",
    ),
    "a block again inside": (
        lambda m: m.core.blocks.append(Around(m.core.blocks[1].mlp)),
        "blocks.2, a Around .* has core.blocks.1.mlp of the parallel model in it",
    ),
    "a block for another": (
        lambda m: m.core.blocks.__setitem__(1, m.core.blocks[0]),
        "blocks.1 was a Block .* is another Block now, which is core.blocks.0 of the parallel model under",
    ),
    "gone": (lambda m: m.core.blocks.__delitem__(1), "core.blocks.1, a Block .* is gone"),
    "added inside": (lambda m: m.core.blocks[0].mlp.add_module("more", nn.Linear(2, 2)), "core.blocks.0.mlp.more, a Linear, was added"),
    "parametrized": (lambda m: nn.utils.parametrizations.orthogonal(m.core.blocks[0].mlp.up), "core.blocks.0.mlp.up"),
    "another forward": (_forward_of("core.blocks.0.mlp", lambda old: lambda x: old(x) * 2), "core.blocks.0.mlp .* another forward"),
    "a string of the config": (lambda m: setattr(m.config, "act", "softmax"), "config.act was 'gelu' .* is 'softmax' now"),
    "a number of the config": (lambda m: setattr(m.config, "heads", 2), "config.heads was 4"),
    "a float that a local config hides": (lambda m: setattr(m.config, "scale", 3.0), "core.blocks.0.attention.config.scale was 1.0"),
    "a list": (lambda m: m.core.blocks[1].mlp.order.reverse(), r"core.blocks.1.mlp.order was \[0, 1\]"),
    "a function": (lambda m: setattr(m.core.blocks[1].mlp, "function", _over_the_width), "core.blocks.1.mlp.function was"),
    "a flag": (lambda m: setattr(m.core.blocks[1].mlp, "flip", True), "core.blocks.1.mlp.flip was False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_changes_that_would_give_other_numbers(name: str) -> None:
    change, wanted = REFUSED[name]
    with pytest.raises(AssertionError, match=wanted):
        raise AssertionError(outcome(change))


def _checkpointed(model: Any) -> Tensor:
    """Gradients, with a block that runs again in the backward, where the call begins at the block."""
    block = model.core.blocks[0]
    model.zero_grad()
    x = inputs().requires_grad_()
    model.head(model.core.blocks[1](torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))).sin().sum().backward()
    return first_gradient(model)


def _none(_: Any) -> None:
    pass


def _wrapped_list(model: Any) -> None:
    model.core.blocks = nn.ModuleList(map(checkpoint_wrapper, model.core.blocks))


def _block_of_its_own(model: Any) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        model.core.blocks.append(Around(nn.Linear(WIDTH, WIDTH).double()))


EQUAL: dict[str, tuple[Change, Use]] = {
    "nothing": (_none, gradients),
    "an inner model": (_none, lambda m: m.core(inputs())),
    "a block": (_none, lambda m: m.core.blocks[1](inputs())),
    "checkpointing": (_none, _checkpointed),
    "a checkpoint wrapper": (replaced("core.blocks.0", checkpoint_wrapper), gradients),
    "a checkpoint wrapper inside": (replaced("core.blocks.0.mlp.up", checkpoint_wrapper), gradients),
    "a wrapper of a block": (replaced("core.blocks.0", Around), gradients),
    "a LoRA layer on a whole result": (replaced("core.blocks.0.mlp", Around), gradients),
    "another norm": (replaced("core.blocks.1.norm", lambda old: nn.LayerNorm(WIDTH, eps=0.1).double()), forward),
    "a norm again": (lambda m: m.core.blocks.append(m.core.blocks[1].norm), forward),
    "a module that no call ran, in code on whole values": (replaced("core.spare", lambda old: nn.Tanh()), gradients),
    "a new block": (_block_of_its_own, gradients),
    "a new head": (lambda m: m.add_module("extra", nn.Linear(2, 2)), gradients),
    "a forward that says what it wraps": (_forward_of("core.blocks.0.mlp", lambda old: _scaled(old)), gradients),
    "a compiled forward": (_forward_of("core.blocks.0", lambda old: torch.compile(old, backend="eager")), forward),
    "a rate": (lambda m: setattr(m.core.blocks[1].mlp, "rate", 0.25), gradients),
    "settings of the root": (lambda m: setattr(m.config, "note", "other"), gradients),
    "a list of wrapped blocks": (_wrapped_list, gradients),
    "a list that its code fills": (lambda m: (m(inputs()), m.core.blocks[0].mlp.seen.clear()), gradients),
    "a copy": (_none, lambda m: gradients(copy.deepcopy(m))),
    "a shallow copy": (_none, lambda m: gradients(copy.copy(m))),
    "a block for its copy": (_none, lambda m: copy.deepcopy(m.core.blocks[0])(inputs())),
}


def _scaled(old: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @functools.wraps(old)
    def new(x: Tensor) -> Tensor:
        return old(x) * 2

    return new


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it itself
@pytest.mark.parametrize("name", EQUAL)
def test_changes_that_pass_on_whole_values(name: str) -> None:
    change, use = EQUAL[name]
    assert outcome(change, use) == "equal"
    if name in ("nothing", "checkpointing", "a wrapper of a block"):
        assert outcome(change, use, tp=3) == "equal"


BROKEN = replaced("core.blocks.0.mlp.down", _new(INNER, WIDTH))


@pytest.mark.parametrize(
    "use", [lambda m: m.core(inputs()), lambda m: m.core.blocks[0](inputs()), lambda m: m.core.blocks[0].mlp(inputs())]
)
def test_every_module_that_calls_others_is_guarded(use: Use) -> None:
    assert "core.blocks.0.mlp.down was a Linear" in outcome(BROKEN, use)
    assert outcome(BROKEN, lambda m: m.core.blocks[1](inputs())) == "equal"  # that one is as it was


def _dropping(model: Any) -> None:
    model.train().core.blocks[1].join.p = 0.5


def test_a_dropout_between_summands_that_are_reduced_together() -> None:
    assert "core.blocks.1.join.p was 0.0" in outcome(_dropping, parallel=True)
    assert outcome(lambda m: m.core.blocks[1].drop.__setattr__("p", 0.5), gradients) == "equal"


def test_a_copy_is_watched_by_itself() -> None:
    def broken_copy(model: Any) -> Tensor:
        other = copy.deepcopy(model)
        BROKEN(other)
        return forward(other)

    assert "mlp.down was a Linear" in outcome(_none, broken_copy)

    def beside(model: Any) -> Tensor:
        BROKEN(copy.deepcopy(model))
        return forward(model)

    assert outcome(_none, beside) == "equal"
    assert "core.blocks.0.mlp.down was a Linear" in outcome(BROKEN, lambda m: forward(copy.deepcopy(m)))


def test_a_change_that_is_taken_back() -> None:
    def change(model: Any) -> None:
        mlp = model.core.blocks[0].mlp
        before = mlp.down
        BROKEN(model)
        if hasattr(model, "_autotp"):
            with pytest.raises(autotp.AutoTPError, match=r"mlp\.down"):
                forward(model)
        mlp.down = before

    assert outcome(change, gradients) == "equal"


def _on_processes() -> list[str]:
    """Two changes with real processes, and a module that is not the same on both."""
    import torch.distributed as dist

    found = []
    for change in (BROKEN, replaced("core.blocks.0", Around), _other_weights):
        model = parallelize_as(build(), mesh(), planned(False, 2))
        change(model)
        try:
            found.append(f"{float(forward(model).detach().sum()):.9f}")
        except autotp.AutoTPError as error:
            found.append(str(error))
    dist.barrier()
    return found


def _other_weights(model: Any) -> None:
    torch.manual_seed(torch.distributed.get_rank())
    model.add_module("extra", nn.Linear(2, 2))


def test_on_processes(pool: Pool) -> None:
    first, second = pool.run(_on_processes)
    assert first == second
    whole = build()
    replaced("core.blocks.0", Around)(whole)
    assert "mlp.down was a Linear" in first[0] and first[1] == f"{float(forward(whole).detach().sum()):.9f}"
    assert "extra, a Linear that came after parallelize, has other weights on rank 1" in first[2]


class Tanh(nn.Module):
    """Made of the layers of another module."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.up, self.down = old.up, old.down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Relu(nn.Module):
    """The module that is swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Swapping(nn.Module):
    """Its forward puts another module in the place of one, as BigBird's does for short sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp: nn.Module = Relu()

    def forward(self, x: Tensor) -> Tensor:
        if type(self.mlp) is Relu and x.shape[1] < 64:
            self.mlp = Tanh(self.mlp)
        return x + self.mlp(x)


def test_a_forward_that_swaps_a_module_for_one_of_the_same_layers() -> None:
    x = {"x": torch.randn(2, 3, WIDTH, dtype=torch.float64)}
    assert assert_equivalent(Swapping, tp=2, inputs=x, certificate="graph").plan.local_share < 0.6


def _swapped_by_hand() -> list[str]:
    """What a model says whose module is swapped by its user, before a call and after one."""
    found = []
    for called in (False, True):
        model = Swapping().double()
        x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
        autotp.parallelize(model, mesh(), example_inputs={"x": x}, check="graph")
        if called:
            model(x)
        torch.manual_seed(0)
        model.mlp = Tanh(Relu().double())  # of the class that the forward puts there, but of layers of its own
        try:
            model(x)
            found.append("")
        except autotp.AutoTPError as error:
            found.append(str(error))
    return found


def test_the_same_swap_with_other_layers_is_refused(pool: Pool) -> None:
    for texts in pool.run(_swapped_by_hand):
        assert all("mlp" in text and "knows nothing of this rank's part" in text for text in texts)


class AsksClass(nn.Module):
    """Takes another path where a child is not of the very class that it was made of."""

    def __init__(self, container: bool) -> None:
        super().__init__()
        self.mlp, self.container = Relu(), container

    def forward(self, x: Tensor) -> Tensor:
        usual = type(self.mlp) is Relu if self.container else type(self.mlp.up) is nn.Linear
        return x + self.mlp(x) if usual else x - self.mlp(x).softmax(-1)


def test_code_that_asks_for_a_class() -> None:
    x = {"x": torch.randn(2, 3, WIDTH, dtype=torch.float64)}
    assert assert_equivalent(functools.partial(AsksClass, True), tp=2, inputs=x, certificate="graph").plan.local_share < 0.6


@pytest.mark.parametrize("check", ["graph", "numbers"])
def test_code_that_asks_for_the_class_of_a_linear(check: str) -> None:
    """A Linear of a parallel model is of another class, even where it is whole."""
    with pytest.raises(PlanError, match="AsksClass cannot be made parallel"):
        autotp.plan(AsksClass(False).double(), tp=2, example_inputs={"x": torch.randn(2, 3, WIDTH).double()}, check=check)


# pruning and parametrizations --------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Pair(nn.Module):
    """A region of two Linears, before a norm."""

    def __init__(self, prepare: Callable[[Any], object] = lambda m: None) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.LayerNorm(WIDTH)
        prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.up(x))))


def _globally(model: Any) -> None:
    prune.global_unstructured([(model.up, "weight"), (model.down, "weight")], prune.L1Unstructured, amount=0.2)


def _parametrized(model: Any) -> None:
    parametrize.register_parametrization(model.up, "weight", Doubled())


def _pruned(model: Any) -> None:
    prune.l1_unstructured(model.up, "weight", amount=0.2)


def _taken_off(model: Any) -> None:
    parametrize.remove_parametrizations(model.up, "weight", leave_parametrized=False)


#: What is done before parallelize, and what afterwards.
REFORMED: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "pruned globally": (_none, _globally),
    "pruned": (_none, _pruned),
    "pruned at random": (_none, lambda m: prune.random_unstructured(m.down, "weight", amount=0.2)),
    "pruned by a mask": (_none, lambda m: prune.custom_from_mask(m.up, "weight", torch.ones(INNER, WIDTH))),
    "a pruned norm": (_none, lambda m: prune.l1_unstructured(m.norm, "weight", amount=0.2)),
    "pruning taken off": (_pruned, lambda m: prune.remove(m.up, "weight")),
    "weight norm": (_none, lambda m: nn.utils.weight_norm(m.up)),
    "weight norm taken off": (lambda m: nn.utils.weight_norm(m.up), lambda m: nn.utils.remove_weight_norm(m.up)),
    "spectral norm": (_none, lambda m: nn.utils.spectral_norm(m.down)),
    "a parametrization taken off": (_parametrized, _taken_off),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFORMED)
def test_parameters_keep_their_names(name: str) -> None:
    prepare, change = REFORMED[name]

    def on_rank(_: object) -> str:
        torch.manual_seed(0)
        model = autotp.parallelize(Pair(prepare).double(), mesh(), example_inputs={"x": inputs()}, check="graph")
        before = model(inputs())
        try:
            change(model)
        except autotp.AutoTPError as error:
            changed = "norm" in name and "pruned" not in name  # it takes the weight away before it says what it does
            return str(error) if changed or torch.equal(model(inputs()), before) else "changed"
        return "accepted"

    first, second = run("local", on_rank, None, 2, 60.0)
    assert first == second
    left = "pruning taken off"  # it reads the weight that a forward computed from the parts first
    assert ("is what a forward left there" if name == left else "reparametrize, or take that back, before parallelize") in first


@pytest.mark.parametrize("prepare", [_none, _pruned, _parametrized])
def test_parameters_of_other_names_and_whole_ones(prepare: Callable[[Any], object]) -> None:
    """A parameter that is new, or that takes the place of one, is registered as ever."""

    def result(model: Any) -> Tensor:
        model.up.extra = nn.Parameter(torch.zeros(3))
        del model.norm.weight
        model.norm.weight = nn.Parameter(torch.full((WIDTH,), 2.0).double())
        return model(inputs()).detach()

    def on_rank(_: object) -> Tensor:
        torch.manual_seed(0)
        return result(autotp.parallelize(Pair(prepare).double(), mesh(), example_inputs={"x": inputs()}, check="graph"))

    torch.manual_seed(0)
    wanted = result(Pair(prepare).double())
    for got in run("local", on_rank, None, 2, 60.0):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
