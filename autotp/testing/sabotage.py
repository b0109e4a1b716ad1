"""Mutation control: makes every mistake that a plan could have, each of which `assert_equivalent` must catch.

    for mutation in sabotage.mutations(plan):
        with pytest.raises(NotEquivalent):
            assert_equivalent(factory, tp=2, sabotage=mutation)

`survey` does this for one model. A mistake that no check catches is a hole in the check, or a collective that the plan does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autotp.errors import InputError
from autotp.plan.conversions import Conversion, Op
from autotp.plan.expressions import Expr, Factor, Product, factors, size
from autotp.plan.layout import runs, take
from autotp.plan.names import folded
from autotp.plan.plan import Plan
from autotp.plan.spec import GradSum, ModulePlan, Site, Slot, Use
from autotp.planning import RecipeLike
from autotp.testing.equivalence.check import NotEquivalent, check, check_arguments
from autotp.testing.equivalence.mutation import Damage, Kind, Mutation
from autotp.testing.equivalence.observe import Observed, Training, adamw, observe_model
from autotp.testing.equivalence.subject import Factory, Inputs, Subject, make_subject

__all__ = ["Kind", "Mutation", "Survey", "mutations", "survey"]

Conversions = tuple[Conversion, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """The mistakes that were made in one model: those caught (with the aspects that differed), and those that passed every check."""

    model: str
    tp: int
    caught: tuple[tuple[Mutation, str], ...]
    survived: tuple[Mutation, ...]

    def count(self, kind: Kind) -> tuple[int, int]:
        """Returns (caught, made) of one kind."""
        caught = sum(m.kind is kind for m, _ in self.caught)
        return caught, caught + sum(m.kind is kind for m in self.survived)

    def __str__(self) -> str:
        made = len(self.caught) + len(self.survived)
        counts = {kind: self.count(kind) for kind in Kind}
        lines = [f"{self.model} over tp={self.tp}: {len(self.caught)} of {made} mistakes caught"]
        lines.append("  " + " · ".join(f"{kind.value} {caught}/{all_}" for kind, (caught, all_) in counts.items() if all_))
        return "\n".join([*lines, *(f"  not caught: {m}" for m in self.survived)])


def mutations(plan: Plan, *, every: bool = False) -> tuple[Mutation, ...]:
    """Lists every mistake that applies to `plan`; of those that differ in block numbers only the first, unless `every`.

    Raises:
        InputError: not a plan.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"mutations takes a Plan (autotp.plan, autotp.plan_of), got {type(plan).__name__}")
    if plan.tp == 1:
        return ()
    found: dict[object, Mutation] = {}
    for mutation in _all(plan):
        found.setdefault((mutation.kind, mutation.where if every else folded(mutation.where)), mutation)
    return tuple(found.values())


def survey(
    factory: Factory,
    *,
    tp: int,
    inputs: Inputs | None = None,
    dtype: torch.dtype = torch.float64,
    backend: str = "local",
    timeout: float = 120.0,
    every: bool = False,
    on_mutation: Callable[[Mutation, str], None] | None = None,
    recipe: RecipeLike | None = None,
) -> Survey:
    """Make each mistake in turn, and record whether the check catches it. The arguments are those of `assert_equivalent`.

    A mistake that changes no number here is left out: the sum of a gradient that is zero, another slice of equal numbers.

    Args:
        on_mutation: called with each mistake and the aspects that caught it ("" for none).

    Raises:
        NotEquivalent: the model without a mistake is not equal either. InputError, TraceError, PlanError: as for `assert_equivalent`.
    """
    check_arguments("survey", tp, backend, timeout)
    if on_mutation is not None and not callable(on_mutation):
        raise InputError(f"survey: on_mutation is {on_mutation!r}, wanted a function of a mistake and the aspects that caught it")
    with torch.random.fork_rng(devices=()):
        subject = make_subject(factory, inputs, dtype, 0)
        training = Training(0, adamw)
        wanted = observe_model(subject, training)
    plan = check(subject, wanted, training, tp, backend, timeout, recipe).plan
    caught: list[tuple[Mutation, str]] = []
    survived: list[Mutation] = []
    for mutation in mutations(plan, every=every):
        if not _matters(mutation, subject, wanted, tp):
            continue
        told = ""
        try:
            check(subject, wanted, training, tp, backend, timeout, mutation=mutation, plan=plan)
            survived.append(mutation)
        except NotEquivalent as error:
            told = _told(error)
            caught.append((mutation, told))
        if on_mutation is not None:
            on_mutation(mutation, told)
    return Survey(type(subject.model).__name__, tp, tuple(caught), tuple(survived))


