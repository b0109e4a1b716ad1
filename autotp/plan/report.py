"""Shows a plan as a table, as JSON and as an explanation."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable
from math import prod
from typing import Any

import torch

from autotp.errors import InputError
from autotp.plan.cost import busiest_work, collectives, padded_axes, padding_waste, repeated_share
from autotp.plan.expressions import factors, size
from autotp.plan.names import folded
from autotp.plan.sequence_parallel import kept_less, tokens_in_parts
from autotp.plan.spec import GradSum, ModulePlan, ParamPlan, PlanSpec

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


def _groups(plan: PlanSpec) -> list[tuple[str, int, ParamPlan]]:
    """Parameters alike but for the numbers in their names, with how many there are."""
    found: dict[tuple[str, str, str, str], tuple[list[str], ParamPlan]] = {}
    for name, p in plan.params.items():
        key = (folded(name), str(p.layout), str(p.layout.shape), folded(_last(plan, name, p)))
        found.setdefault(key, ([], p))[0].append(name)
    return [(names[0] if len(names) == 1 else key[0], len(names), p) for key, (names, p) in found.items()]


def _last(plan: PlanSpec, name: str, p: ParamPlan) -> str:
    """Writes the last column: the tied name of the parameter, its axis, or why it is replicated."""
    return f"tied to {plan.aliases[name]}" if name in plan.aliases else p.axis or p.reason


def render(plan: PlanSpec) -> str:
    """Writes the table that a person reads."""
    rows = [("parameter", "", "shape", "layout (* is sharded)", "local shape", "axis, or why it is replicated")]
    for name, count, p in _groups(plan):
        rows.append(
            (
                name,
                f"×{count}" if count > 1 else "",
                "×".join(map(str, p.layout.shape)) or "scalar",
                str(p.layout),
                "×".join(map(str, p.layout.local_shape)) or "scalar",
                _last(plan, p.name, p),
            )
        )
    widths = [min(max(len(r[i]) for r in rows), 60) for i in range(5)]
    lines = [f"{plan.model} over tp={plan.tp}: {plan.local_share:.3f} of the parameter elements on each rank", *_cost(plan), ""]
    for i, row in enumerate(rows):
        lines.append("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]).rstrip())
        if i == 0:
            lines.append("  ".join("-" * w for w in widths))
    legend = _legend(plan)
    if legend:
        lines += ["", "sizes of the factors (→ on each rank):", *legend]
    traffic = _traffic(plan)
    if traffic:
        lines += ["", "collectives (bytes a token in bfloat16, or a step for gradients of parameters):", *traffic]
    if parts := tokens_in_parts(plan):
        lines += [
            "",
            f"hidden states stay in token parts after {len(parts)} sums while training; of the inputs of regions alone a rank keeps",
        ]
        lines += [
            f"  {2 * kept_less(plan)} B a token less for the backward (bfloat16), and 1/{plan.tp} of norms and residuals between them"
        ]
    joint = [(m.path, (folded(", ".join(g[:-1])), g[-1])) for m in plan.modules for g in m.joint]
    if joint:
        lines += ["", "results all-reduced as one sum (to a hook the held ones are zeros, the last one is the whole sum):"]
        lines += [f"  in {path or '<root>'}: {held} (held), {last}{_times(n)}" for path, (held, last), n in _fold(joint)]
    if plan.attributes:
        lines += ["", "attributes made local:"]
        lines += [f"  {name}: {a} → {b}{_times(n)}" for name, (a, b), n in _fold(plan.attributes.items())]
    sites = [(m.path, s) for m in plan.modules for s in m.sites]
    if sites:
        lines += ["", f"{len(sites)} operator calls run in a distributed form (see `autotp explain`)"]
    last = [*(f"checked: {text}" for text in (plan.checked,) if text), *("note: " + n for n in plan.notes)]
    return "\n".join([*lines, *(["", *last] if last else [])])


def _cost(plan: PlanSpec) -> list[str]:
    """Writes the plan's costs beyond an even share, and the axes that are padded."""
    padding, repeated = f"{padding_waste(plan) * 100:.1f} %", f"{repeated_share(plan) * 100:.1f} %"
    lines = [f"padding {padding} · repeated {repeated} · busiest rank {busiest_work(plan):.2f} × the ideal"]
    padded = [f"  {_NOUN.get(a.pattern, a.pattern)}: {a.size} → {a.padded} over {plan.tp} ranks" for a in padded_axes(plan)]
    return [*lines, *dict.fromkeys(padded)]


def _legend(plan: PlanSpec) -> list[str]:
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
    wrapped = textwrap.wrap(" · ".join(entries).replace(" ·", _GLUE + "·"), 116, break_long_words=False, break_on_hyphens=False)
    return ["  " + line.replace(_GLUE, " ") for line in wrapped]


def _times(count: int) -> str:
    return f" (×{count})" if count > 1 else ""


def _fold(items: Iterable[tuple[str, Any]]) -> list[tuple[str, Any, int]]:
    counts: dict[tuple[str, Any], int] = {}
    for name, value in items:
        key = (folded(name), value)
        counts[key] = counts.get(key, 0) + 1
    return [(name, value, n) for (name, value), n in counts.items()]


def _traffic(plan: PlanSpec) -> list[str]:
    rows = [(c.module or "<root>", (c.kind, c.when, c.bytes)) for c in collectives(plan, 1, torch.bfloat16)]
    return [f"  {module}: {kind}, {when}, {size} B{_times(n)}" for module, (kind, when, size), n in _fold(rows)]


