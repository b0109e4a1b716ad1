"""Makes a recipe of a plan.

Roles follow from the collectives at the modules. Collectives that no role implies stand under `arguments` and `results`. A recipe
cannot express changes inside of forwards, so a plan with some makes a recipe that needs the traced model.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from autotp.errors import RecipeError
from autotp.plan.conversions import Conversion, Op
from autotp.plan.experts import with_cut_width
from autotp.plan.expressions import Concat, Expr, Factor, Product, factors, is_sharded, notation, size
from autotp.plan.layout import Layout
from autotp.plan.loss_parallel import with_whole_logits
from autotp.plan.names import folded
from autotp.plan.notation import mapped, marks
from autotp.plan.placements import placements_of
from autotp.plan.plan import Plan
from autotp.plan.sequence_parallel import with_whole_tokens
from autotp.plan.spec import DistributedForm, GradSum, ModulePlan, Slot
from autotp.recipe.attributes import LOCAL, WHOLE
from autotp.recipe.bind import bind
from autotp.recipe.config_fields import candidates, expressions, fields
from autotp.recipe.spec import Attribute, Boundary, Entry, Granule, RecipeSpec, Role, Shard, Size
from autotp.recipe.unify_names import renamed
from autotp.recipe.unnamed import unnamed


def recipe_of(plan: Plan, *, model: nn.Module | None = None, pin: bool = True) -> RecipeSpec:
    """Returns the recipe of a plan; see `Recipe.from_plan`."""
    made = _Writer(renamed(with_cut_width(with_whole_tokens(with_whole_logits(plan)))), model).run(plan if pin else None)
    made = replace(made, placements=placements_of(plan))
    if model is None:
        return made
    try:
        bound = bind(made, model, plan.tp)
    except RecipeError:  # the rules for roles do not know every way in which a planner may be right: then the proof has to tell
        made = replace(made, trace=True)
        bound = bind(made, model, plan.tp)
    keys = dict.fromkeys(folded(f"{path}.{name}" if path else name) for path, name, _ in unnamed(bound))
    return replace(made, attributes=(*made.attributes, *(Attribute(key, WHOLE) for key in keys)))


def comments_of(plan: Plan, recipe: RecipeSpec) -> dict[str, str]:
    """Returns the facts of the plan that its recipe does not hold, by key: why a parameter is whole, what an axis is."""
    out: dict[str, str] = {}
    for name, p in plan.params.items():
        tied = f"tied to {plan.aliases[name]}" if name in plan.aliases else ""
        out.setdefault(folded(name), folded(tied or p.reason or p.axis))
    return {e.key: out[e.key] for e in recipe.entries if out.get(e.key)}


def size_comments(recipe: RecipeSpec, config: object) -> dict[str, str]:
    """Returns for sizes the fields of the config that have the number, where they are several or none was taken."""
    out: dict[str, str] = {}
    for item in recipe.sizes:
        value = fields(config).get(item.value) if isinstance(item.value, str) else item.value
        same = [n for n in candidates(value, config) if n != item.value] if value is not None else []
        if same:
            out[item.name] = ("as much as " if isinstance(item.value, str) else "as ") + ", ".join(same)
    return out


@dataclass
class _Words:
    """Collects the names of factors: where they are sharded, and which sizes they have."""

    cut: dict[str, Factor] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)
    sizes: dict[str, Counter[int]] = field(default_factory=dict)

    def see(self, layout: Layout) -> None:
        """Take in the names of a parameter's layout."""
        for f in (f for d in layout.dims for f in factors(d)):
            self.sizes.setdefault(f.name, Counter())[f.size] += 1

    def settle(self, layouts: list[Layout]) -> None:
        """Lists names once that are sharded in the same way wherever they stand; the others are marked where they are sharded."""
        ways: dict[str, set[tuple[bool, int, str, int]]] = {}
        for f in (f for layout in layouts for d in layout.dims for f in factors(d)):
            ways.setdefault(f.name, set()).add((f.sharded, f.pieces, f.of, f.granule))
            if f.sharded:
                self.cut[f.name] = f
        self.mixed = {n for n in self.cut if len(ways[n]) > 1}
        for f in list(self.cut.values()):
            if f.of in self.mixed or f.name in self.mixed:
                self.mixed |= {f.name, *([f.of] if f.of else [])}


