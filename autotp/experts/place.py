"""Deals experts whole over the ranks where that is asked for and proven.

    with_experts(plan, model, …, asked) → plan

The plan is proven already, with the width inside each expert cut. Of each module of experts in it, autotp looks at the parameters and
the boundary in the plan (`autotp.plan.experts.why_not`), at its calls (`autotp.experts.calls`), and at its numbers
(`autotp.experts.prove`). Then the whole model is compared once more. What fails keeps its width plan, and a note says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from autotp.errors import AutoTPError
from autotp.examine import TWIN_FROM, Check
from autotp.experts.calls import Watched, watch
from autotp.experts.prove import Proven, counting, proven
from autotp.experts.worth import narrowest, why_width
from autotp.hugging_face import is_hugging_face
from autotp.inputs.paths import calls_to_trace, settled
from autotp.numeric.check import MOST_RANKS, judge, too_large
from autotp.numeric.subject import CannotRun
from autotp.plan.experts import Routing, count_of, expert_modules, own_params, why_not, with_whole_experts
from autotp.plan.names import folded
from autotp.plan.placements import Experts
from autotp.plan.plan import Plan
from autotp.plan.spec import Shown
from autotp.planner.make_plan import make_plan
from autotp.trace.example import Given
from autotp.twin.build import NoTwin, twin_of


def with_experts(plan: Plan, model: nn.Module, inputs: Given | None, check: Check, asked: Experts) -> Plan:
    """Returns `plan` with experts dealt whole where `asked` for. The model is left as it was.

    `inputs`, `check`: as the plan was made with.
    """
    if asked is Experts.WIDTH or plan.tp == 1:
        return plan
    paths = expert_modules(plan)
    if not paths:
        return _noted(plan, [f"experts={asked.value!r} changes nothing: no module has sharded parameters [experts, out, in]"])
    reasons = {path: why_not(plan, path) for path in paths}
    if asked is Experts.AUTO:
        reasons |= {path: why_width(plan, path) for path in paths if not reasons[path]}
    kept = [path for path in paths if not reasons[path]]
    found: dict[str, Routing] = {}
    if kept:
        try:
            found, more = _proven(plan, model, inputs, check, kept)
            reasons |= more
        except _Unknown as error:
            reasons |= dict.fromkeys(kept, str(error))
    return _noted(with_whole_experts(plan, found), _notes(plan, found, reasons, asked))


class _Unknown(Exception):
    """Nothing can be run that would prove anything; says why."""


def _proven(
    plan: Plan, model: nn.Module, inputs: Given | None, check: Check, paths: list[str]
) -> tuple[dict[str, Routing], dict[str, str]]:
    """Returns the modules among `paths` whose experts may be dealt whole, and why the others may not."""
    large = too_large(model, min(plan.tp, MOST_RANKS))
    bare = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    shrunk = is_hugging_face(model) and (bool(large) or sum(p.numel() for p in model.parameters()) > TWIN_FROM)
    try:
        if shrunk:
            return _by_twin(plan, model, twin_of(model, plan.tp, smaller=True), check, paths)
        subject = twin_of(model, plan.tp, smaller=False) if is_hugging_face(model) and bare else model
    except NoTwin as error:
        if large:
            raise _Unknown(f"{large}, and {error}") from error
        subject = model
    if large:
        raise _Unknown(f"{large}, and only a transformers model has a smaller twin")
    return _judged(plan, subject, inputs, check, paths)


def _by_twin(plan: Plan, model: nn.Module, twin: nn.Module, check: Check, paths: list[str]) -> tuple[dict[str, Routing], dict[str, str]]:
    """As `_proven`, by the modules of a smaller `twin` that stand at the same places."""
    try:
        small = make_plan(twin, plan.tp, replayed=False)
    except AutoTPError as error:
        raise _Unknown(f"a smaller twin of the model cannot be planned ({error})") from error
    here = {path: why_not(small, path) for path in expert_modules(small)}
    found, reasons = _judged(small, twin, None, check, [path for path, reason in here.items() if not reason])
    reasons |= {path: reason for path, reason in here.items() if reason}
    return _moved(plan, model, paths, found, reasons)


def _moved(
    plan: Plan, model: nn.Module, paths: Iterable[str], found: Mapping[str, Routing], reasons: Mapping[str, str]
) -> tuple[dict[str, Routing], dict[str, str]]:
    """What was found in a twin, at the places of the model that are alike but for the numbers of blocks."""
    why = {folded(path): reason for path, reason in reasons.items()}
    routings: dict[str, set[Routing]] = {}
    for path, routing in found.items():
        routings.setdefault(folded(path), set()).add(routing)
    out: dict[str, Routing] = {}
    left: dict[str, str] = {}
    for path in paths:
        there = routings.get(folded(path), set())
        if folded(path) in why or len(there) != 1:
            left[path] = f"in a smaller twin, {why.get(folded(path), 'it has no counterpart')}"
            continue
        (routing,) = there
        missing = [name for name in routing.attributes if name not in counting(model.get_submodule(path), count_of(plan, path))]
        if missing:
            left[path] = f"{missing[0]} is not the number of its experts, as it is in a smaller twin"
        else:
            out[path] = routing
    return out, left


def _judged(
    plan: Plan, subject: nn.Module, inputs: Given | None, check: Check, paths: list[str]
) -> tuple[dict[str, Routing], dict[str, str]]:
    """As `_proven`, by a model that can be run; `plan` is its own."""
    try:
        seen = watch(subject, tuple(settled(calls_to_trace(subject, inputs))), paths)
    except CannotRun as error:
        raise _Unknown(str(error)) from error
    results = _each(subject, seen, paths, plan)
    found = {path: result.routing for path, result in results.items() if result.routing is not None}
    reasons = {path: result.problem for path, result in results.items() if result.routing is None}
    while found and check is Check.NUMBERS:
        verdict = judge(subject, seen.examples, with_whole_experts(plan, found))
        if verdict.module is None:
            break
        wrong = [path for path in found if path == verdict.module] or list(found)
        for path in wrong:
            reasons[path] = f"with them the {verdict.reason}" if verdict.reason.startswith("code") else verdict.reason
            del found[path]
    return found, reasons


def _each(subject: nn.Module, seen: Watched, paths: list[str], plan: Plan) -> dict[str, Proven]:
    """Proves each module; those that are alike but for the numbers of blocks once."""
    known: dict[object, Proven] = {}
    out: dict[str, Proven] = {}
    for path in paths:
        module, one = subject.get_submodule(path), seen.modules[path]
        if one.problem or one.call is None or one.routing is None:
            out[path] = Proven(None, one.problem)
            continue
        if apart := [name for name in sorted(one.inner) if not _on_parts(plan, f"{path}.{name}".lstrip("."))]:
            out[path] = Proven(None, f"{apart[0]} inside of it gets whole tokens, and hooks on it would get pairs")
            continue
        shapes = tuple((n.rpartition(".")[2], p.layout.shape) for n, p in own_params(plan, path).items())
        key = (type(module), folded(path), shapes, one.routing, counting(module, count_of(plan, path)))
        if key not in known:
            known[key] = proven(module, one.call, one.routing, min(plan.tp, MOST_RANKS), seen.precision)
        out[path] = known[key]
    return out


def _on_parts(plan: Plan, path: str) -> bool:
    """True for a module on which no hook is allowed: it takes or gives a rank's part already."""
    return any(b.shown is not Shown.GRADIENT for b in plan.boundaries.get(path, ()))


def _notes(plan: Plan, found: Mapping[str, Routing], reasons: Mapping[str, str], asked: Experts) -> list[str]:
    """One sentence for the modules whose experts are dealt whole, and one for each reason why others are not."""
    notes: list[str] = []
    for path in dict.fromkeys(map(folded, found)):
        first = next(p for p in found if folded(p) == path)
        count = count_of(plan, first)
        text = f"{path}: its {count} experts are dealt whole, {-(-count // plan.tp)} to a rank"
        if asked is Experts.AUTO:
            text += f", because products would be {narrowest(plan, first)} wide with the width cut"
        notes.append(text)
    by_reason: dict[tuple[str, str], None] = {
        (folded(path), reason): None for path, reason in reasons.items() if path not in found and reason
    }
    return [
        *notes,
        *(f"{path}: the width of its experts is cut, and experts={asked.value!r} changes nothing: {why}" for path, why in by_reason),
    ]


def _noted(plan: Plan, notes: list[str]) -> Plan:
    return replace(plan, notes=(*plan.notes, *notes))
