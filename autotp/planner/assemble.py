"""Puts a choice of cuts and its reductions together into the values of a `Plan`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autotp.axes.atoms import Atom, leaf_atoms
from autotp.axes.operators.table import Is, is_a
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.plan.spec import AxisInfo, ModulePlan, ParamPlan
from autotp.planner.choice import HEAD_WIDTH, Choice
from autotp.planner.local_ints import Localised
from autotp.planner.naming import Namer
from autotp.planner.placements import GraphIndex
from autotp.planner.reductions import Moves
from autotp.planner.requested import Reason
from autotp.planner.traffic import traffic
from autotp.trace.graph import Value


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan with the data that its check needs: the labels and moves that it was made from."""

    plan: Plan
    space: GraphIndex
    choice: Choice
    moves: Moves
    local: Localised


def param_dims(space: GraphIndex) -> list[tuple[tuple[Atom, ...], ...]]:
    """Returns the dims of each parameter, tied ones once."""
    return [space.axes.dims[v.id] for v in dict.fromkeys(space.graph.params.values())]


def assemble(space: GraphIndex, choice: Choice, modules: tuple[ModulePlan, ...], namer: Namer, tp: int, model: str) -> Plan:
    """Makes the plan of the class `model` over `tp` ranks: layouts with reasons, the plans of `modules`, axes and traffic."""
    graph = space.graph
    axes, axis_of = _axes(space, choice, namer)
    own: dict[str, ParamPlan] = {}
    for name, value in graph.params.items():
        on = choice.labels.of(value)
        dims = tuple(namer.expr(d, on) for d in space.axes.dims[value.id])
        layout = Layout(value.shape, dims, tp)
        atoms = sorted(on, key=lambda a: a.id)
        axis = ", ".join(dict.fromkeys(axis_of[a].pattern for a in atoms))
        why = Reason("") if on else _reason(space, choice, value)
        own[name] = ParamPlan(name, layout, axis, why.text, why.ruled_out_by)
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in graph.params.items():
        if first.setdefault(value.id, name) != name:
            aliases[name] = first[value.id]
    products = {n for n, v in graph.params.items() if len(v.shape) >= 2 and _is_product(space, v)}
    return Plan(model, tp, own, modules, tuple(axes), traffic(graph, modules, own), aliases, frozenset(products), graph.notes)


def _is_product(space: GraphIndex, value: Value) -> bool:
    held = {value.id}
    for node in space.graph.nodes:
        if any(v.id in held for v in space.inputs[node.index]):
            if is_a(node, Is.PRODUCT):
                return True
            if space.parameter_of(node.outputs[0].id if node.outputs else -1) == value.id:
                held.update(o.id for o in node.outputs)
    return False


def _reason(space: GraphIndex, choice: Choice, value: Value) -> Reason:
    """Why a parameter stays whole: the reason of its most major axis that is not the model's width; of its heads, where there are some."""
    atoms = [a for dim in space.axes.dims[value.id] for a in leaf_atoms(dim)]
    if not atoms:
        return Reason("it has no dim to shard")
    through = {a for v in space.graph.params.values() if choice.labels.of(v) for a in space.carried[v.id] if a not in choice.labels.of(v)}
    own = [a for a in atoms if a not in through and a in choice.refused]
    if not own or choice.refused[own[0]].text == HEAD_WIDTH:
        dims = ([a for a in leaf_atoms(dim) if a in choice.refused] for dim in space.axes.dims[value.id])
        own = next((dim for dim in dims if any(choice.refused[a].text == HEAD_WIDTH for a in dim)), own)
    if not own:
        return Reason("it carries the width of the model, which stays whole between the sharded regions")
    return choice.refused[own[0]]


def _axes(space: GraphIndex, choice: Choice, namer: Namer) -> tuple[list[AxisInfo], dict[Atom, AxisInfo]]:
    axes: list[AxisInfo] = []
    axis_of: dict[Atom, AxisInfo] = {}
    for cut in dict.fromkeys(choice.cuts[a] for a in sorted(choice.on, key=lambda a: a.id)):
        atom = cut.major
        params = tuple(n for n, v in space.graph.params.items() if atom in space.carried[v.id])
        module = _common([p.rpartition(".")[0] for p in params])
        pattern = namer.patterns[atom]
        sites = tuple(
            dict.fromkeys(
                f"{n.opname} in {n.module or '<root>'} (sums over it)"
                for n, c in zip(space.graph.nodes, space.contracts, strict=True)
                if any(atom in a for _, a in c)
            )
        )
        info = AxisInfo(f"{module + '.' if module else ''}{namer.name(atom)}", pattern, cut.size, module, params, sites)
        axes.append(info)
        axis_of.update(dict.fromkeys(cut.atoms, info))
    return axes, axis_of


def _common(paths: Iterable[str]) -> str:
    split = [p.split(".") for p in paths]
    out: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return ".".join(out)
