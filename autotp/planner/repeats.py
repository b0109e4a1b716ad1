"""Plans of repeated blocks, which were not traced: copies of the plan of their template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from autotp.errors import PlanError
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.plan.spec import AxisInfo, ModulePlan, ParamPlan


def block_of(name: str, blocks: Mapping[str, str]) -> str | None:
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
            block = block_of(twin, blocks)
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
        axes += [_moved_axis(a, template, block) for a in axes if a.module == template or a.module.startswith(template + ".")]
    return replace(plan, params=params, aliases=aliases, products=frozenset(products), axes=tuple(axes))


def _moved_axis(axis: AxisInfo, template: str, block: str) -> AxisInfo:
    def move(name: str) -> str:
        return block + name[len(template) :] if name.startswith(template) else name

    return replace(axis, name=move(axis.name), module=move(axis.module), params=tuple(map(move, axis.params)))


def repeated(plans: Mapping[str, ModulePlan], repeats: Mapping[str, str]) -> list[ModulePlan]:
    """Copies for the blocks that were not traced, inner blocks first, so that copies of copies are made too."""
    every = dict(plans)
    inside: dict[str, list[str]] = {}  # template → paths under it, kept up to date as copies are made
    for template in set(repeats.values()):
        inside[template] = [p for p in every if p == template or p.startswith(template + ".")]
    for block, template in sorted(repeats.items(), key=lambda pair: -pair[0].count(".")):
        for path in list(inside[template]):
            uses = tuple(replace(u, owner=_moved_path(u.owner, template, block)) for u in every[path].uses)
            moved = replace(every[path], path=_moved_path(path, template, block), uses=uses)
            every[moved.path] = moved
            for other, paths in inside.items():
                if moved.path == other or moved.path.startswith(other + "."):
                    paths.append(moved.path)
    return [plan for path, plan in every.items() if path not in plans]


def _moved_path(path: str, template: str, block: str) -> str:
    return block + path[len(template) :] if path == template or path.startswith(template + ".") else path


def differing(block: str, template: str, layouts: Mapping[str, Layout], names: Iterable[str]) -> bool:
    """True when what is wanted in a block is not what is wanted in the template that stands for it."""
    inside = [n for n in names if n.startswith(block + ".")]
    return any(layouts.get(n) != layouts.get(template + n[len(block) :]) for n in inside)
