"""Finds mistakes in a recipe that fits its model, without tracing the model.

Each rule is a function of the bound recipe that reports problems. Rules know names, layouts, roles and module types. Where the
model can be traced, the proof (`autotp.recipe.compare`) checks the recipe against the model's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from autotp.plan.expressions import Concat, Expr, Factor, Product, factors, is_sharded, size
from autotp.plan.layout import alike
from autotp.plan.notation import parse
from autotp.recipe.binding import Bound, BoundParam
from autotp.recipe.problems import Problems
from autotp.recipe.spec import Role

Rule = Callable[[Bound, Problems], None]


def check(bound: Bound, problems: Problems) -> None:
    """Run every rule. For a recipe that needs a trace, the proof checks the roles."""
    for rule in _LAYOUT_RULES if bound.recipe.trace else (*_LAYOUT_RULES, *_ROLE_RULES):
        rule(bound, problems)


def own_params(bound: Bound) -> dict[str, list[BoundParam]]:
    """Returns the covered parameters by the module that owns them."""
    out: dict[str, list[BoundParam]] = {}
    for p in bound.params.values():
        out.setdefault(p.module, []).append(p)
    return out


def scopes(path: str) -> Iterator[str]:
    """Yields the numbered blocks that a module is in, innermost first; the whole model ("") for one that is in none.

    A number that is the module's own name (in a Sequential) makes no block.
    """
    parts = path.split(".")
    found = [".".join(parts[: i + 1]) for i in range(len(parts) - 1) if parts[i].isdigit()]
    yield from reversed(found) if found else ("",)


def under(path: str, module: str) -> bool:
    """True for `module` itself and everything in it."""
    return module == "" or path == module or path.startswith(module + ".")


def weights(params: Iterable[BoundParam]) -> list[BoundParam]:
    """Returns those with two dims or more."""
    return [p for p in params if len(p.layout.shape) >= 2]


def entered(bound: Bound) -> list[str]:
    """Returns the modules whose first argument enters a region, so that everything in them is inside."""
    return [
        b.module
        for b in bound.arguments
        if b.boundary.value == "enter" and b.path[0] == first_argument(bound.model.get_submodule(b.module))
    ]


def first_argument(module: nn.Module) -> str:
    """Returns the name of the first argument of a module's forward, "" where it takes none."""
    return next(iter(inspect.signature(module.forward).parameters), "")


# rules ------------------------------------------------------------------------------------------------------------------------------


def _cut_or_whole(bound: Bound, problems: Problems) -> None:
    shard = {n: s for s in bound.recipe.shard for n in s.names}
    several = {path for path, params in own_params(bound).items() if sum(bool(p.names) for p in weights(params)) > 1}
    for p in bound.params.values():
        text = f'"{p.entry.layout}"'
        if p.role.cut and not p.names and not (p.role is Role.ROW and (len(p.layout.shape) == 1 or p.module in several)):
            wanted = f"shard: {', '.join(shard) or 'nothing'}"
            problems.add(p.entry.at, p.name, f"{text} is {p.role.value}, and none of its names is cut ({wanted})")
        if p.role is Role.ROW and len(p.layout.shape) == 1 and p.names:
            problems.add(
                p.entry.at, p.name, f"{text}: a row-parallel bias is added once, after the sum, and stays whole; got {_join(p.names)} cut"
            )
        if not p.role.cut:
            for name in dict.fromkeys(f.name for d in parse(p.entry.layout) for f in factors(d) if f.sharded or f.name in shard):
                where = f" (shard: at {shard[name].pos})" if name in shard else ""
                problems.add(
                    p.entry.at, p.name, f"{text} is {p.role.value}, and {name} is cut{where}: cut it here too, or name another factor"
                )


