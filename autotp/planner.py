"""Model → Plan: trace, find the axes, choose and realise, replay; a region that fails its replay is un-sharded and planned again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from autotp.axes.rules import find_axes, keep
from autotp.certificate import replay
from autotp.errors import PlanError
from autotp.plan.labels import Space
from autotp.plan.layout import replicated
from autotp.plan.model import ParamPlan
from autotp.plan.plan import Plan
from autotp.plan.solve import Bans, lift, solve
from autotp.trace.inputs import example_inputs, user_example
from autotp.trace.run import trace

MAX_REPLAYS = 64


def make_plan(model: nn.Module, tp: int, inputs: Mapping[str, object] | None = None) -> Plan:
    """The certified plan of `model` over `tp` ranks. The model is left as it was.

    Raises:
        InputError: example inputs are needed or do not fit. TraceError: the model cannot be run on fake tensors.
    """
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    name = type(model).__name__
    if tp == 1:
        return whole_plan(model, "tp is 1")
    examples = example_inputs(model) if inputs is None else user_example(model, inputs)
    graph = trace(model, examples, keep)
    space = Space(find_axes(graph))
    bans = Bans({})
    linears = frozenset(path for path, m in model.named_modules() if type(m).forward is nn.Linear.forward)
    for _ in range(MAX_REPLAYS):
        draft = solve(space, tp, bans, name, linears)
        plan = lift(draft.plan, shapes, graph.repeats, shapes)
        difference = replay(model, examples, draft, dict(plan.params), tp)
        if difference is None:
            return plan
        bans.blame(space, draft.choice, difference.node, difference.reason)
    raise PlanError(f"{name}: no plan passed its replay in {MAX_REPLAYS} attempts; the last difference: {difference.reason}: {difference.node}")


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
