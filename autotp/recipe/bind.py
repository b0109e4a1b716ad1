"""Binds a recipe to a model and tp: the layout of every parameter that the recipe covers, and the changes at each module.

Binding traces nothing and changes nothing. It finds everything that does not fit before it raises.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import gcd, prod

from torch import nn

from autotp.errors import InputError
from autotp.plan.expressions import Expr, Factor, Product, factors, is_sharded, size
from autotp.plan.layout import Layout
from autotp.plan.names import folded
from autotp.plan.notation import mapped, parse, sized
from autotp.recipe.attributes import bind_attributes
from autotp.recipe.binding import Bound, BoundBoundary, BoundParam
from autotp.recipe.check import check
from autotp.recipe.patterns import Pattern, best, nearest
from autotp.recipe.problems import Problems, error_of
from autotp.recipe.sizes import size_of
from autotp.recipe.spec import Boundary, Entry, RecipeSpec, Role


def bind(recipe: RecipeSpec, model: nn.Module, tp: int) -> Bound:
    """Fits the recipe to the model.

    Raises:
        RecipeError: everything in the recipe that does not fit, with its place.
    """
    problems = Problems()
    bound = _Binder(recipe, model, tp, problems).run()
    if problems:
        raise error_of(problems)
    check(bound, problems)
    if problems:
        raise error_of(problems)
    return bound


class _Binder:
    def __init__(self, recipe: RecipeSpec, model: nn.Module, tp: int, problems: Problems) -> None:
        self.recipe, self.model, self.tp, self.problems = recipe, model, tp, problems
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        self.sizes: dict[str, int] = {}
        self.pieces: dict[tuple[str, int, int], int] = {}

    def run(self) -> Bound:
        self._sizes()
        aliases = _aliases(self.model)
        matched = self._match(aliases)
        params: dict[str, BoundParam] = {}
        plain = self._plain(matched)
        self._granules(plain.values())
        for name, entry in matched.items():
            dims = plain.get((entry.key, self.shapes[name]))
            if dims is None:
                continue
            marked = tuple(self._marked(d, plain.values()) for d in dims) if entry.role.cut else dims
            try:
                params[name] = BoundParam(name, entry, Layout(self.shapes[name], marked, self.tp))
            except InputError as error:
                self.problems.add(entry.at, name, str(error))
        uncovered = tuple(n for n in self.shapes if n not in matched)
        values = {**self.sizes}
        for p in params.values():
            for f in (f for d in p.layout.dims for f in factors(d) if f.sharded):
                values.setdefault(f.name, f.size)
        cut = lambda text: self._free(text, plain.values(), values)  # noqa: E731
        return Bound(
            self.recipe, self.model, self.tp, params, uncovered, aliases,
            tuple(bind_attributes(self.recipe.attributes, self.modules, cut, self.tp, self.problems)),
            tuple(self._boundaries("arguments", self.recipe.arguments, params, plain.values(), values)),
            tuple(self._boundaries("results", self.recipe.results, params, plain.values(), values)),
        )  # fmt: skip

    # sizes and names ----------------------------------------------------------------------------------------------------------

    def _sizes(self) -> None:
        used = {f.name for e in self.recipe.entries for d in parse(e.layout) for f in factors(d)}
        texts = [*(a.layout for a in self.recipe.attributes), *(b.value for b in (*self.recipe.arguments, *self.recipe.results))]
        used |= {f.name for text in texts for d in parse(text) for f in factors(d)}
        for item in self.recipe.sizes:
            try:
                self.sizes[item.name] = size_of(item.value, self.model)
            except InputError as error:
                if item.name in used:
                    self.problems.add(item.pos, f"sizes.{item.name}", str(error))
            if item.name not in used and item.pos.file == self.recipe.file:  # an inherited one may have lost its layouts
                self.problems.add(item.pos, f"sizes.{item.name}", f"stands in no layout{nearest(item.name, used)}")
        for shard in self.recipe.shard:
            for name in shard.names:
                if name not in used:
                    self.problems.add(shard.pos, "shard", f"{name} stands in no layout{nearest(name, used)}")
        majors = {shard.names[0] for shard in self.recipe.shard}
        for granule in (g for g in self.recipe.granules if g.pos.file == self.recipe.file):
            if granule.name not in used:
                self.problems.add(granule.pos, f"granules.{granule.name}", f"stands in no layout{nearest(granule.name, used)}")
            elif granule.name not in majors:
                text = f"is not cut, so that it has no parts (shard: {_names(self.recipe)})"
                self.problems.add(granule.pos, f"granules.{granule.name}", text)

    def _match(self, aliases: Mapping[str, str]) -> dict[str, Entry]:
        entries = self.recipe.entries
        patterns = [Pattern(e.key) for e in entries]
        found: dict[str, Entry] = {}
        hit: set[int] = set()
        cache: dict[str, list[int]] = {}
        numbered = any(part.isdigit() for e in entries for part in e.key.split("."))
        for name in self.shapes:
            short = folded(name)
            if short not in cache or numbered:
                cache[short] = best(patterns, name)
            winners = cache[short]
            if len(winners) > 1:
                keys = " and ".join(entries[i].key for i in winners)
                self.problems.add(entries[winners[1]].pos, name, f"{keys} match it equally well; write one of them longer")
            if winners:
                found[name] = entries[winners[0]]
                hit.update(winners)
        for name, first in aliases.items():  # a tied parameter is laid out once
            if name not in found and first in found:
                found[name] = found[first]
            elif first not in found and name in found:
                found[first] = found[name]
        for i, entry in enumerate(entries):
            if i in hit or entry.optional:
                continue
            if any(patterns[i].matches(n) for n in self.shapes):
                text = f"{entry.key} has no parameter left: longer keys have them all"
            else:
                kind = type(self.model).__name__
                text = (
                    f"no parameter of {kind} is called {entry.key}{nearest(entry.key, self.shapes)} (a key that may be missing ends in ?)"
                )
            self.problems.add(entry.pos, "", text)
        return {n: found[n] for n in self.shapes if n in found}

    def _plain(self, matched: Mapping[str, Entry]) -> dict[tuple[str, tuple[int, ...]], tuple[Expr, ...]]:
        """Returns sized dims by entry and shape, before anything is cut."""
        out: dict[tuple[str, tuple[int, ...]], tuple[Expr, ...]] = {}
        wrong: set[tuple[str, tuple[int, ...]]] = set()
        for name, entry in matched.items():
            shape = self.shapes[name]
            key = (entry.key, shape)
            if key in out or key in wrong:
                continue
            try:
                dims = sized(parse(entry.layout), shape, {**self.sizes, **dict(entry.sizes)})
            except InputError as error:
                self.problems.add(entry.at, name, f'"{entry.layout}": {error}; the parameter is {list(shape)}')
                wrong.add(key)
                continue
            bad = [i for i, (d, n) in enumerate(zip(dims, shape, strict=True)) if size(d) != n]
            if bad:
                texts = "; ".join(f"dim {i} is {_product(dims[i])}, wanted {shape[i]}" for i in bad)
                self.problems.add(entry.at, name, f'"{entry.layout}" does not multiply out to {list(shape)}: {texts}')
                wrong.add(key)
                continue
            out[key] = dims
        return out

    def _granules(self, every: Iterable[tuple[Expr, ...]]) -> None:
        """Report granules that are larger than everything of their name."""
        largest: dict[str, int] = {}
        for f in (f for dims in every for d in dims for f in factors(d)):
            largest[f.name] = max(f.size, largest.get(f.name, 0))
        for granule in self.recipe.granules:
            most = largest.get(granule.name, granule.value)
            if most < granule.value and granule.pos.file == self.recipe.file:
                text = f"got {granule.value}, wanted at most the size of {granule.name}, which is {most}"
                self.problems.add(granule.pos, f"granules.{granule.name}", text)

    # what is cut --------------------------------------------------------------------------------------------------------------

    def _marked(self, expr: Expr, every: Iterable[tuple[Expr, ...]]) -> Expr:
        """Returns `expr` with the factors of `shard` cut; those that carry a mark of their own stay as they are."""
        own = {f.name: f for f in factors(expr)}
        marks: dict[str, Factor] = {}
        granules = {g.name: g.value for g in self.recipe.granules}
        for shard in self.recipe.shard:
            major, minor = own.get(shard.names[0]), own.get(shard.names[-1])
            if (major or minor) is None or (major or minor).sharded:  # type: ignore[union-attr]  # one of them is there
                continue
            length = self._size(shard.names[0], shard.names[-1], minor, every) if major is None else major.size
            pieces = 1
            if len(shard.names) == 2 and length % self.tp:
                group = self._size(shard.names[1], shard.names[0], major, every) if minor is None else minor.size
                pieces = self._pieces(shard.names, length, group, every)
            if major is not None:
                granule = gcd(granules.get(major.name, 1), major.size) if pieces == 1 else 1
                marks[major.name] = replace(major, sharded=True, pieces=pieces, granule=granule)
            if minor is not None and pieces > 1:
                marks[minor.name] = replace(minor, sharded=True, pieces=pieces, of=shard.names[0])
        return mapped(expr, marks)

    def _size(self, name: str, beside: str, other: Factor | None, every: Iterable[tuple[Expr, ...]]) -> int:
        """Returns the size of a name in the parameters where `other`, called `beside`, has the size that it has here."""
        for dims in every:
            found = {f.name: f.size for d in dims for f in factors(d)}
            if name in found and (other is None or found.get(beside) == other.size):
                return found[name]
        return self.sizes.get(name, 1)

    def _pieces(self, names: tuple[str, ...], major: int, minor: int, every: Iterable[tuple[Expr, ...]]) -> int:
        """Returns the number of pieces that leaves a rank the fewest elements; 1 pads the major names instead."""
        key = (names[0], major, minor)
        if minor < 1:  # a size that could not be told, which is a problem already
            return 1
        if key not in self.pieces:
            fewest = {-(-minor // -(-minor // n)) for n in range(1, minor + 1)}  # fewest pieces for each piece's size
            self.pieces[key] = min(fewest, key=lambda n: self._held(names, major, minor, n, every))
        return self.pieces[key]

    def _held(self, names: tuple[str, ...], major: int, minor: int, pieces: int, every: Iterable[tuple[Expr, ...]]) -> tuple[int, ...]:
        big = Factor(names[0], major, True, pieces)
        cut = {names[0]: big, **({names[1]: Factor(names[1], minor, True, pieces, names[0])} if pieces > 1 else {})}
        held = 0
        for dims in every:
            found = {f.name: f.size for d in dims for f in factors(d)}
            if found.get(names[0]) == major:
                held += prod(size(mapped(d, cut), self.tp) for d in dims)
        own = size(big, self.tp)
        return held, own * (-(-minor // pieces)), pieces

    def _free(self, text: str, every: Iterable[tuple[Expr, ...]], values: Mapping[str, int]) -> tuple[Expr, ...]:
        """Returns the dims of an activation or an attribute: names of known size are cut as they are in parameters, others have any
        size (0).
        """
        dims = []
        for dim in parse(text):
            known = {f.name: replace(f, size=values.get(f.name, 0)) for f in factors(dim) if f.size < 0}
            dims.append(self._marked(mapped(dim, known), every))
        return tuple(dims)

    # boundaries ---------------------------------------------------------------------------------------------------------------

    def _boundaries(
        self,
        kind: str,
        items: Iterable[Boundary],
        params: Mapping[str, BoundParam],
        every: Iterable[tuple[Expr, ...]],
        values: Mapping[str, int],
    ) -> Iterable[BoundBoundary]:
        for item in items:
            pattern = Pattern(item.module)
            hits = [path for path in self.modules if pattern.matches(path)]
            if not hits and not item.optional:
                self.problems.add(item.pos, kind, f"no module is called {item.module}{nearest(item.module, self.modules)}")
            dims = None
            if item.value not in ("enter", "leave"):
                dims = self._free(item.value, every, values)
                if sum(map(is_sharded, dims)) != 1:
                    text = f'"{item.value}" must have one dim that is cut (shard: {_names(self.recipe)})'
                    self.problems.add(item.pos, ".".join(filter(None, (kind, item.module, item.path))), text)
                    continue
            parts = tuple(int(p) if p.isdigit() else p for p in item.path.split(".")) if item.path else ()
            for path in hits:
                if self._gives(path, item, params) if kind == "results" else self._takes(path, item, str(parts[0])):
                    yield BoundBoundary(path, parts, item, dims)

    def _gives(self, path: str, item: Boundary, params: Mapping[str, BoundParam]) -> bool:
        """False for a module whose result may leave and does not: a row in it has summed over the sharded dim, or nothing in it is
        sharded.
        """
        if not item.optional or item.value != "leave":
            return True
        inside = {p.role for p in params.values() if p.names and (p.module + ".").startswith(path + "." if path else "")}
        return Role.PART in inside and Role.ROW not in inside

    def _takes(self, path: str, item: Boundary, argument: str) -> bool:
        """True when the forward of a module has the argument."""
        names = inspect.signature(self.modules[path].forward).parameters
        if argument not in names and not item.optional:
            near = difflib.get_close_matches(argument, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(names)}"
            self.problems.add(item.pos, f"arguments.{path}", f"its forward has no argument {argument!r}{hint}")
        return argument in names


def _names(recipe: RecipeSpec) -> str:
    return ", ".join(" ".join(s.names) for s in recipe.shard) or "nothing"


def _product(expr: Expr) -> str:
    """Returns `expr` with the sizes in place of the names, and their product."""
    return f"{expr.name} = {expr.size}" if isinstance(expr, Factor) else f"{_text(expr)} = {size(expr)}"


def _text(expr: Expr) -> str:
    if isinstance(expr, Factor):
        return str(expr.size)
    return f"({('·' if isinstance(expr, Product) else ' + ').join(map(_text, expr.parts))})"


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    out: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            out[name] = first[id(p)]
    return out
