"""Axes → Plan: choose, localise, place the reductions, realise; whatever cannot be realised is un-sharded with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from autotp.axes.atoms import Atom
from autotp.axes.kernel import Kernel
from autotp.errors import PlanError
from autotp.plan.boundaries import find_boundaries, find_copies, find_inside
from autotp.plan.build import Builder, Unrealisable
from autotp.plan.choose import Choice, choose
from autotp.plan.cuts import Cut
from autotp.plan.joint import find_joints
from autotp.plan.labels import NONE, Labels, Space, label, leaf_atoms
from autotp.plan.layout import Layout
from autotp.plan.localise import Hints, Localised, Stuck, localise
from autotp.plan.model import GradSum, ModulePlan, Op, ParamPlan
from autotp.plan.moves import Moves, Undecidable, conversion_key, place
from autotp.plan.naming import Namer, pattern_of
from autotp.plan.plan import AxisInfo, Plan, Traffic
from autotp.plan.wanted import Wanted
from autotp.trace.graph import Node, Origin, Pseudo, Value

#: How many drafts are tried before everything stays whole.
MAX_ATTEMPTS = 128
_PRODUCTS = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm", "grouped_mm"))


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan with what is needed to check it: the labels and moves that it was made from."""

    plan: Plan
    space: Space
    choice: Choice
    moves: Moves
    local: Localised


@dataclass(frozen=True, slots=True)
class Accused:
    """A module that computes something else on the ranks; None: it cannot be told which. `backward`: gradients show it, not results."""

    module: str | None
    reason: str
    backward: bool = False


@dataclass
class Bans:
    """What later attempts must not do: cuts with the reason, and nodes whose result stays whole."""

    cuts: dict[Cut, str]
    whole: frozenset[int] = NONE  # type: ignore[assignment]
    all: str = ""  # why no axis at all may be sharded

    @property
    def size(self) -> int:
        """How much is banned."""
        return len(self.cuts) + len(self.whole)

    def blame(self, space: Space, choice: Choice, node: Node, reason: str) -> None:
        """Forbid what made `node` fail: first that its result is made sharded, then the axes that meet it."""
        values = (*space.inputs[node.index], *node.outputs) if node.index >= 0 else ()
        generated = {n.index for n in space.graph.nodes if n.index in choice.labels.generated and (n is node or _feeds(n, node))}
        if generated - self.whole:
            self.whole |= generated
            return
        guilty = frozenset().union(*(space.carried.get(v.id, NONE) for v in values), NONE) & choice.on
        if not guilty:
            near = [v for n in space.graph.nodes if n.module == node.module for v in (*space.inputs[n.index], *n.outputs)]
            guilty = frozenset().union(*(choice.labels.of(v) for v in near), NONE) & choice.on
        if not guilty:
            guilty = choice.on
        self.cuts.update(dict.fromkeys((choice.cuts[a] for a in guilty), f"{reason}: {node}"))

    def accuse(self, space: Space, choice: Choice, accused: Accused) -> None:
        """Forbid the cuts that meet in a module, or nearest to it on the way that its numbers come; all where that is unknown."""
        guilty: frozenset[Atom] = choice.on
        if accused.module is not None:
            path = _traced_path(accused.module, space.graph.repeats)
            nodes = space.graph.nodes
            inside = [n for n in nodes if n.module == path] or [n for n in nodes if n.module.startswith(path + ".")]
            if inside:
                way = nodes[inside[-1].index + 1 :] if accused.backward else tuple(reversed(nodes[: inside[0].index]))
                met = (_met(space, choice, n) for n in way)
                guilty = frozenset().union(*(_met(space, choice, n) for n in inside)) or next(filter(None, met), choice.on)
        where = accused.module or "the model"
        self.cuts.update(dict.fromkeys((choice.cuts[a] for a in guilty), f"{accused.reason}, first in {where}"))


def _met(space: Space, choice: Choice, node: Node) -> frozenset[Atom]:
    """The axes on which values of a node are sharded."""
    values = (*space.inputs[node.index], *node.outputs)
    return frozenset().union(*(choice.labels.of(v) for v in values), NONE) & choice.on


def _traced_path(path: str, repeats: Mapping[str, str]) -> str:
    """The path of the module that was traced in the place of `path`."""
    blocks = {b + ".": t + "." for b, t in repeats.items()}
    path += "."
    while (block := _block_of(path, blocks)) is not None:
        path = blocks[block] + path[len(block) :]
    return path[:-1]


def _feeds(source: Node, node: Node) -> bool:
    made = {o.id for o in source.outputs}
    return any(v.id in made for v in node.inputs())


