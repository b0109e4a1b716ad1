"""`Recipe`: a layout plan for a family of models, as a value that is read from YAML, merged, written and bound to a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autotp.errors import InputError, RecipeError
from autotp.recipe import bundled
from autotp.recipe.parse import Layer, layer_of
from autotp.recipe.spec import Attribute, Boundary, Entry, Role, Shard, Size
from autotp.recipe.yaml_source import MOST, Pos, Source, from_data, read
from autotp.targets import check_ranks
from autotp.textfile import read_text, reason

if TYPE_CHECKING:
    from autotp.plan.plan import Plan


@dataclass(frozen=True)
class Recipe:
    """How the parameters of a family of models are laid out over tensor-parallel ranks.

    Made by `load`, `loads` and the `from_` methods. Recipes are equal when they say the same, wherever they were read from.

    entries: parameters by pattern, with role and layout. sizes: names and what they stand for. shard: names that are cut.
    granules: name → number that local parts are multiples of. attributes, arguments, results: what changes at modules.
    trace: only a traced model can be rewritten by it. unsafe: it is used without proof, for `reason`. pinned: the exact plan that it
    was made from. See docs/recipes.md.
    """

    name: str = ""
    about: str = ""
    families: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    shard: tuple[Shard, ...] = ()
    granules: tuple[tuple[str, int], ...] = ()
    entries: tuple[Entry, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    arguments: tuple[Boundary, ...] = ()
    results: tuple[Boundary, ...] = ()
    trace: bool = False
    unsafe: bool = False
    reason: str = ""
    pinned: Plan | None = None
    file: str = field(default="<recipe>", compare=False)

    def __post_init__(self) -> None:
        # In the order in which they are written, so that a recipe equals what is read back.
        object.__setattr__(self, "entries", tuple(e for role in Role for e in self.entries if e.role is role))
        for name in ("arguments", "results"):
            items: tuple[Boundary, ...] = getattr(self, name)
            modules = dict.fromkeys(b.module for b in items)
            object.__setattr__(self, name, tuple(b for m in modules for b in items if b.module == m))

    @property
    def place(self) -> Pos:
        """Where a problem is said to be that belongs to the whole file: its attributes, or its first line."""
        return self.attributes[0].pos if self.attributes else Pos(self.file, 0 if self.file.startswith("<") else 1, 1)

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from a path to a YAML file, the name of a bundled recipe or of a model type it is for, a mapping, or YAML text.

        Raises:
            RecipeError: no such file or name, or problems in it: all of them at once, each as ``file:line:column: …``.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._of(from_data(source), None, ())
        if not isinstance(source, str | os.PathLike):
            raise RecipeError(f"a recipe is a path, a bundled name, a mapping or an autotp.Recipe, got {type(source).__name__}")
        if isinstance(source, str) and "\n" in source:
            return cls.loads(source)
        path = bundled.find(os.fspath(source))
        return cls._read(path, ())

    @classmethod
    def loads(cls, text: str, *, file: str = "<text>") -> Recipe:
        """A recipe from YAML text; `file` is what its problems are reported under.

        Raises:
            RecipeError: as for `load`.
        """
        if not isinstance(text, str):
            raise RecipeError(f"loads takes YAML text, got {type(text).__name__}; load takes more")
        return cls._of(read(text, file), None, ())

    @classmethod
    def _read(cls, path: Path, inside: tuple[Path, ...]) -> Recipe:
        try:
            text = read_text(path, MOST)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read: {reason(error)}") from error
        return cls._of(read(text, str(path) if not bundled.is_bundled(path) else path.name), path, inside)

    @classmethod
    def _of(cls, source: Source, path: Path | None, inside: tuple[Path, ...]) -> Recipe:
        problems = list(source.problems)
        layer = layer_of(source, problems)
        marks = {p.partition(": ")[0] for p in source.problems}
        problems = [*source.problems, *(p for p in problems[len(source.problems) :] if p.partition(": ")[0] not in marks)]
        base: Recipe | None = None
        if layer is not None:
            for name, pos in layer.extends:
                try:
                    parent = cls._parent(name, path, inside)
                except RecipeError as error:
                    problems += [f"{pos}: extends {name!r}: {p}" for p in error.problems]
                    continue
                base = parent if base is None else base.merge(parent)
        if layer is None or problems:
            raise RecipeError(sorted(dict.fromkeys(problems), key=_line))
        made = _merged(base or cls(), layer, problems)
        if problems:
            raise RecipeError(problems)
        default = path.stem if path is not None else ""
        return replace(made, name=layer.recipe.name or default)

    @classmethod
    def _parent(cls, name: str, path: Path | None, inside: tuple[Path, ...]) -> Recipe:
        found = bundled.find(name, beside=None if path is None else path.parent)
        own = () if path is None else (path.resolve(),)
        if found.resolve() in (*inside, *own):
            raise RecipeError("it extends itself")
        return cls._read(found, (*inside, *own))

    def merge(self, other: Recipe) -> Recipe:
        """This recipe with everything that `other` says put over it: what `extends` does. A key keeps the role that `other` gives it.

        Raises:
            RecipeError: `other` is no Recipe.
        """
        if not isinstance(other, Recipe):
            raise RecipeError(f"merge takes an autotp.Recipe, got {type(other).__name__}; Recipe.load reads one")
        problems: list[str] = []
        return _merged(self, Layer(other, (), {}, bool(other.shard)), problems)

    def dump(self, path: str | os.PathLike[str] | None = None) -> str:
        """The YAML text, written to `path` where one is given: `Recipe.loads(recipe.dump()) == recipe`.

        Raises:
            InputError: `path` cannot be written.
        """
        from autotp.recipe.dump import text_of

        text = text_of(self)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        return text

    def to_dict(self) -> dict[str, Any]:
        """The data of the YAML text: `Recipe.load(recipe.to_dict()) == recipe`."""
        from autotp.recipe.dump import data_of

        return data_of(self)

    @classmethod
    def from_plan(cls, plan: Plan, *, model: nn.Module | None = None, pin: bool = True) -> Recipe:
        """The recipe of a plan. `pin` keeps the plan itself in it: `Recipe.from_plan(plan).to_plan() == plan`.

        Args:
            plan: what `autotp.plan` or `autotp.plan_of` returned.
            model: the model that it was made for, before it was made parallel: sizes are written as fields of its config where a
                likely one has the number, and attributes that stay whole are named.
            pin: False for a recipe to edit, or to use at other sizes and numbers of ranks.

        Raises:
            InputError: `plan` is no Plan. RecipeError: `model` is not the one that it was made for.
        """
        from autotp.plan.plan import Plan
        from autotp.recipe.from_plan import recipe_of

        if not isinstance(plan, Plan):
            raise InputError(f"from_plan takes an autotp.Plan, got {type(plan).__name__}")

        return recipe_of(plan, model=model, pin=pin)

    @classmethod
    def from_tp_plan(cls, tp_plan: Mapping[str, str], model: nn.Module | None = None) -> Recipe:
        """The recipe of a transformers `tp_plan` (`model.tp_plan`, `config.base_model_tp_plan`): layouts for what it names, no more.

        Args:
            tp_plan: name of a module, or of an expert parameter, → style.
            model: where given, names are looked up in it. Those that it does not have are left out and listed in `about`: a tp_plan is
                written for a family, and its models do not have all that it names.

        Raises:
            RecipeError: a style without a counterpart, or no name that `model` has.
        """
        from autotp.recipe.interchange import from_tp_plan

        return from_tp_plan(tp_plan, model)

    @classmethod
    def from_parallelize_module(cls, styles: Mapping[str, Any], model: nn.Module | None = None) -> Recipe:
        """The recipe of a `parallelize_plan` of torch's `parallelize_module`: layouts for what it names, no more.

        Raises:
            RecipeError: a style other than Colwise- and RowwiseParallel with whole or last-dim layouts, a name that `model` does not have.
        """
        from autotp.recipe.interchange import from_parallelize_module

        return from_parallelize_module(styles, model)

    def to_plan(self, model: nn.Module | None = None, *, tp: int | None = None) -> Plan:
        """The plan that the recipe alone makes, without tracing and without proof; `autotp.plan(model, tp=…, recipe=…)` proves it.

        Args:
            model: what to plan for; None for a recipe that holds its plan (`from_plan`), which is then returned.
            tp: number of ranks.

        Raises:
            RecipeError: it does not fit the model, does not cover it, or needs the traced model (`trace: required`). InputError: `model` is
                no nn.Module, or `tp` no positive int.
        """
        if model is None:
            if self.pinned is None:
                raise RecipeError(f"{self.file}: holds no plan of its own: give the model and tp=")
            return self.pinned
        if not isinstance(model, nn.Module):
            raise InputError(f"to_plan takes an nn.Module, got {type(model).__name__}")
        if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
            raise InputError(f"to_plan(model) needs tp=, the number of ranks; got {tp!r}")
        check_ranks(tp)
        from autotp.recipe.untraced import static_plan

        return static_plan(self, model, tp)


def _merged(base: Recipe, layer: Layer, problems: list[str]) -> Recipe:
    top = layer.recipe
    removed = layer.removed

    def pruned(kind: str, items: Sequence[Any], name: Any) -> list[Any]:
        gone = removed.get(kind, {})
        known = {name(item) for item in items}
        problems.extend(f"{pos}: {kind}: takes out {key!r}, which is not inherited" for key, pos in gone.items() if key not in known)
        return [item for item in items if name(item) not in gone]

    return replace(
        top,
        about=top.about or base.about,
        sizes=_over(base.sizes, top.sizes, lambda s: s.name),
        shard=top.shard if layer.shards else base.shard,
        granules=tuple({**dict(base.granules), **dict(top.granules)}.items()),
        entries=_over(pruned("parameters", base.entries, lambda e: e.key), top.entries, lambda e: e.key),
        attributes=_over(pruned("attributes", base.attributes, lambda a: a.key), top.attributes, lambda a: a.key),
        arguments=_over(pruned("arguments", base.arguments, lambda b: b.module), top.arguments, lambda b: (b.module, b.path)),
        results=_over(pruned("results", base.results, lambda b: b.module), top.results, lambda b: (b.module, b.path)),
        trace=top.trace or base.trace,
        unsafe=top.unsafe or base.unsafe,
        reason=top.reason or base.reason,
    )


def _over(base: Sequence[Any], top: Sequence[Any], name: Any) -> tuple[Any, ...]:
    return tuple({**{name(item): item for item in base}, **{name(item): item for item in top}}.values())


def _line(problem: str) -> tuple[str, int, int]:
    file, _, rest = problem.partition(":")
    numbers = rest.split(":")[:2]
    return (file, *(int(n) if n.isdigit() else 0 for n in (*numbers, "", "")[:2]))  # type: ignore[return-value]