def _matters(mutation: Mutation, subject: Subject, wanted: Observed, tp: int) -> bool:
    """False for the sum of a gradient that is zero everywhere, and for another slice of a buffer that holds the same numbers."""
    if mutation.kind is Kind.SHIFT and mutation.old is not None:
        changed = [(a, b) for a, b in zip(mutation.old.uses, mutation.new[0].uses, strict=True) if a != b]
        return all(_slices_differ(subject.model, a, b, tp) for a, b in changed)
    gradients = wanted.found.get("gradients", {})
    name = mutation.parameter
    if not name:
        return True
    if mutation.damage_by in (Damage.NONE, Damage.SUM_AGAIN):
        grad = gradients.get(name)
        return grad is not None and bool(grad.abs().max() > subject.precision.floor * max(float(g.abs().max()) for g in gradients.values()))
    return True


def _slices_differ(model: nn.Module, one: Use, other: Use, tp: int) -> bool:
    """True where two ways to slice a buffer give some rank other numbers."""
    tensor = getattr(model.get_submodule(one.owner), one.name)
    for a, b in zip(one.conversions, other.conversions, strict=True):
        if a != b and a.dim is not None and a.expr is not None and b.expr is not None and tensor.shape[a.dim] == size(a.expr):
            cut = [[take(tensor, a.dim, runs(e, rank, tp)) for rank in range(tp)] for e in (a.expr, b.expr)]
            return not all(map(torch.equal, *cut))
    return True


def _told(error: NotEquivalent) -> str:
    """Returns the aspects that failed, or the kind of error that a rank ended with."""
    lines = str(error).splitlines()
    aspects = [line.split(":")[0].strip() for line in lines if " differ, the most " in line]
    return ", ".join(aspects) or next(
        (line.split(":")[0] for line in reversed(lines) if line and not line[0].isspace() and ":" in line), "error"
    )


def _all(plan: Plan) -> Iterator[Mutation]:
    for module in plan.modules:
        yield from _of_module(module, plan)
    yield from _of_parameters(plan)


def _of_module(m: ModulePlan, plan: Plan) -> Iterator[Mutation]:
    place = m.path or "<root>"
    for field, word in (("inputs", "argument"), ("outputs", "result")):
        slots: tuple[Slot, ...] = getattr(m, field)
        for i, slot in enumerate(slots):
            name = ".".join(map(str, slot.path)) or "(the tensor)"
            if any(c.op in (Op.HOLD, Op.JOIN) for c in slot.conversions):
                continue  # a joint sum is one collective: see below
            for kind, text, changed in _of_conversions(slot.conversions):
                new = _with(m, field, (*slots[:i], replace(slot, conversions=changed), *slots[i + 1 :]))
                yield Mutation(kind, f"{text} of {word} {name} of {place}", m, (new,))
    yield from _of_joints(m, plan)
    for i, use in enumerate(m.uses):
        name = ".".join(filter(None, (use.owner, use.name)))
        if use.grad is not GradSum.NONE:
            new = replace(m, uses=(*m.uses[:i], replace(use, grad=GradSum.NONE), *m.uses[i + 1 :]))
            yield Mutation(Kind.DROP, f"the gradient's sum of {name} in {place}", m, (new,), parameter=name)
        for kind, text, changed in _of_conversions(use.conversions):
            new = replace(m, uses=(*m.uses[:i], replace(use, conversions=changed), *m.uses[i + 1 :]))
            yield Mutation(kind, f"{text} of {name} as read in {place}", m, (new,))
    for i, attribute in enumerate(m.attributes):
        new = replace(m, attributes=(*m.attributes[:i], *m.attributes[i + 1 :]))
        yield Mutation(Kind.FORGET, f"attribute {attribute.path} of {place}", m, (new,))
    if m.pairs is not None:
        yield Mutation(Kind.DROP, f"the choice of pairs of {place}", m, (replace(m, pairs=None),))
    for i, site in enumerate(m.sites):

        def put(changed: Site, i: int = i) -> ModulePlan:
            return replace(m, sites=(*m.sites[:i], changed, *m.sites[i + 1 :]))

        call = f"call {i} in {site.function.rpartition('.')[2]} of {place}"
        if site.kernel is not None:
            yield Mutation(Kind.DROP, f"the distributed {site.kernel.value} of {call}", m, (put(replace(site, kernel=None)),))
        for field in ("ints", "multiples"):
            numbers: tuple[tuple[int, int, int], ...] = getattr(site, field)
            for j, (_, value, _) in enumerate(numbers):
                new = put(_with(site, field, (*numbers[:j], *numbers[j + 1 :])))
                yield Mutation(Kind.FORGET, f"int {value} of {call}", m, (new,))
        for field in ("inputs", "outputs"):
            pairs: tuple[tuple[int, Conversions], ...] = getattr(site, field)
            for j, (at, conversions) in enumerate(pairs):
                for kind, text, changed in _of_conversions(conversions):
                    new = put(_with(site, field, (*pairs[:j], (at, changed), *pairs[j + 1 :])))
                    yield Mutation(kind, f"{text} of {field[:-1]} {at} of {call}", m, (new,))


