"""Makes the plan of a model: trace, find the axes, choose and realise, replay. A region that fails its replay is un-sharded and
planned again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import nn

from autotp.axes.find import find_axes, keep
from autotp.errors import PlanError, TraceError
from autotp.inputs.facts import Guess
from autotp.inputs.paths import calls_to_trace, calls_with, settled
from autotp.inputs.search import search
from autotp.inputs.unread import calls_for_unread
from autotp.numeric.untouched import one_thread
from autotp.plan.layout import Layout, replicated
from autotp.plan.plan import Plan
from autotp.plan.spec import ParamPlan
from autotp.planner.assemble import Draft
from autotp.planner.bans import Accused, Bans
from autotp.planner.certificate import replay, traced
from autotp.planner.local_ints import Hints
from autotp.planner.lone import lone_products
from autotp.planner.placements import GraphIndex
from autotp.planner.repeats import differing, lift
from autotp.planner.requested import by_value
from autotp.planner.solve import solve
from autotp.planner.uncalled import with_uncalled
from autotp.trace.example import Example, Given
from autotp.trace.graph import Graph
from autotp.trace.keep import undisturbed
from autotp.trace.memo import Known
from autotp.trace.reading import has_forward_of
from autotp.trace.repeats import alike_blocks
from autotp.trace.run import trace

MAX_REPLAYS = 64


@dataclass(frozen=True, slots=True)
class Examined:
    """The result of an examination of a plan: `checked` as in `Plan.checked`, the `wrong` modules, and whether all
    calls of the model or a twin were `run`.
    """

    checked: str
    wrong: tuple[Accused, ...] = ()
    run: bool = False


#: Looks at a plan that passed its replay, with the calls that were traced.
Examine = Callable[[Plan, tuple[Example, ...]], Examined]


_NOT_EVEN_WHOLE = "cannot be made parallel, even with everything whole on each rank"


def _only_replayed(plan: Plan, examples: tuple[Example, ...]) -> Examined:
    return Examined("graph only")


@contextmanager
def _lean() -> Iterator[None]:
    """Runs its block without garbage collection, compilation and further threads.

    Planning makes many small objects and no cycles worth a pass over the whole model's objects, and runs compiled code a few times only.
    It computes with small tensors alone.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        with torch.compiler.set_stance("force_eager"), one_thread():
            yield
    finally:
        if was:
            gc.enable()


@_lean()
def make_plan(
    model: nn.Module,
    tp: int,
    inputs: Given | None = None,
    wanted: Mapping[str, Layout] | None = None,
    hints: Hints | None = None,
    examine: Examine = _only_replayed,
    *,
    replayed: bool = True,
    runs: bool = False,
    apart: frozenset[str] = frozenset(),
) -> Plan:
    """The certified plan of `model` over `tp` ranks. The model is left as it was.

    `wanted`: layouts by name that it is to have where that can be proven; compare the plan's own with them. The rest is planned
    around them. `hints`: local values of attributes that are taken where they do (module, path). `examine`: says what is wrong with a
    plan that passed its replay; it is then planned again without that. `replayed`: False leaves the replay out, where the examination
    is all that is wanted. `runs`: the examination runs all calls with numbers, or says that it did not. `apart`: modules that are to
    be regions of their own.

    Raises:
        InputError: example inputs are needed or do not fit. TraceError: the model cannot be run on fake tensors.
    """
    if tp == 1:
        return whole_plan(model, "tp is 1")
    with undisturbed(model):
        return _certified(model, tp, inputs, wanted or {}, hints, examine, replayed, runs, apart)


