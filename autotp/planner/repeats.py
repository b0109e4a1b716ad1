"""Gives blocks that were not traced the results of their template, under other names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from autotp.errors import PlanError
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.plan.spec import AxisInfo, ModulePlan, ParamPlan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rename:
    """Renames under a template: its names become those of a block that it stands for."""

    template: str
    block: str

    def __call__(self, name: str) -> str:
        return self.block + name[len(self.template) :] if within(name, self.template) else name


def within(name: str, path: str) -> bool:
    """True for the module at `path` and the modules inside of it."""
    return name == path or name.startswith(path + ".")


def traced(name: str, repeats: Mapping[str, str]) -> str:
    """Returns the name that was traced in the place of `name`: under templates instead of blocks."""
    while (block := block_of(name, repeats)) is not None:
        name = repeats[block] + name[len(block) :]
    return name


def block_of(name: str, repeats: Mapping[str, str]) -> str | None:
    """Returns the innermost block that was not traced and that a name is in, None where it is in none."""
    at = len(name)
    while at > 0:
        if name[:at] in repeats:
            return name[:at]
        at = name.rfind(".", 0, at)
    return None


def times(name: str, repeats: Mapping[str, str]) -> int:
    """Counts the places for which one that was traced stands: itself, and its like in each block that has its template."""
    found = 1
    for template, blocks in Counter(repeats.values()).items():
        found *= 1 + blocks * within(name, template)
    return found


def with_copies(
    entries: Iterable[tuple[str, T]], repeats: Mapping[str, str], move: Callable[[T, Rename], T] = lambda entry, _: entry
) -> list[tuple[str, T]]:
    """Returns named `entries`, followed by a copy of those of its template for each block. `move` renames the contents of an entry.

    Inner blocks come first, so that copies are copied with the block that they are in.
    """
    every = list(entries)
    inside: dict[str, list[int]] = {t: [i for i, (name, _) in enumerate(every) if within(name, t)] for t in set(repeats.values())}
    for block, template in sorted(repeats.items(), key=lambda pair: -pair[0].count(".")):
        rename = Rename(template, block)
        for i in list(inside[template]):
            name, entry = rename(every[i][0]), move(every[i][1], rename)
            for other, found in inside.items():
                if within(name, other):
                    found.append(len(every))
            every.append((name, entry))
    return every


def lift(plan: Plan, names: Iterable[str], repeats: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Returns the plan with the parameters and axes of blocks that were not traced, the parameters in the order of `names`."""
    params = dict(with_copies(plan.params.items(), repeats, _moved_param))
    for name in names:
        if name not in params:
            raise PlanError(f"{name}: no layout was planned for it")
        if params[name].layout.shape != shapes[name]:
            raise PlanError(f"{name}: planned for shape {params[name].layout.shape}, has {shapes[name]}")
    return replace(
        plan,
        params={name: params[name] for name in names},
        aliases=dict(with_copies(plan.aliases.items(), repeats, lambda name, rename: rename(name))),
        products=frozenset(name for name, _ in with_copies(((name, None) for name in plan.products), repeats)),
        axes=tuple(axis for _, axis in with_copies(((a.module, a) for a in plan.axes), repeats, _moved_axis)),
    )


def _moved_param(param: ParamPlan, rename: Rename) -> ParamPlan:
    return replace(param, name=rename(param.name))


def _moved_axis(axis: AxisInfo, rename: Rename) -> AxisInfo:
    return replace(axis, name=rename(axis.name), module=rename(axis.module), params=tuple(map(rename, axis.params)))


def lift_modules(plans: dict[str, ModulePlan], repeats: Mapping[str, str]) -> tuple[ModulePlan, ...]:
    """Returns the plans of modules, followed by those of the blocks that were not traced."""
    return tuple((dict(with_copies(plans.items(), repeats, _moved_module)) | plans).values())


def _moved_module(plan: ModulePlan, rename: Rename) -> ModulePlan:
    return replace(plan, path=rename(plan.path), uses=tuple(replace(u, owner=rename(u.owner)) for u in plan.uses))


def differing(block: str, template: str, layouts: Mapping[str, Layout], names: Iterable[str]) -> bool:
    """True when the layouts requested in a block differ from those requested in the template that stands for it."""
    inside = [n for n in names if n.startswith(block + ".")]
    return any(layouts.get(n) != layouts.get(template + n[len(block) :]) for n in inside)