class _Writer:
    def __init__(self, plan: Plan, model: nn.Module | None) -> None:
        self.plan, self.model, self.config = plan, model, getattr(model, "config", None)
        self.modules = {m.path: m for m in plan.modules}
        self.words = _Words()
        self.layouts: dict[str, Layout] = {}
        for name, p in plan.params.items():
            self.layouts.setdefault(f"{folded(name)} {p.layout} {p.layout.shape}", p.layout)
            self.words.see(p.layout)
        self.words.settle([p.layout for p in plan.params.values()])
        self.named = self._named()
        self.pairs = self._pairs()
        self.blocks: dict[str, set[str]] = {}  # module paths by their folded form
        for path in {".".join(n.split(".")[:i]) for n in plan.params for i in range(1, n.count(".") + 1)}:
            self.blocks.setdefault(folded(path), set()).add(path)
        self.trace = any(self._needs_trace(m) for m in plan.modules)

    def run(self, pinned: Plan | None) -> RecipeSpec:
        entries = tuple(self._entries())
        attributes, arguments, results = tuple(self._attributes()), tuple(self._arguments()), tuple(self._results())
        listed = [n for n, f in self.words.cut.items() if n not in self.words.mixed and not f.of]
        return RecipeSpec(
            name=self.plan.model,
            sizes=tuple(Size(name, value) for name, value in self.named.items()),
            shard=tuple(Shard((n, self.pairs[n]) if n in self.pairs else (n,)) for n in listed),
            granules=tuple(Granule(n, self.words.cut[n].granule) for n in listed if self.words.cut[n].granule > 1),
            entries=entries,
            attributes=attributes,
            arguments=arguments,
            results=results,
            trace=self.trace,
            pinned=pinned,
        )

    # names and sizes ----------------------------------------------------------------------------------------------------------

    def _pairs(self) -> dict[str, str]:
        """Returns major name → the minor one that is cut with it: as the plan does, or as it would where tp does not divide the major."""
        found = {f.of: f.name for f in self.words.cut.values() if f.of and f.name not in self.words.mixed}
        runs = [run for layout in self.layouts.values() for d in layout.dims for run in _products(d)]
        for major, f in self.words.cut.items():
            if f.of or major in found or f.granule > 1 or major in self.words.mixed or f.size % self.plan.tp:
                continue  # where the plan pads the major one, the pieces were no better
            behind = {run[i + 1] for run in runs for i, n in enumerate(run[:-2]) if n == major}  # with another factor behind it
            alone = [run for run in runs if major in run and not behind & set(run)]
            lonely = [run for run in runs if behind & set(run) and major not in run]
            if len(behind) == 1 and alone and not lonely and not next(iter(behind))[0].isdigit():
                found[major] = next(iter(behind))
        return found

    def _named(self) -> dict[str, int | str]:
        """Returns the names whose sizes are written, with the sizes.

        Fields of the config are written wherever they are found. A number ties the recipe to this size, so it is left out where the
        shape tells it: where the name is the only one of its dim whose size is not known.
        """
        dims = [d for layout in self.layouts.values() for d in layout.dims]
        inside = {f.name for d in dims for f in factors(d) if not isinstance(d, Factor) or f.sharded}
        usual = {n: c.most_common(1)[0][0] for n, c in self.words.sizes.items() if not n[0].isdigit() and n != "_"}
        usual = {n: size for n, size in usual.items() if n in inside or len(self.words.sizes[n]) == 1}
        found = expressions(usual, self.config)
        numbers = {n for n, value in found.items() if isinstance(value, int)}
        together = [{f.name for f in factors(d)} & numbers for d in dims]
        needed = {n for names in together if len(names) > 1 for n in names}
        keep = needed if self.config is not None else needed | inside
        return {n: value for n, value in found.items() if n not in numbers or n in keep}

    def _text(self, layout: Layout) -> str:
        return " ".join(self._dim(d) for d in layout.dims) or "()"

    def _dim(self, expr: Expr) -> str:
        """Writes a dim as `notation` does, with marks only on names that are not listed under `shard`."""
        return notation(expr, factor=lambda f: f.name + (marks(f) if f.sharded and f.name in self.words.mixed else ""))

    # parameters ---------------------------------------------------------------------------------------------------------------

    def _entries(self) -> Iterator[Entry]:
        groups: dict[str, dict[tuple[Any, ...], list[str]]] = {}
        for name, p in self.plan.params.items():
            layout = p.layout
            usual = {n: c.most_common(1)[0][0] for n, c in self.words.sizes.items()}
            found = {(f.name, f.size) for d in layout.dims for f in factors(d)}
            own = tuple(sorted((n, size) for n, size in found if n in self.named and usual[n] != size))
            groups.setdefault(folded(name), {}).setdefault((self._role(name), self._text(layout), own), []).append(name)
        for key, ways in groups.items():
            usual_way = max(ways, key=lambda w: len(ways[w]))
            for way, names in ways.items():
                for k in [key] if way == usual_way else names:  # blocks that differ are written out
                    yield Entry(k, way[0], way[1], sizes=way[2])

    def _role(self, name: str) -> Role:
        path, _, leaf = name.rpartition(".")
        layout = self.plan.params[name].layout
        module = self.modules.get(path, ModulePlan(path))
        use = next((u for u in module.uses if (u.owner, u.name) == (path, leaf)), None)
        if layout.dim is None:
            if use is not None and any(c.op is Op.ONCE for c in use.conversions):
                return Role.ROW
            return Role.INSIDE if self._summed(path, leaf) else Role.WHOLE
        if any(s.kernel is DistributedForm.LOOKUP for s in module.sites):
            return Role.LOOKUP
        if path not in self.modules:  # a module that is not called by this name: tied ones are
            called = [n for n in self._tied(name) if n.rpartition(".")[0] in self.modules]
            if any(self._role(n) is Role.LOOKUP for n in called):
                return Role.LOOKUP
        heavy = [
            n for n, p in self.plan.params.items() if n.rpartition(".")[0] == path and len(p.layout.shape) > 1 and p.layout.dim is not None
        ]
        if len(heavy) != 1:
            return Role.PART
        weight = self.plan.params[heavy[0]].layout
        return self._linear_role(module) if len(layout.shape) > 1 or layout.dims[0] == weight.dims[weight.dim or 0] else Role.PART

    def _tied(self, name: str) -> list[str]:
        first = self.plan.aliases.get(name, name)
        return [first, *(n for n, f in self.plan.aliases.items() if f == first)]

    def _linear_role(self, module: ModulePlan) -> Role:
        enters = any(c.op is Op.COPY for s in module.inputs for c in s.conversions)
        result = [c for s in module.outputs if not s.path for c in s.conversions]
        if any(c.row.sums for c in result):
            return Role.ROW
        if enters and any(c.op is Op.GATHER for c in result):
            return Role.GATHERED
        return Role.COLUMN if enters else Role.PART

    def _summed(self, path: str, leaf: str) -> bool:
        return any(u.grad is GradSum.ALL and (u.owner, u.name) == (path, leaf) for m in self.plan.modules for u in m.uses)

    # modules ------------------------------------------------------------------------------------------------------------------

    def _weight_role(self, path: str) -> Role | None:
        """Returns the role of the one weight of a module that implies collectives."""
        found = {self._role(n) for n, p in self.plan.params.items() if n.rpartition(".")[0] == path and len(p.layout.shape) > 1}
        return next(iter(found)) if len(found) == 1 else None

    def _needs_trace(self, m: ModulePlan) -> bool:
        """True for changes that a recipe cannot express."""
        slots = [c.expr for s in (*m.inputs, *m.outputs) for c in s.conversions if c.expr is not None]
        unusual = any(not self._usual(e) for e in slots)
        other_uses = any(u.held or u.owner != m.path or any(c.op is not Op.ONCE for c in u.conversions) for u in m.uses)
        sites = any(s.kernel is not DistributedForm.LOOKUP or s.inputs or s.ints or s.multiples for s in m.changed)
        return other_uses or sites or unusual

    def _arguments(self) -> Iterator[Boundary]:
        found: list[tuple[str, str, str]] = []
        for m in self.plan.modules:
            if self._weight_role(m.path) not in (Role.COLUMN, Role.GATHERED):
                found += [(m.path, ".".join(map(str, slot.path)), self._boundary(slot)) for slot in m.inputs]
        yield from self._folded(found, self._takes)

    def _results(self) -> Iterator[Boundary]:
        found: list[tuple[str, str, str]] = []
        for m in self.plan.modules:
            implied = self._weight_role(m.path) in (Role.ROW, Role.LOOKUP, Role.GATHERED)
            found += [(m.path, ".".join(map(str, s.path)), self._boundary(s)) for s in m.outputs if s.path or not implied]
        yield from self._folded(found, self._gives)

    def _folded(self, items: list[tuple[str, str, str]], has: Callable[[str, str, str], bool]) -> Iterator[Boundary]:
        """Yields the boundaries with numbers as `*` where they can be; optional where `has` tells the modules that have one from
        the others.
        """
        done: set[tuple[str, str, str]] = set()
        for key, name, value in self._merged(items):
            fold, others = folded(key), {p for p, n, v in items if (folded(p), n, v) == (folded(key), name, value)}
            blocks = self.blocks.get(fold, set())
            if key != fold and all(has(p, name, value) == (p in others) for p in blocks):
                if (fold, name, value) not in done:
                    yield Boundary(fold, name, value, optional=True)
                done.add((fold, name, value))
            else:
                yield Boundary(key, name, value)

    def _takes(self, path: str, name: str, value: str) -> bool:
        if self.model is None:
            return False
        return name.partition(".")[0] in inspect.signature(self.model.get_submodule(path).forward).parameters

    def _gives(self, path: str, name: str, value: str) -> bool:
        inside = {self._role(n) for n, p in self.plan.params.items() if n.startswith(path + ".") and p.layout.dim is not None}
        return value == "leave" and Role.PART in inside and Role.ROW not in inside

    def _merged(self, items: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
        """Yields (module, name, value) with numbers as `*` where every block has the same, written out where not."""
        ways: dict[tuple[str, str], dict[str, set[str]]] = {}
        for path, name, value in items:
            ways.setdefault((folded(path), name), {}).setdefault(value, set()).add(path)
        for (key, name), values in ways.items():
            for value, paths in values.items():
                everywhere = paths >= self.blocks.get(key, paths)
                yield from ((k, name, value) for k in ([key] if everywhere else sorted(paths, key=_natural)))

    def _boundary(self, slot: Slot) -> str:
        cut = next((c for c in slot.conversions if c.op in (Op.SLICE, Op.GATHER)), None)
        if cut is not None:
            return self._activation(cut)
        return "leave" if any(c.row.sums for c in slot.conversions) else "enter"

    def _activation(self, c: Conversion) -> str:
        assert c.dim is not None and c.expr is not None
        free = mapped(c.expr, {f.name: replace(f, name="_") for f in factors(c.expr) if f.size == 0})
        return " ".join([self._dim(free), *["_"] * (-c.dim - 1)])

    def _attributes(self) -> Iterator[Attribute]:
        found = [(m.path, a.path, self._attribute(m.path, a.value, a.local)) for m in self.plan.modules for a in m.attributes]
        yield from (Attribute(f"{path}.{name}" if path else name, layout) for path, name, layout in self._merged(found))

    def _usual(self, expr: Expr) -> bool:
        """True where the names of an expression have the sizes that the recipe gives them."""
        return all(self.words.sizes[f.name].most_common(1)[0][0] == f.size for f in factors(expr) if f.name in self.named)

    def _attribute(self, path: str, value: int, local: int) -> str:
        """Returns a layout with the attribute's value and local value, from the parameters in and near its module."""
        for around in (path, path.rpartition(".")[0], ""):
            for name, p in self.plan.params.items():
                if around and not name.startswith(around + "."):
                    continue
                for expr in (e for d in p.layout.dims if is_sharded(d) for e in _inside(d)):
                    if size(expr) == value and size(expr, self.plan.tp) == local and self._usual(expr):
                        return self._dim(expr)
        return LOCAL


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _inside(expr: Expr) -> Iterator[Expr]:
    """`expr`, the products of neighbours in it, and what is in its parts; small ones first."""
    if isinstance(expr, Factor):
        yield expr
        return
    for part in expr.parts:
        yield from _inside(part)
    if isinstance(expr, Product):
        for length in range(2, len(expr.parts)):
            for i in range(len(expr.parts) - length + 1):
                yield Product(expr.parts[i : i + length])
    yield expr


def _products(expr: Expr) -> Iterator[list[str]]:
    """The names of each product in a dim, in order; concatenations inside of one are skipped over."""
    if isinstance(expr, Concat):
        for part in expr.parts:
            yield from _products(part)
    elif isinstance(expr, Product):
        yield [p.name for p in expr.parts if isinstance(p, Factor)]
        for part in expr.parts:
            if not isinstance(part, Factor):
                yield from _products(part)
    else:
        yield [expr.name]
