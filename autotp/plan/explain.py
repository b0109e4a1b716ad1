"""Explains one parameter or module of a plan. The last parts of a name stand for everything that ends so."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from math import prod

from autotp.errors import InputError
from autotp.plan.names import folded
from autotp.plan.spec import GradSum, ModulePlan, PlanSpec

#: A number that is a part of a name in a text.
_NUMBER = re.compile(r"(?<=\.)\d+\b")


def explain(plan: PlanSpec, name: str) -> str:
    """Writes the text of `autotp explain`.

    Raises:
        InputError: see `Plan.explain`.
    """
    if not isinstance(name, str):
        raise InputError(f'explain: got {name!r}, wanted the name of a parameter or module ("" for all)')
    if text := _explained(plan, name):
        return text
    modules = _modules(plan)
    if found := [n for n in (*modules, *plan.params) if n.endswith(f".{name}")]:
        return "\n\n".join(_ending_so(plan, found))
    raise InputError(f"the plan has no parameter or module {name!r}{_near(name, [*plan.params, *modules])}")


def _modules(plan: PlanSpec) -> list[str]:
    """The paths of all modules that hold a parameter or change, without the root."""
    found = {path: None for m in plan.modules if (path := m.path)}
    for parts in (n.split(".") for n in plan.params):
        found.update({".".join(parts[:i]): None for i in range(1, len(parts))})
    return list(found)


def _ending_so(plan: PlanSpec, names: Sequence[str]) -> Iterator[str]:
    """Explains the first of those that are alike, and says how many there are."""
    groups: dict[tuple[str, str], list[str]] = {}
    texts: dict[tuple[str, str], str] = {}
    for name in names:
        if text := _explained(plan, name):
            key = (folded(name), _NUMBER.sub("*", text))
            groups.setdefault(key, []).append(name)
            texts.setdefault(key, text)
    for key, alike in groups.items():
        if len(alike) > 1:
            yield f"{len(alike)} are alike but for numbers: {key[0]}, from {alike[0]} to {alike[-1]}. The first:\n{texts[key]}"
        else:
            yield texts[key]


def _near(name: str, names: Sequence[str]) -> str:
    """`; near it: …` with whole names that resemble `name`, or else ends of names that do."""
    found = difflib.get_close_matches(name, dict.fromkeys(names), n=3)
    if not found:
        count = name.count(".") + 1
        found = difflib.get_close_matches(name, dict.fromkeys(".".join(n.split(".")[-count:]) for n in names), n=3)
    return f"; near it: {', '.join(found)}" if found else ""


def _explained(plan: PlanSpec, name: str) -> str:
    """The text about a whole name; "" where the plan has none such."""
    names = [n for n in plan.params if n == name or n.startswith(name + ".") or name == ""]
    modules = [m for m in plan.modules if m.path == name or m.path.startswith(name + ".") or _owns(plan, m, name)]
    lines: list[str] = []
    for n in names:
        lines += _explain_param(plan, n)
    held = set(names)
    for axis in plan.axes:
        if not held.isdisjoint(axis.params):
            lines.append(f"axis {axis.name} ({axis.pattern}, size {axis.size}): {', '.join(axis.params)}")
            lines += [f"  meets {site}" for site in axis.sites]
    for m in modules:
        lines += _explain_module(m)
    at = {*(m.path for m in modules), *(n.rpartition(".")[0] for n in names)}
    for t in plan.traffic:
        if t.module in at:
            size = f"{t.width} elements a token" if t.width else f"{t.elements} elements"
            lines.append(f"collective at {t.module or '<root>'}: {t.kind} of {size}, {t.when}")
    return "\n".join(lines)


def _explain_param(plan: PlanSpec, name: str) -> Iterator[str]:
    p = plan.params[name]
    yield f"{name}  {list(p.layout.shape)}  {p.layout}"
    if p.layout.dim is None:
        yield f"  replicated: {p.reason}"
    else:
        share = prod(p.layout.local_shape) / max(prod(p.layout.shape), 1)
        yield f"  sharded along dim {p.layout.dim} ({p.axis}); {list(p.layout.local_shape)} on each rank, {share:.3f} of it"
    if name in plan.aliases:
        yield f"  tied to {plan.aliases[name]}"


def _owns(plan: PlanSpec, module: ModulePlan, name: str) -> bool:
    """True for a parameter of the module, and for an attribute of it that becomes local."""
    path, _, leaf = name.rpartition(".")
    inside = name.removeprefix(f"{module.path}." if module.path else "")
    return (name in plan.params and path == module.path) or (bool(leaf) and any(a.path == inside for a in module.attributes))


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
        what = [f"int {a} → {b}" for _, a, b in s.ints] + [f"int {a} × n → {b} × n" for _, a, b in s.multiples]
        what += [s.kernel.value] if s.kernel else []
        what += [f"dim {dim} of tensor {at} stays 1" for at, dim in s.ones]
        what += [c.op.value for _, cs in (*s.inputs, *s.outputs) for c in cs]
        out.append(f"  call in {s.function} ({s.file.rsplit('/', 1)[-1]}): {', '.join(what)}")
    return out