def _pairs(bound: Bound, problems: Problems) -> None:
    """A column needs a row that sums over the same name in the same block, and a row a column.

    The two may stand in neighbouring blocks with only columns in the one and only rows in the other (convolutions in a row). The
    result of a column may also be summed or gathered as the result of a module around it.
    """
    found: dict[tuple[str, str], set[str]] = {}  # (block, name) → the roles that meet there
    for p in weights(bound.params.values()):
        for name in p.names:
            for block in scopes(p.module):
                found.setdefault((block, name), set()).add(p.role.value)
    leaving = [b.module for b in bound.results if b.boundary.value != "enter" and not b.path]
    for p in weights(bound.params.values()):
        other = {Role.COLUMN: Role.ROW, Role.ROW: Role.COLUMN}.get(p.role)
        if other is None:
            continue
        for name in sorted(p.names):
            near = [found[block, name] for block in scopes(p.module)]
            beside = [
                found.get((b, name)) for block in scopes(p.module) for b in _neighbours(block) if found[block, name] == {p.role.value}
            ]
            summed = p.role is Role.COLUMN and any(under(p.module, m) for m in leaving)
            if not any({other.value, Role.PART.value} & roles for roles in near) and {other.value} not in beside and not summed:
                block = next(scopes(p.module)) or type(bound.model).__name__
                what = f"a {p.role.value} without its {other.value}: no {other.value} in {block} is cut along {name}"
                problems.add(p.entry.at, p.name, what)


def _neighbours(block: str) -> Iterator[str]:
    """Yields the blocks before and behind a numbered one."""
    around, _, number = block.rpartition(".")
    if number.isdigit():
        yield from (f"{around + '.' if around else ''}{n}" for n in (int(number) - 1, int(number) + 1))


def _bias(bound: Bound, problems: Problems) -> None:
    for params in own_params(bound).values():
        heavy, light = weights(params), [p for p in params if len(p.layout.shape) == 1]
        if len(heavy) != 1:
            continue
        weight = heavy[0]
        for bias in light:
            if weight.role in (Role.COLUMN, Role.GATHERED):
                cut = next(d for d in weight.layout.dims if is_sharded(d)) if weight.names else None
                if bias.role is not weight.role:
                    text = f"is {bias.role.value}, and its weight is {weight.role.value} ({weight.entry.at}): write it there too"
                    problems.add(bias.entry.at, bias.name, text)
                elif cut is not None and bias.layout.dims[0] != cut:
                    text = f'"{bias.entry.layout}" contradicts its weight, "{weight.entry.layout}" ({weight.entry.at})'
                    problems.add(bias.entry.at, bias.name, text)
            elif weight.role is Role.ROW and bias.role is not Role.ROW:
                text = f"is {bias.role.value}, and its weight is row ({weight.entry.at}): under row: it is added once, not on every rank"
                problems.add(bias.entry.at, bias.name, text)
            elif weight.role is Role.PART and not bias.names and bias.role is not Role.ROW:
                text = f"is {bias.role.value}, and its weight is part ({weight.entry.at}): cut it alike, or under row: it is added once"
                problems.add(bias.entry.at, bias.name, text)
            elif not weight.role.cut and bias.role.cut:
                text = f"is {bias.role.value}, and its weight is {weight.role.value} ({weight.entry.at})"
                problems.add(bias.entry.at, bias.name, text)


def _ties(bound: Bound, problems: Problems) -> None:
    for name, first in bound.aliases.items():
        if name in bound.params and first in bound.params:
            a, b = bound.params[first], bound.params[name]
            if not alike(a.layout, b.layout):
                text = f'is one parameter with {first}, "{a.entry.layout}" ({a.entry.at}), and "{b.entry.layout}" places it otherwise'
                problems.add(b.entry.at, name, text)