def solve(
    space: Space, tp: int, bans: Bans, model: str, linears: frozenset[str], wanted: Wanted | None = None, hints: Hints | None = None
) -> Draft:
    """The best plan that avoids `bans`, with the `wanted` layouts as far as they can be had; adds to `bans` what turns out impossible.

    Each attempt that fails bans something more. After `MAX_ATTEMPTS`, and where nothing more was found to ban, everything is.
    `hints`: see `localise`.

    Raises:
        PlanError: a fault that stays where nothing is sharded.
    """
    for attempt in range(MAX_ATTEMPTS + 1):
        before = bans.size
        choice = choose(space, tp, bans.cuts, bans.whole, wanted, bans.all)
        try:
            local = localise(space, choice.labels, hints)
            moves = place(space, choice.labels)
            namer = Namer({a: pattern_of(space, choice, a) for a in choice.on}, choice.cuts, _param_dims(space))
            joints, notes = find_joints(space, moves)
            builder = Builder(space, choice, moves, local, namer, linears, tp, joints)
            modules = builder.run()
        except (Stuck, Unrealisable) as error:
            reason = f"{error.reason}: {error.node}"
            if not choice.on:
                raise PlanError(f"{model}: {reason}, and nothing is sharded") from error
            bans.blame(space, choice, error.node, error.reason)
        except Undecidable as error:
            reason = str(error)
            if not choice.on:
                raise PlanError(f"{model}: {reason}, and nothing is sharded") from error
            _blame_alone(space, choice, bans, reason)
        else:
            plan = _plan(space, choice, moves, modules, namer, tp, model, bans)
            copied = {slot for slot, conversions in builder.slots.items() if any(c.op is Op.COPY for c in conversions)}
            boundaries = find_boundaries(space, choice.labels, moves, joints, copied, space.graph.repeats)
            inside = find_inside(space, choice.labels, moves, boundaries, space.graph.repeats)
            graph = space.graph
            plan = replace(plan, notes=(*plan.notes, *notes), boundaries=boundaries, inside=inside, swapped=graph.swapped)
            whole = {slot for slot, conversions in builder.slots.items() if any(c.op in (Op.GATHER, Op.REDUCE) for c in conversions)}
            copies = find_copies(space, whole, graph.repeats)
            plan = replace(plan, untrained=graph.untrained if plan.local_share < 1 else "", copies=copies)
            return Draft(plan, space, choice, moves, local)
        if bans.size == before or attempt == MAX_ATTEMPTS - 1:
            bans.all = reason
    raise AssertionError("an axis was taken where none may be")


def _param_dims(space: Space) -> list[tuple[tuple[Atom, ...], ...]]:
    return [space.axes.dims[v.id] for v in dict.fromkeys(space.graph.params.values())]


def _blame_alone(space: Space, choice: Choice, bans: Bans, reason: str) -> None:
    """Find the axis whose reductions cannot be placed by trying each without the others."""
    found = False
    every = dict.fromkeys(choice.cuts.values())
    for cut in every:
        gathers = {slot: atoms & cut.atoms for slot, atoms in choice.gathers.items()}
        try:
            place(space, label(space, dict.fromkeys(cut.atoms, cut), gathers, choice.whole))
        except Undecidable:
            bans.cuts[cut] = reason
            found = True
    if not found:
        bans.cuts.update(dict.fromkeys(every, reason))


def _plan(
    space: Space, choice: Choice, moves: Moves, modules: tuple[ModulePlan, ...], namer: Namer, tp: int, model: str, bans: Bans
) -> Plan:
    graph = space.graph
    axes, axis_of = _axes(space, choice, namer)
    own: dict[str, ParamPlan] = {}
    for name, value in graph.params.items():
        on = choice.labels.of(value)
        dims = tuple(namer.expr(d, on) for d in space.axes.dims[value.id])
        layout = Layout(value.shape, dims, tp)
        atoms = sorted(on, key=lambda a: a.id)
        axis = ", ".join(dict.fromkeys(axis_of[a].pattern for a in atoms))
        own[name] = ParamPlan(name, layout, axis, "" if on else _reason(space, choice, value))
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in graph.params.items():
        if first.setdefault(value.id, name) != name:
            aliases[name] = first[value.id]
    products = {n for n, v in graph.params.items() if len(v.shape) >= 2 and _is_product(space, v)}
    return Plan(
        model, tp, own, modules, tuple(axes), _traffic(space, choice, moves, modules, own), aliases, frozenset(products), graph.notes
    )