def to_dict(plan: PlanSpec) -> dict[str, Any]:
    """Returns JSON-able form: every field of the plan by name."""
    return {
        "model": plan.model,
        "tp": plan.tp,
        "local_share": plan.local_share,
        "padding_waste": padding_waste(plan),
        "repeated_share": repeated_share(plan),
        "busiest_work": busiest_work(plan),
        "padded_axes": [{"pattern": a.pattern, "size": a.size, "padded": a.padded} for a in padded_axes(plan)],
        "params": {
            n: {
                "shape": list(p.layout.shape),
                "layout": str(p.layout),
                "dim": p.layout.dim,
                "local_shape": list(p.layout.local_shape),
                "axis": p.axis,
                "reason": p.reason,
            }
            for n, p in plan.params.items()
        },
        "tied": dict(plan.aliases),
        "axes": [{"name": a.name, "pattern": a.pattern, "size": a.size, "module": a.module, "params": list(a.params)} for a in plan.axes],
        "collectives": [
            {"module": t.module, "kind": t.kind, "when": t.when, "elements_per_token": t.width, "elements": t.elements}
            for t in plan.traffic
        ],
        "attributes": {n: {"value": a, "local": b} for n, (a, b) in plan.attributes.items()},
        "modules": [_module(m) for m in plan.modules],
        "replicated": dict(plan.replicated),
        "notes": list(plan.notes),
        "checked": plan.checked,
    }


def _module(plan: ModulePlan) -> dict[str, Any]:
    pairs = {} if plan.pairs is None else {"tokens": plan.pairs.tokens, "experts": plan.pairs.index, "weights": plan.pairs.weights}
    return {
        "path": plan.path,
        "inputs": {".".join(map(str, s.path)): [c.op.value for c in s.conversions] for s in plan.inputs},
        "outputs": {".".join(map(str, s.path)): [c.op.value for c in s.conversions] for s in plan.outputs},
        "joint": [list(group) for group in plan.joint],
        "sites": [f"{s.file.rsplit('site-packages/', 1)[-1]}:{s.function}" for s in plan.sites],
        **({"pairs": pairs} if pairs else {}),
    }


def explain(plan: PlanSpec, name: str) -> str:
    """Writes the text of `autotp explain`.

    Raises:
        InputError: see `Plan.explain`.
    """
    if not isinstance(name, str):
        raise InputError(f'explain: got {name!r}, wanted the name of a parameter or module ("" for all)')
    names = [n for n in plan.params if n == name or n.startswith(name + ".") or name == ""]
    modules = [m for m in plan.modules if m.path == name or m.path.startswith(name + ".") or _owns(m, name)]
    if not names and not modules:
        near = difflib.get_close_matches(name, dict.fromkeys([*plan.params, *(n.rpartition(".")[0] for n in plan.params)]), n=3)
        raise InputError(f"the plan has no parameter or module {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    lines: list[str] = []
    for n in names:
        p = plan.params[n]
        lines.append(f"{n}  {list(p.layout.shape)}  {p.layout}")
        if p.layout.dim is None:
            lines.append(f"  replicated: {p.reason}")
        else:
            share = prod(p.layout.local_shape) / max(prod(p.layout.shape), 1)
            lines.append(f"  sharded along dim {p.layout.dim} ({p.axis}); {list(p.layout.local_shape)} on each rank, {share:.3f} of it")
        if n in plan.aliases:
            lines.append(f"  tied to {plan.aliases[n]}")
    for axis in plan.axes:
        if any(n in axis.params for n in names):
            lines.append(f"axis {axis.name} ({axis.pattern}, size {axis.size}): {', '.join(axis.params)}")
            lines += [f"  meets {site}" for site in axis.sites]
    for m in modules:
        lines += _explain_module(m)
    for t in plan.traffic:
        if any(t.module == m.path for m in modules) or any(n.rpartition(".")[0] == t.module for n in names):
            size = f"{t.width} elements a token" if t.width else f"{t.elements} elements"
            lines.append(f"collective at {t.module or '<root>'}: {t.kind} of {size}, {t.when}")
    return "\n".join(lines)


def _owns(module: ModulePlan, name: str) -> bool:
    return name.rpartition(".")[0] == module.path and bool(name)


def _explain_module(m: ModulePlan) -> list[str]:
    out = [f"module {m.path or '<root>'}:"]
    out += [f"  argument {'.'.join(map(str, s.path))}: {', '.join(c.op.value for c in s.conversions)}" for s in m.inputs]
    out += [f"  result {'.'.join(map(str, s.path)) or '(the tensor)'}: {', '.join(c.op.value for c in s.conversions)}" for s in m.outputs]
    for group in m.joint:
        out.append(f"  {', '.join(group)}: partial sums all-reduced together by the last; to a hook it returns the sum, the others zeros")
    out += [f"  attribute {a.path}: {a.value} → {a.local}" for a in m.attributes]
    if m.pairs is not None:
        out.append(
            f"  its experts are whole: a rank runs those of its own, on the rows of {m.pairs.tokens} that {m.pairs.index} routes to them"
        )
        out += [f"  attribute {a.path}: {a.value} → {a.local}, while it runs" for a in m.pairs.attributes]
    for u in m.uses:
        what = [c.op.value for c in u.conversions] + ([f"gradient summed ({u.grad.value})"] if u.grad is not GradSum.NONE else [])
        what += ["wherever the code holds it"] if u.held else []
        out.append(f"  reads {'.'.join(filter(None, (u.owner, u.name)))}: {', '.join(what) or 'the local shard'}")
    for s in m.sites:
        what = [f"int {a} → {b}" for _, a, b in s.ints] + ([s.kernel.value] if s.kernel else [])
        what += [c.op.value for _, cs in (*s.inputs, *s.outputs) for c in cs]
        out.append(f"  call in {s.function} ({s.file.rsplit('/', 1)[-1]}): {', '.join(what)}")
    return out