#: Which dim of a weight is cut in a role, by the module that it belongs to.
_DIMS: tuple[tuple[type[nn.Module], dict[Role, int]], ...] = (
    (nn.Linear, {Role.COLUMN: 0, Role.GATHERED: 0, Role.ROW: 1}),
    (nn.Embedding, {Role.LOOKUP: 0, Role.PART: 1}),
    (nn.Conv1d, {Role.COLUMN: 0, Role.ROW: 1}),
    (nn.Conv2d, {Role.COLUMN: 0, Role.ROW: 1}),
)


def _dims(bound: Bound, problems: Problems) -> None:
    """The sharded dim has to fit the role and the module."""
    for p in weights(bound.params.values()):
        module = bound.model.get_submodule(p.module)
        for cls, wanted in _DIMS:
            if not isinstance(module, cls) or not p.role.cut:
                continue
            if p.role not in wanted and cls is nn.Embedding:
                problems.add(p.entry.at, p.name, f"is {p.role.value}, and belongs to a {cls.__name__}: wanted lookup or part")
            elif p.role in wanted and p.layout.dim not in (None, wanted[p.role]):
                text = (
                    f'"{p.entry.layout}" cuts dim {p.layout.dim}; the {p.role.value} of a {cls.__name__} is cut along dim {wanted[p.role]}'
                )
                problems.add(p.entry.at, p.name, text)
        if p.role in (Role.COLUMN, Role.GATHERED) and not first_argument(module):
            problems.add(p.entry.at, p.name, f"is {p.role.value}, and the forward of {type(module).__name__} has no argument to enter by")
        if p.role is Role.LOOKUP and not isinstance(module, nn.Embedding):
            text = f"is lookup, and belongs to a {type(module).__name__}: only tables of nn.Embedding are looked up by parts"
            problems.add(p.entry.at, p.name, text)


def _regions(bound: Bound, problems: Problems) -> None:
    """Whole parameters that are used inside of a region have to say so."""
    regions = entered(bound)
    widths: dict[str, set[str]] = {}  # block → names that stand behind a cut one
    for p in bound.params.values():
        if p.role.cut:
            behind = {name for d in p.layout.dims for name in _behind(d)}
            for block in scopes(p.module):
                widths.setdefault(block, set()).update(behind)
    shapes = {(p.module.rpartition(".")[0], p.layout.shape): p for p in weights(bound.params.values()) if p.role is Role.COLUMN}
    for p in bound.params.values():
        region = next((r for r in regions if under(p.module, r)), None)
        if region is not None and p.role is Role.WHOLE:
            text = f"is whole, and {region}, which it is in, enters a region by its arguments: its gradient is a partial sum; say inside"
            problems.add(p.entry.at, p.name, text)
        elif region is not None and p.role in (Role.COLUMN, Role.GATHERED):
            text = f"is {p.role.value}, and its input is inside a region already ({region} enters it by its arguments): say part"
            problems.add(p.entry.at, p.name, text)
        elif p.role is Role.WHOLE:
            block = next(scopes(p.module))
            shared = sorted({f.name for d in parse(p.entry.layout) for f in factors(d)} & widths.get(block, set()))
            twin = shapes.get((p.module.rpartition(".")[0], p.layout.shape)) if len(p.layout.shape) > 1 else None
            if shared:
                text = f"is whole, and {_join(shared)} stands behind a cut name in its block: cut it as well, or say inside"
                problems.add(p.entry.at, p.name, text)
            elif twin is not None:
                text = f"is whole beside {twin.name}, which has its shape and is column: cut it as well, or say inside"
                problems.add(p.entry.at, p.name, text)


def _behind(expr: Expr) -> Iterator[str]:
    if isinstance(expr, Concat):
        for part in expr.parts:
            yield from _behind(part)
    elif isinstance(expr, Product):
        cut = False
        for part in expr.parts:
            yield from _behind(part)
            if isinstance(part, Factor):
                if cut and not part.sharded and not part.name[0].isdigit():
                    yield part.name
                cut = cut or part.sharded


