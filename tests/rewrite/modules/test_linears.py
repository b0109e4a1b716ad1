"""Linears that read one tensor run together, and give what they give apart, however they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.rewrite.collectives.comm import GroupComm, Waits
from autotp.rewrite.modules.classes import STATE
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from tests.composition.training import mesh_of
from tests.support.ranks import Pool
from tests.support.slow import swept


class Gated(nn.Module):
    """gate, up and a third read one tensor; `call` says how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.third = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
        self.down, self.call = nn.Linear(12, 8), "as traced"

    def forward(self, x: Tensor) -> Tensor:
        if self.call == "another order":
            third, up, gate = self.third(x), self.up(x), self.gate(x)
        elif self.call == "another tensor":
            gate, up, third = self.gate(x), self.up(x * 2), self.third(x)
        elif self.call == "twice":
            gate, up, third = self.gate(x), self.up(x) + self.up(x), self.third(x) * self.gate(x)
        elif self.call == "not all":
            gate, up = self.gate(x), self.up(x)
            third = gate
        elif self.call == "changed":
            gate = self.gate(x)
            x = x.mul_(0.5) if not x.requires_grad else x * 0.5
            up, third = self.up(x), self.third(x)
        elif self.call == "checkpointed":
            return checkpoint(self.inside, x, use_reentrant=False) + checkpoint(self.inside, x, use_reentrant=True)  # type: ignore[no-any-return]
        elif self.call == "each checkpointed":
            gate, up, third = (checkpoint(m, x, use_reentrant=False) for m in (self.gate, self.up, self.third))
        elif self.call == "one checkpointed":
            gate, up, third = self.gate(x), checkpoint(self.up, x, use_reentrant=False), self.third(x)
        elif self.call == "trained between":
            self.up.weight.requires_grad_(False)
            gate = self.gate(x)
            self.up.weight.requires_grad_()
            up, third = self.up(x), self.third(x)
        elif self.call == "no gradients inside":
            with torch.no_grad():
                gate = self.gate(x)
            up, third = self.up(x), self.third(x)
        else:
            gate, up, third = self.gate(x), self.up(x), self.third(x)
        return self.down(F.silu(gate) * up + third)

    def inside(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) + self.third(x))


