"""What differs between two plans of a model: other cuts, other collectives, other costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from autotp.plan.cost import collectives
from autotp.plan.kinds import Kind, kinds
from autotp.plan.names import folded
from autotp.plan.page.figures import figures
from autotp.plan.spec import PlanSpec


@dataclass(frozen=True, slots=True)
class Change:
    """`count` parameters or collectives that differ in the same way: `here` in the plan of the page, `there` in the other one."""

    name: str
    count: int
    here: str
    there: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A plan beside that of the page. `figures`: (what, here, there). `alike`: parameters that are cut in the same way in both."""

    label: str
    title: str
    tp: int
    figures: tuple[tuple[str, str, str], ...]
    params: tuple[Change, ...]
    collectives: tuple[Change, ...]
    alike: int


def difference(plan: PlanSpec, other: PlanSpec, label: str, dtype: torch.dtype) -> Difference:
    """Compares `other`, which the page calls `label`, with `plan`."""
    kinds_here, kinds_there = kinds(plan), kinds(other)
    here, there = figures(plan, kinds_here, dtype), figures(other, kinds_there, dtype)
    rows = tuple((name, a, b) for (name, a), (_, b) in zip(here.rows, there.rows, strict=True))
    cuts = _cuts(plan, kinds_here), _cuts(other, kinds_there)
    alike = sum(cuts[1].get(name) == text for name, text in cuts[0].items())
    sent = _collectives(plan, dtype), _collectives(other, dtype)
    title = f"{other.model} over tp={other.tp}"
    return Difference(label, title, other.tp, rows, tuple(_changes(*cuts)), tuple(_changes(*sent)), alike)


def _cuts(plan: PlanSpec, kind_of: Mapping[str, Kind]) -> dict[str, str]:
    """How each parameter is cut, in words that don't depend on tp alone."""
    words: dict[object, str] = {}
    for p in plan.params.values():
        if p.layout not in words:
            extra = (", padded" if p.layout.is_padded else "") + (", rows on several ranks" if p.layout.is_shared else "")
            words[p.layout] = f"{p.layout}{extra}"
    return {name: f"{kind_of[name]}: {words[p.layout]}" for name, p in plan.params.items()}


def _collectives(plan: PlanSpec, dtype: torch.dtype) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for c in collectives(plan, 1, dtype):
        found.setdefault(c.module or "<root>", []).append(f"{c.kind}, {c.when}, {c.bytes} B")
    return {module: "; ".join(sorted(texts)) for module, texts in found.items()}


def _changes(here: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Change]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in dict.fromkeys((*here, *there)):
        a, b = here.get(name, "none"), there.get(name, "none")
        if a != b:
            groups.setdefault((folded(name), a, b), []).append(name)
    for (name, a, b), names in groups.items():
        yield Change(name if len(names) > 1 else names[0], len(names), a, b)