def _twice(bound: Bound, problems: Problems) -> None:
    """No value is reduced twice, and none enters a region from inside of one."""
    leaving = [b.module for b in bound.results if b.boundary.value == "leave" and not b.path]
    for p in bound.params.values():
        out = next((m for m in leaving if under(p.module, m)), None)
        if out is not None and p.role in (Role.ROW, Role.LOOKUP) and p.names:
            text = f"is {p.role.value} in {out}, whose result leaves (results:): it would be summed twice; say part, or take that out"
            problems.add(p.entry.at, p.name, text)
    inside = entered(bound)
    for b in (*bound.arguments, *bound.results):
        around = next((m for m in inside if m != b.module and under(b.module, m)), None)
        if around is not None and b.boundary.value == "enter":
            problems.add(
                b.boundary.pos,
                b.module,
                f"enters a region inside of {around}, which has entered it already: its gradient would be summed twice",
            )
        outer = next((m for m in leaving if m != b.module and under(b.module, m)), None)
        if outer is not None and b.boundary.value == "leave":
            problems.add(b.boundary.pos, b.module, f"leaves a region inside of {outer}, which leaves it too: it would be summed twice")


def _entrance(bound: Bound, problems: Problems) -> None:
    """A linear that is a part of a region has to be in one. A recipe that covers a part only gets its collectives from the planner."""
    if not bound.full:
        return
    regions = [b.module for b in bound.arguments if b.boundary.value == "enter"]
    beside = {s for b in (*bound.arguments, *bound.results) if b.boundary.value == "enter" for s in scopes(b.module)}
    for p in weights(bound.params.values()):
        linear = isinstance(bound.model.get_submodule(p.module), nn.Linear)
        if p.role is Role.PART and linear and not any(under(p.module, r) for r in regions) and next(scopes(p.module)) not in beside:
            text = "is part, and nothing enters a region around it: say column or row, or name what enters under arguments:"
            problems.add(p.entry.at, p.name, text)


def _several(bound: Bound, problems: Problems) -> None:
    """A module with several sharded weights of its own is a region: the recipe has to say which arguments enter and which results
    leave.

    A recipe that covers a part only gets its collectives from the planner.
    """
    if not bound.full:
        return
    leaving = {b.module for b in bound.results if b.boundary.value == "leave"}
    regions = entered(bound)
    for path, params in own_params(bound).items():
        heavy = [p for p in weights(params) if p.names]
        if len(heavy) < 2:
            continue
        for p in heavy:
            if p.role in (Role.COLUMN, Role.ROW, Role.GATHERED):
                text = f"is {p.role.value} in a module of {len(heavy)} cut weights: say part, and what enters and leaves"
                problems.add(p.entry.at, p.name, text)
        if all(p.role is Role.PART for p in heavy):
            if not any(under(path, r) for r in regions):
                problems.add(heavy[0].entry.at, heavy[0].name, f"nothing enters {path}: name its arguments under arguments: as `enter`")
            if not any(under(path, m) for m in leaving):
                problems.add(heavy[0].entry.at, heavy[0].name, f"nothing leaves {path}: name its result under results: as `leave`")


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


_LAYOUT_RULES: tuple[Rule, ...] = (_cut_or_whole, _bias, _ties)
_ROLE_RULES: tuple[Rule, ...] = (_pairs, _dims, _regions, _twice, _entrance, _several)


def cut_sizes(expr: Expr, tp: int) -> set[int]:
    """Returns the numbers of entries that `expr`, and the expressions in it, has and a rank has less of."""
    found = {size(expr)} if size(expr, tp) != size(expr) else set()
    if isinstance(expr, Product):
        runs = (Product(expr.parts[i:j]) for i in range(len(expr.parts)) for j in range(i + 1, len(expr.parts) + 1))
        found |= {size(run) for run in runs if size(run, tp) != size(run)}
    for part in getattr(expr, "parts", ()):
        found |= cut_sizes(part, tp)
    return found