def _is_product(space: Space, value: Value) -> bool:
    held = {value.id}
    for node in space.graph.nodes:
        if any(v.id in held for v in space.inputs[node.index]):
            if node.opname in _PRODUCTS:
                return True
            if space.parameter_of(node.outputs[0].id if node.outputs else -1) == value.id:
                held.update(o.id for o in node.outputs)
    return False


def _reason(space: Space, choice: Choice, value: Value) -> str:
    """Why a parameter stays whole: the reason of its most major axis that is not the model's width."""
    atoms = [a for dim in space.axes.dims[value.id] for a in leaf_atoms(dim)]
    if not atoms:
        return "it has no dim to shard"
    through = {a for v in space.graph.params.values() if choice.labels.of(v) for a in space.carried[v.id] if a not in choice.labels.of(v)}
    own = [a for a in atoms if a not in through and a in choice.refused]
    if not own:
        return "it carries the width of the model, which stays whole between the sharded regions"
    return choice.refused[own[0]]


def _axes(space: Space, choice: Choice, namer: Namer) -> tuple[list[AxisInfo], dict[Atom, AxisInfo]]:
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


def _traffic(
    space: Space, choice: Choice, moves: Moves, modules: tuple[ModulePlan, ...], params: Mapping[str, ParamPlan]
) -> tuple[Traffic, ...]:
    """The collectives of the first path's forward and of its backward. What enters regions from one tensor is reduced once."""
    sources = _Sources(space, modules)
    width: dict[tuple[str, str], int] = {}
    first = space.graph.results[0].stop if space.graph.results else len(space.graph.nodes)
    for node in space.graph.nodes[:first]:
        if node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
            width.setdefault(_crossing(node), _per_token(node.outputs[0]))
    out: list[Traffic] = []
    blocks = {b + ".": t + "." for b, t in space.graph.repeats.items()}
    inside = _site_traffic(space, choice, moves, sources)
    shared: set[tuple[str, int]] = set()
    again = {(path, p) for (path, where), members in space.graph.members.items() for p in members if p != where}
    for m in modules:
        path, instance = m.path + ".", _block_of(m.path + ".", blocks) or ""
        while (block := _block_of(path, blocks)) is not None:
            path = blocks[block] + path[len(block) :]
        path = path[:-1]
        found: list[tuple[Traffic, int | None]] = []
        for kind, slots in (("enter", m.inputs), ("exit", m.outputs)):
            for slot in slots:
                if kind == "enter" and (path, slot.path) in again:
                    continue  # the same tensor as another argument
                crossed = (kind, ".".join(map(str, (path, *(0 if step == "*" else step for step in slot.path)))))
                if crossed not in width:
                    continue  # what other calls ask for alone (attention weights)
                size = width[crossed]
                for c in slot.conversions:
                    if c.op is Op.REDUCE:
                        found.append((Traffic(m.path, "all_reduce", "forward", size), None))
                    elif c.op is Op.GATHER:
                        found.append((Traffic(m.path, "all_gather", "forward", size), None))
                    elif c.op is Op.COPY:
                        found.append((Traffic(m.path, "all_reduce", "backward", size), sources.entering.get(crossed)))
        for traffic, source in [*found, *((replace(t, module=m.path), source) for t, source in inside.get(path, ()))]:
            if source is not None:
                if (instance, source) in shared:
                    continue
                shared.add((instance, source))
            out.append(traffic)
    for m in modules:
        for use in m.uses:
            name = f"{use.owner}.{use.name}" if use.owner else use.name
            while (block := _block_of(name, blocks)) is not None:
                name = blocks[block] + name[len(block) :]
            elements = summed(use.grad, params.get(name))
            if elements:
                out.append(Traffic(m.path, "all_reduce", "backward", 0, elements))
    return tuple(out)


def _crossing(node: Node) -> tuple[str, str]:
    assert node.slot is not None and isinstance(node.op, Pseudo)
    return node.op.value, ".".join(map(str, (node.slot[0], *node.slot[1])))


class _Sources:
    """Which tensor a value is at run time: module boundaries without a conversion hand the same object on.

    Copies of one tensor are one copy (`autotp.rewrite.memo`), but for arguments of the model, which are leaves.
    """

    def __init__(self, space: Space, modules: tuple[ModulePlan, ...]) -> None:
        self._made = {o.id: n for n in space.graph.nodes for o in n.outputs}
        self._converted = {
            (kind, ".".join(map(str, (m.path, *s.path))))
            for m in modules
            for kind, slots in (("enter", m.inputs), ("exit", m.outputs))
            for s in slots
        }
        self.entering: dict[tuple[str, str], int | None] = {}
        for node in space.graph.nodes:
            if node.op is Pseudo.ENTER and node.slot is not None and isinstance(node.args[0], Value):
                self.entering.setdefault(_crossing(node), self.of(node.args[0]))

    def of(self, value: Value) -> int | None:
        """The id of the value that was made first of those that are one tensor; None for what is not shared."""
        while (node := self._made.get(value.id)) is not None and node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
            if _crossing(node) in self._converted or not isinstance(node.args[0], Value):
                break
            value = node.args[0]
        return None if value.origin is Origin.INPUT else value.id