class Around(nn.Module):
    """Residuals around it; hooks and tests reach in."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm, self.inner = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), nn.LayerNorm(8), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.start(x)
        return x + self.inner(self.norm(x))


CALLS = (
    "as traced", "another order", "another tensor", "twice", "not all", "changed", "checkpointed", "each checkpointed", "one checkpointed",
    "trained between", "no gradients inside",
)  # fmt: skip
Change = Callable[[Any, Tensor], Any]


def hooked(model: Any, x: Tensor) -> Any:
    """A hook that gives one of them another argument."""
    handle = model.inner.up.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
    try:
        return [model(x)]
    finally:
        handle.remove()


def frozen(model: Any, x: Tensor) -> Any:
    for p in (model.inner.gate.weight, model.inner.third.bias):
        p.requires_grad_(False)
    try:
        return [model(x)]
    finally:
        model.requires_grad_(True)


def replaced(model: Any, x: Tensor) -> Any:
    """Another weight is there when the second is called."""
    whole = torch.linspace(-1, 1, 96, dtype=torch.float64).view(12, 8)
    return [torch.func.functional_call(model, {"inner.up.weight": whole}, (x,)), model(x)]


def hooked_weights(model: Any, x: Tensor) -> Any:
    """A hook changes the weight of one of them before it runs."""

    def before(m: nn.Module, args: Any) -> None:
        m.weight.data.mul_(2.0)  # type: ignore[union-attr, operator]

    handle = model.inner.up.register_forward_pre_hook(before)
    try:
        found = [model(x)]
    finally:
        handle.remove()
        model.inner.up.weight.data.mul_(0.5)
    return found


def twice_derived(model: Any, x: Tensor) -> Any:
    (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    return [first.pow(2)]


def wanted_between(model: Any, x: Tensor) -> Any:
    """Nothing is trained, and a gradient of the input is wanted from the second of them on."""
    seen: list[Tensor] = []
    handle = model.inner.up.register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad_()))
    model.requires_grad_(False)
    try:
        return (*torch.autograd.grad(model(x.detach()).pow(2).sum(), seen), model(x))
    finally:
        handle.remove()
        model.requires_grad_(True)


def constant(model: Any, x: Tensor) -> Any:
    return [model(x.detach())]


def empty(model: Any, x: Tensor) -> Any:
    return [model(x[:0]), model(x[:, :0])]


CHANGES: dict[str, Change] = {
    "hooked": hooked, "hooked weights": hooked_weights, "frozen": frozen, "replaced": replaced, "twice derived": twice_derived,
    "wanted between": wanted_between, "constant": constant, "empty": empty,
}  # fmt: skip


def observed(model: nn.Module, use: Change) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = torch.linspace(-1, 1, 80, dtype=torch.float64).sin().view(2, 5, 8).requires_grad_()
    outs = use(model, x)
    sum((o * torch.linspace(1, 2, o.numel(), dtype=torch.float64).view(o.shape)).sum() for o in outs).backward()  # type: ignore[union-attr]
    grads = (
        autotp.full_grads(model) if hasattr(model.inner.gate.weight, "full_tensor") else {n: p.grad for n, p in model.named_parameters()}
    )  # type: ignore[union-attr]
    found = {"x": x.grad, **{str(i): o.detach() for i, o in enumerate(outs)}, **grads}
    return {name: value for name, value in found.items() if value is not None}


def compared(tp: int, tokens: bool) -> list[str]:
    torch.manual_seed(0)
    alone, said = Around().double(), []
    given = {"x": torch.randn(2, 5, 8, dtype=torch.float64)}
    for call in CALLS:
        alone.inner.call = call
        model = autotp.parallelize(copy.deepcopy(alone), mesh_of(1, tp), example_inputs=given, check="graph", sequence_parallel=tokens)
        found = [(call, lambda m, x: [m(x), m(x)])] + (list(CHANGES.items()) if call == "as traced" else [])
        for name, use in found:
            wanted, got = observed(alone, use), observed(model, use)
            assert wanted.keys() == got.keys(), (name, wanted.keys() ^ got.keys())
            far = {n: float((wanted[n] - got[n]).abs().max()) for n in got if got[n].numel()}
            if not max(far.values()) <= 1e-9:
                said.append(f"{name}: {far}")
        if call == "as traced":
            again = copy.deepcopy(model)
            if again.inner.gate.__dict__[STATE].together.modules[1] is not again.inner.up:
                said.append("a copy has Linears of the model that it was made of")
    return said


@pytest.mark.parametrize(("tp", "tokens"), swept([(tp, tokens) for tp in (2, 3) for tokens in (False, True)], (2, False), (3, True)))
def test_together(pool: Pool, tp: int, tokens: bool) -> None:
    for said in pool.run(compared, tp, tokens, world=tp):
        assert not said, "\n".join(said)


def overlapped(tokens: bool) -> tuple[list[str], bool]:
    """(what begins and ends in a backward, in order; are the bits those of collectives that end at once?)."""
    torch.manual_seed(0)
    model = autotp.parallelize(
        Around().double(), mesh_of(1, 2), example_inputs={"x": torch.randn(2, 5, 8, dtype=torch.float64)}, sequence_parallel=tokens
    )
    order: list[str] = []
    name = "begin_scatter" if tokens else "begin_sum"
    begin, product, results = getattr(GroupComm, name), Tensor.mm, []

    def watched(self: GroupComm, x: Tensor) -> Waits:
        order.append("begun")
        wait = begin(self, x)

        def waited() -> Tensor:
            order.append("waited")
            return wait()

        return waited

    def at_once(self: GroupComm, x: Tensor) -> Waits:
        found = (self.reduce_scatter if tokens else self.all_reduce_)(x)
        return lambda: found

    def mm(self: Tensor, other: Tensor) -> Tensor:
        order.append("product")
        return product(self, other)

    for collective in (watched, at_once):
        setattr(GroupComm, name, collective)
        Tensor.mm = mm  # type: ignore[method-assign]
        try:
            results.append(observed(model, lambda m, x: [m(x)]))
        finally:
            setattr(GroupComm, name, begin)
            Tensor.mm = product  # type: ignore[method-assign]
    order = order[: order.index("waited") + 1]
    return order[order.index("begun") :], all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("tokens", [False, True])
def test_the_sum_runs_beside_the_products_of_weights(pool: Pool, tokens: bool) -> None:
    for order, same in pool.run(overlapped, tokens):
        assert same and order == ["begun", "product", "product", "product", "waited"]


def handed_on() -> list[bool]:
    """What hands outputs on, and what does not."""
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 5, 8, dtype=torch.float64)}
    model: Any = autotp.parallelize(Around().double(), mesh_of(1, 2), example_inputs=given)
    gate, up, third, x = model.inner.gate, model.inner.up, model.inner.third, given["x"].clone()
    group = gate.__dict__[STATE].together
    one, two, three = (group.output(m, x) for m in (gate, up, third))
    found = [one.grad_fn is two.grad_fn is three.grad_fn, group.made is None, group.output(up, x) is None]
    group.output(gate, x)
    found += [group.output(up, x.clone()) is None, group.output(up, x) is not None]
    group.output(gate, x)
    x.mul_(2)
    found.append(group.output(up, x) is None)
    group.output(gate, x)
    with torch.no_grad():
        up.weight.mul_(2)
    return [*found, group.output(up, x) is None, group.output(third, x) is not None]


def test_what_is_handed_on(pool: Pool) -> None:
    assert pool.run(handed_on) == [[True] * 8] * 2


class Branches(Gated):
    """Gives what the three read, and what comes of each by itself."""

    def forward(self, x: Tensor) -> Any:
        x = x + 1
        gate, up, third = self.gate(x), self.up(x), self.third(x)
        return x, self.down(gate), self.down(up), self.down(third)


def branch_by_branch(model: Any, x: Tensor, changed: str = "") -> dict[str, Tensor]:
    """The gradients of a backward of each result, the first of them before a change."""
    model.zero_grad(set_to_none=True)
    h, first, *others = model(x)
    first.pow(2).sum().backward()
    with torch.no_grad():
        for t in {"input": [h], "its weight": [model.up.weight], "weight": [model.gate.weight]}.get(changed, []):
            t.mul_(2)
    for other in others:
        other.pow(2).sum().backward()
    return autotp.full_grads(model) if isinstance(model.gate.weight, LayoutDTensor) else {n: p.grad for n, p in model.named_parameters()}


def branches_compared(tokens: bool) -> dict[str, str]:
    """change → what is said: "equal" and "far" of gradients, or the text of an error."""
    torch.manual_seed(0)
    alone, said = Branches().double(), {}
    given = {"x": torch.randn(2, 5, 8, dtype=torch.float64)}
    for changed in ("", "weight", "its weight", "input"):
        model = autotp.parallelize(copy.deepcopy(alone), mesh_of(1, 2), example_inputs=given, sequence_parallel=tokens)
        try:
            got = branch_by_branch(model, given["x"].clone().requires_grad_(), changed)
        except autotp.AutoTPError as error:
            said[changed] = str(error)
            continue
        own = changed if changed != "input" else ""  # tokens in parts give a whole copy: what changes it leaves them alone
        wanted = branch_by_branch(copy.deepcopy(alone), given["x"].clone().requires_grad_(), own)
        said[changed] = "equal" if all(torch.allclose(wanted[n], got[n], rtol=0, atol=1e-9) for n in wanted) else "far"
    return said


@pytest.mark.parametrize("tokens", [False, True])
def test_a_backward_of_each(pool: Pool, tokens: bool) -> None:
    """As with Linears apart, a backward reads what was saved for it, and no other: a change of that is refused."""
    for said in pool.run(branches_compared, tokens):
        assert said[""] == said["weight"] == "equal", said
        assert "run both before the change" in said["its weight"] and (tokens or "run both before the change" in said["input"]), said