def _certified(
    model: nn.Module,
    tp: int,
    inputs: Given | None,
    wanted: Mapping[str, Layout],
    hints: Hints | None,
    examine: Examine,
    replayed: bool,
    runs: bool,
    apart: frozenset[str],
) -> Plan:
    made = next((path for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if made is not None:
        raise TraceError(
            f"{made or 'the model'} is made by torch.jit, whose code cannot be traced: build it without torch.jit.script or trace"
        )
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    name = type(model).__name__
    alike = {b: t for b, t in alike_blocks(model).items() if not differing(b, t, wanted, shapes)}
    known: Known = {}
    examples, graph = traced_calls(model, inputs, alike, known)
    space = GraphIndex(find_axes(graph), apart)
    asked = by_value(graph.params, wanted)
    bans = Bans({})
    linears = frozenset(path for path, m in model.named_modules() if has_forward_of(type(m), nn.Linear))
    plain = solve(space, tp, bans, name, linears, asked, hints)
    first: Draft | None = plain
    if lone := lone_products(plain, tp, sum(p.numel() for p in model.parameters()), asked):
        ends, bans_there = GraphIndex(find_axes(graph, lone), apart), Bans({})
        alone = solve(ends, tp, bans_there, name, linears, asked, hints)
        # An axis that ends is missing behind its module, which may cost more than it saves. A layout that is asked for is met first.
        if asked or alone.plan.local_share < plain.plan.local_share:
            space, bans, first = ends, bans_there, alone
    few = runs
    for attempt in range(MAX_REPLAYS + 1):
        before = bans.size
        draft = first or solve(space, tp, bans, name, linears, asked, hints)
        first = None
        plan = lift(draft.plan, shapes, graph.repeats, shapes)
        again = partial(replay, model, examples, draft, dict(plan.params), tp, known)
        difference, found = again(few=few) if replayed else None, None
        if difference is None or not draft.choice.on:
            plan = with_uncalled(plan, draft, model)
            with undisturbed(model) if few else nullcontext():  # another replay begins where the first one did
                found = examine(plan, traced(examples, graph))
            if replayed and few and difference is None and not found.run:  # then the replay is all that is known of a call
                difference = again()
        few = few and difference is None  # the replay of all calls stops after the first, where most differences are
        if difference is not None and draft.choice.on:
            bans.blame(space, draft.choice, difference.node, difference.reason)
            reason = f"{difference.reason}: {difference.node}"
        else:
            assert found is not None
            if difference is not None and not found.run:  # nothing is sharded, and no run says that all is well
                raise PlanError(f"{name} {_NOT_EVEN_WHOLE}: {difference.reason}: {difference.node}")
            if not found.wrong:
                return replace(plan, checked=found.checked, settings=_settings(traced(examples, graph)))
            if not draft.choice.on:
                raise PlanError(f"{name} {_NOT_EVEN_WHOLE}: {found.wrong[0].reason}")
            for accused in found.wrong:
                bans.accuse(space, draft.choice, accused)
            reason = found.wrong[0].reason
        if bans.size == before or attempt == MAX_REPLAYS - 1:
            bans.all = reason
    raise PlanError(f"{name}: {bans.all}, and nothing is sharded")


def traced_calls(
    model: nn.Module, inputs: Given | None, alike: Mapping[str, str], known: Known, *, plain: bool = False
) -> tuple[tuple[Example, ...], Graph]:
    """The calls of a model, and their graph. A call of a transformers model that nobody gave is looked for until one runs.

    `plain`: the first call alone.

    Raises:
        InputError: example inputs are needed or do not fit. TraceError: the model cannot be run on fake tensors.
    """

    def made(calls: Iterable[Example]) -> tuple[Example, ...]:
        return tuple(islice(settled(tuple(calls)), 1 if plain else None))

    def one(example: Example) -> Graph:
        return trace(model, (example,), keep, repeats=alike, known=known, once=True)

    def stopped(example: Example) -> TraceError | None:
        try:
            one(example)
        except TraceError as error:
            return error
        return None

    guess = Guess()
    examples = made(calls_to_trace(model, inputs))
    try:
        graph = trace(model, examples, keep, repeats=alike, known=known)
    except TraceError as error:
        if inputs is not None or error.partial is None:  # another call would not be traced either
            raise
        guess = search(model, error, stopped)
        examples = made(calls_with(model, guess))
        graph = trace(model, examples, keep, repeats=alike, known=known)
    more = () if plain or inputs is not None else tuple(calls_for_unread(model, guess, examples, graph, one))
    if not more:
        return examples, graph
    fresh = {e.name for e in more}
    examples = (*(e for e in examples if e.name not in fresh), *made(more))
    return examples, trace(model, examples, keep, repeats=alike, known=known)


def plain_call(model: nn.Module) -> dict[str, object]:
    """The keywords of the plain forward of a transformers model, as its plan is made with.

    Raises:
        InputError, TraceError: as for `traced_calls`.
    """
    with undisturbed(model):
        examples, _ = traced_calls(model, None, alike_blocks(model), {}, plain=True)
    return examples[0].make()


def _settings(ran: tuple[Example, ...]) -> frozenset[str]:
    """The settings that were traced in eval and in training mode."""
    modes = [{e.setting.name for e in ran if e.setting is not None and e.training is training} for training in (False, True)]
    return frozenset(modes[0] & modes[1])


def whole_plan(model: nn.Module, reason: str) -> Plan:
    """The plan that leaves everything whole on one rank."""
    params: dict[str, ParamPlan] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        params[name] = ParamPlan(name, replicated(tuple(p.shape), 1), "", reason)
        if first.setdefault(id(p), name) != name:
            aliases[name] = first[id(p)]
    return Plan(type(model).__name__, 1, params, (), (), (), aliases)