def summed(grad: GradSum, param: ParamPlan | None) -> int:
    """Elements of a gradient that are summed over the ranks: all of a whole parameter's, the shared ones of a sharded one's."""
    if grad is GradSum.NONE or param is None:
        return 0
    layout = param.layout
    if grad is GradSum.ALL or layout.dim is None:
        return prod(layout.shape)
    return layout.shared(0).size * prod(layout.shape) // layout.shape[layout.dim]


def _site_traffic(space: Space, choice: Choice, moves: Moves, sources: _Sources) -> dict[str, list[tuple[Traffic, int | None]]]:
    """Collectives at call sites, by traced module: reductions and copies of single values (and of what), statistics of norms."""
    first = space.graph.results[0].stop if space.graph.results else len(space.graph.nodes)
    out: dict[str, list[tuple[Traffic, int | None]]] = {}

    def add(node: Node, when: str, width: int, source: int | None = None) -> None:
        if node.index < first:
            out.setdefault(node.module, []).append((Traffic(node.module, "all_reduce", when, width), source))

    for keys, when in ((moves.reduces, "forward"), (moves.copies, "backward")):
        for node in space.graph.nodes[:first]:
            for i, o in enumerate(node.outputs):
                key = conversion_key(space, node, i)
                if key in keys and isinstance(key, tuple) and key[0] != "slot":
                    add(node, when, _per_token(o))
    for index, number in sorted(moves.group_edges):
        value = next(v for v in space.inputs[index] if v.id == number)
        add(space.graph.nodes[index], "backward", _per_token(value), sources.of(value))
    for index, kernel in sorted(choice.labels.kernels.items()):
        node = space.graph.nodes[index]
        if any(c.whole for c, _ in space.contracts[index]):
            for when in ("forward", "backward") * (2 if kernel is Kernel.LAYER_NORM else 1):  # a mean, and a variance
                add(node, when, 1)
    return out


def _per_token(value: Value) -> int:
    return prod(value.shape[2:]) if len(value.shape) > 2 else (value.shape[-1] if value.shape else 1)


def _block_of(name: str, blocks: Mapping[str, str]) -> str | None:
    """The innermost of `blocks` (prefixes that end in a dot) that a name is inside."""
    at = name.rfind(".")
    while at >= 0:
        if name[: at + 1] in blocks:
            return name[: at + 1]
        at = name.rfind(".", 0, at)
    return None


def lift(plan: Plan, names: Iterable[str], repeats: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """The plan with the parameters of repeated blocks filled in from their templates, in the order of `names`."""
    params: dict[str, ParamPlan] = {}
    aliases, products = dict(plan.aliases), set(plan.products)
    blocks = {b + ".": t + "." for b, t in repeats.items()}
    for name in names:
        twin, moves = name, []
        while twin not in plan.params:
            block = _block_of(twin, blocks)
            if block is None:
                raise PlanError(f"{name}: no layout was planned for it")
            twin = blocks[block] + twin[len(block) :]
            moves.append((block, blocks[block]))
        params[name] = replace(plan.params[twin], name=name)
        if params[name].layout.shape != shapes[name]:
            raise PlanError(f"{name}: planned for shape {params[name].layout.shape}, has {shapes[name]}")
        if twin in plan.products:
            products.add(name)
        if moves and twin in plan.aliases:
            target = plan.aliases[twin]
            for block, template in reversed(moves):
                target = block + target[len(template) :] if target.startswith(template) else target
            aliases[name] = target
    axes = list(plan.axes)
    for block, template in sorted(repeats.items(), key=lambda pair: -pair[0].count(".")):
        axes += [_moved(a, template, block) for a in axes if a.module == template or a.module.startswith(template + ".")]
    return replace(plan, params=params, aliases=aliases, products=frozenset(products), axes=tuple(axes))


def _moved(axis: AxisInfo, template: str, block: str) -> AxisInfo:
    def move(name: str) -> str:
        return block + name[len(template) :] if name.startswith(template) else name

    return replace(axis, name=move(axis.name), module=move(axis.module), params=tuple(map(move, axis.params)))


__all__ = ["Bans", "Draft", "Labels", "lift", "solve", "summed"]
