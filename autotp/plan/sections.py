"""The parts of a plan's text beside its table: a line on each cost above, lists under titles below."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autotp.plan.cost import busiest_work, collectives, padded_axes, padding_waste, repeated_share
from autotp.plan.expressions import factors, size
from autotp.plan.names import folded
from autotp.plan.rows import times
from autotp.plan.sequence_parallel import kept_less, tokens_in_parts
from autotp.plan.spec import PlanSpec

#: What the indices of an axis are, by its pattern.
_NOUN = {
    "attention": "attention heads or groups",
    "mlp": "mlp width",
    "moe": "expert width",
    "experts": "experts",
    "embedding": "vocabulary",
    "lm head": "vocabulary",
    "conv": "conv channels",
}
_GLUE = "\N{NO-BREAK SPACE}"  # keeps an entry of the legend in one line


@dataclass(frozen=True, slots=True)
class Section:
    """A title and its lines; one of them may be missing."""

    title: str = ""
    lines: tuple[str, ...] = ()


def costs(plan: PlanSpec) -> tuple[str, ...]:
    """The share of a rank, the plan's costs beyond an even share, and the axes that are padded."""
    padding, repeated = f"{padding_waste(plan) * 100:.1f} %", f"{repeated_share(plan) * 100:.1f} %"
    return (
        f"{plan.model} over tp={plan.tp}: {plan.local_share:.3f} of the parameter elements on each rank",
        f"padding {padding} · repeated {repeated} · busiest rank {busiest_work(plan):.2f} × the ideal",
        *(f"  {line}" for line in padded(plan)),
    )


def padded(plan: PlanSpec) -> tuple[str, ...]:
    """The axes that are padded, each in words."""
    found = (f"{_NOUN.get(a.pattern, a.pattern)}: {a.size} → {a.padded} over {plan.tp} ranks" for a in padded_axes(plan))
    return tuple(dict.fromkeys(found))


def sections(plan: PlanSpec, width: int = 116) -> Iterator[Section]:
    """Everything below the table. Sizes of factors are wrapped at `width` columns."""
    yield from _listed("sizes of the factors (→ on each rank):", _legend(plan, width))
    yield from _listed("collectives (bytes a token in bfloat16, or a step for gradients of parameters):", _traffic(plan))
    if parts := tokens_in_parts(plan):
        yield Section(
            f"hidden states stay in token parts after {len(parts)} sums while training; of the inputs of regions alone a rank keeps",
            (f"{2 * kept_less(plan)} B a token less for the backward (bfloat16), and 1/{plan.tp} of norms and residuals between them",),
        )
    joint = [(m.path, (folded(", ".join(g[:-1])), g[-1])) for m in plan.modules for g in m.joint]
    yield from _listed(
        "results all-reduced as one sum (to a hook the held ones are zeros, the last one is the whole sum):",
        (f"in {path or '<root>'}: {held} (held), {last}{times(n)}" for path, (held, last), n in _fold(joint)),
    )
    yield from _listed("attributes made local:", (f"{name}: {a} → {b}{times(n)}" for name, (a, b), n in _fold(plan.attributes.items())))
    if sites := sum(len(m.changed) for m in plan.modules):
        yield Section(f"{sites} operator calls run in a distributed form (see `autotp explain`)")
    last = [*(f"checked: {text}" for text in (plan.checked,) if text), *("note: " + n for n in plan.notes)]
    if last:
        yield Section("\n".join(last))


def _listed(title: str, lines: Iterable[str]) -> Iterator[Section]:
    if found := tuple(lines):
        yield Section(title, found)


def _legend(plan: PlanSpec, width: int) -> list[str]:
    """The sizes of the factors that the layouts name; a factor of a replicated parameter may say its own (`n768`)."""
    sizes: dict[str, dict[str, None]] = {}
    for layout in dict.fromkeys(p.layout for p in plan.params.values()):
        for f in (f for expr in layout.dims for f in factors(expr)):
            if f.name not in ("1", f"n{f.size}"):
                text = f"{f.size} → {size(f, layout.tp)}" if f.sharded else str(f.size)
                sizes.setdefault(f.name, {})[text] = None
    alike: dict[str, list[str]] = {}
    for name, texts in sizes.items():
        alike.setdefault(" or ".join(texts), []).append(name)
    entries = [f"{', '.join(names)}: {text}".replace(" ", _GLUE) for text, names in alike.items()]
    wrapped = textwrap.wrap(" · ".join(entries).replace(" ·", _GLUE + "·"), width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_GLUE, " ") for line in wrapped]


def _fold(items: Iterable[tuple[str, Any]]) -> list[tuple[str, Any, int]]:
    counts: dict[tuple[str, Any], int] = {}
    for name, value in items:
        key = (folded(name), value)
        counts[key] = counts.get(key, 0) + 1
    return [(name, value, n) for (name, value), n in counts.items()]


def _traffic(plan: PlanSpec) -> list[str]:
    rows = [(c.module or "<root>", (c.kind, c.when, c.bytes)) for c in collectives(plan, 1, torch.bfloat16)]
    return [f"{module}: {kind}, {when}, {size} B{times(n)}" for module, (kind, when, size), n in _fold(rows)]