def _with(value: Any, field: str, changed: Any) -> Any:
    return replace(value, **{field: changed})


def _of_conversions(conversions: Conversions) -> Iterator[tuple[Kind, str, Conversions]]:
    """Yields (kind, name of the conversion, the conversions with the mistake)."""
    for i, c in enumerate(conversions):
        without = (*conversions[:i], *conversions[i + 1 :])
        if c.row.collectives or c.op is Op.LAZY_GATHER:
            yield Kind.DROP, c.op.value, without
        if c.op in (Op.COPY, Op.REDUCE):
            yield Kind.DOUBLE, c.op.value, (*conversions[:i], c, *conversions[i:])
        if c.op is Op.ONCE:
            yield Kind.BIAS, "the bias", without
        if c.op is Op.SLICE and c.expr is not None and (elsewhere := _elsewhere(c.expr)) is not None:
            yield Kind.SHIFT, "the slice", (*conversions[:i], replace(c, expr=elsewhere), *conversions[i + 1 :])


def _elsewhere(expr: Expr) -> Expr | None:
    """Returns `expr` with a sharded factor's every n-th index on a rank instead of a block of n; None where those are the same."""
    for cut in (f for f in factors(expr) if f.sharded and f.pieces == 1 and not f.of):
        for parts in range(2, cut.size):
            if cut.size % parts == 0:
                major = Factor(f"{cut.name}_major", cut.size // parts)
                changed = _replaced(expr, cut, Product((major, replace(cut, size=parts))))
                if size(changed) == size(expr):
                    return changed
    return None


def _replaced(expr: Expr, old: Factor, new: Expr) -> Expr:
    if isinstance(expr, Factor):
        return new if expr == old else expr
    return replace(expr, parts=tuple(_replaced(p, old, new) for p in expr.parts))


def _of_joints(parent: ModulePlan, plan: Plan) -> Iterator[Mutation]:
    """Yields, for each member of a joint sum, the mistake that its partial sum is neither held nor reduced."""
    modules = {m.path: m for m in plan.modules}
    for i, group in enumerate(parent.joint):
        for member in group[:-1]:
            path = f"{parent.path}.{member}" if parent.path else member
            old = modules[path]
            kept = tuple(s for s in old.outputs if not any(c.op is Op.HOLD for c in s.conversions))
            rest = tuple(n for n in group if n != member)
            joint = (*parent.joint[:i], rest, *parent.joint[i + 1 :])
            yield Mutation(Kind.DROP, f"hold of the result of {path}", parent, (replace(parent, joint=joint), replace(old, outputs=kept)))


def _of_parameters(plan: Plan) -> Iterator[Mutation]:
    for name, p in plan.params.items():
        layout = p.layout
        if name in plan.aliases:
            continue
        if layout.dim is None:
            yield Mutation(Kind.REPEAT, f"the gradient's sum of {name}", None, (), name, Damage.SUM_AGAIN)
            continue
        other = next((r for r in range(1, layout.tp) if layout.runs(r) != layout.runs(0)), None)
        if other is not None:
            yield Mutation(Kind.SWAP, f"shards 0 and {other} of {name}", None, (), name, Damage.SWAP, other)
        if layout.shape[layout.dim] > 1:
            yield Mutation(Kind.SHIFT, f"the shard of {name}", None, (), name, Damage.ROLL)
        if layout.is_shared:
            yield Mutation(Kind.REPEAT, f"the gradient's sum of {name}", None, (), name, Damage.SUM_AGAIN)
