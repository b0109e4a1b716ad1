"""A `Recipe` is a layout plan for a family of models: a value that is read from YAML, merged, written and bound to a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, final

from torch import nn

from autotp.errors import InputError, RecipeError
from autotp.plan.plan import Plan
from autotp.recipe import dump, from_plan, interchange, load, untraced
from autotp.recipe.spec import RecipeSpec
from autotp.targets import check_ranks


@final
@dataclass(frozen=True)
class Recipe(RecipeSpec):
    """A recipe says how the parameters of a family of models are laid out over tensor-parallel ranks.

    It has the fields of `autotp.recipe.spec.RecipeSpec`. `load`, `loads` and the `from_` methods make one. Recipes are equal when
    they say the same, wherever they were read from.
    """

    @classmethod
    def _of(cls, spec: RecipeSpec) -> Self:
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec)})

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
        """Reads a recipe: a path to a YAML file, the name of a bundled recipe or of a model type that it covers, a mapping, or YAML
        text.

        Raises:
            RecipeError: no such file or name, or problems in it: all of them at once, each as ``file:line:column: …``.
        """
        if isinstance(source, Recipe):
            return source
        return cls._of(load.load(source))

    @classmethod
    def loads(cls, text: str, *, file: str = "<text>") -> Recipe:
        """Reads a recipe from YAML text; its problems are reported under the name `file`.

        Raises:
            RecipeError: as for `load`.
        """
        return cls._of(load.loads(text, file))

    def merge(self, other: Recipe) -> Recipe:
        """Returns this recipe with all of `other` put over it, as `extends` does. A key keeps the role that `other` gives it.

        Raises:
            RecipeError: `other` is no Recipe.
        """
        if not isinstance(other, Recipe):
            raise RecipeError(f"merge takes an autotp.Recipe, got {type(other).__name__}; Recipe.load reads one")
        return self._of(load.merged(self, other))

    def dump(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns the YAML text, and writes it to `path` where one is given: `Recipe.loads(recipe.dump()) == recipe`.

        Raises:
            InputError: `path` is none, or cannot be written.
        """
        text = dump.text_of(self)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except TypeError as error:
                raise InputError(f"dump: path is {path!r}, wanted a path in str") from error
            except (OSError, ValueError) as error:
                raise InputError(f"{str(path)!r}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
        return text

    def to_dict(self) -> dict[str, Any]:
        """Returns the data of the YAML text: `Recipe.load(recipe.to_dict()) == recipe`."""
        return dump.data_of(self)

    @classmethod
    def from_plan(cls, plan: Plan, *, model: nn.Module | None = None, pin: bool = True) -> Recipe:
        """Returns the recipe of a plan. `pin` keeps the plan itself in it: `Recipe.from_plan(plan).to_plan() == plan`.

        Args:
            plan: the result of `autotp.plan` or `autotp.plan_of`.
            model: the model that the plan was made for, before it became parallel. Sizes are then written as fields of its config
                where a likely field has the number, and attributes that stay whole are named.
            pin: False for a recipe to edit, or to use at other sizes and numbers of ranks.

        Raises:
            InputError: `plan` is no Plan, or `model` no nn.Module. RecipeError: `model` is not the one that it was made for.
        """
        if not isinstance(plan, Plan):
            raise InputError(f"from_plan takes an autotp.Plan, got {type(plan).__name__}")
        _check_model("from_plan", model)
        return cls._of(from_plan.recipe_of(plan, model=model, pin=pin))

    @classmethod
    def from_tp_plan(cls, tp_plan: Mapping[str, str], model: nn.Module | None = None) -> Recipe:
        """Returns the recipe of a transformers `tp_plan` (`model.tp_plan`, `config.base_model_tp_plan`), with layouts for the names
        in it alone.

        Args:
            tp_plan: name of a module, or of an expert parameter, → style.
            model: where given, names are looked up in it. Names that it does not have are left out and listed in `about`: a tp_plan
                covers a family, and a model of the family need not have all of its names.

        Raises:
            InputError: `model` is no nn.Module. RecipeError: a style without a counterpart, or no name that `model` has.
        """
        _check_model("from_tp_plan", model)
        return cls._of(interchange.from_tp_plan(tp_plan, model))

    @classmethod
    def from_parallelize_module(cls, styles: Mapping[str, Any], model: nn.Module | None = None) -> Recipe:
        """Returns the recipe of a `parallelize_plan` of torch's `parallelize_module`, with layouts for the names in it alone.

        Raises:
            InputError: `model` is no nn.Module. RecipeError: a style other than Colwise- and RowwiseParallel with whole or last-dim
                layouts, a name that `model` does not have.
        """
        _check_model("from_parallelize_module", model)
        return cls._of(interchange.from_parallelize_module(styles, model))

    def to_plan(self, model: nn.Module | None = None, *, tp: int | None = None) -> Plan:
        """Returns the plan that the recipe alone makes, without tracing and without proof; `autotp.plan(model, tp=…, recipe=…)`
        proves it.

        Args:
            model: the model to plan for; None for a recipe that holds its plan (`from_plan`), which is then returned.
            tp: number of ranks; with no model, that of the plan or None.

        Raises:
            RecipeError: it does not fit the model, does not cover it, or needs the traced model (`trace: required`); without a
                model, it holds no plan for so many ranks. InputError:
                `model` is no nn.Module, or `tp` no positive int.
        """
        if model is None:
            if self.pinned is None:
                raise RecipeError(f"{self.file}: holds no plan of its own: give the model and tp=")
            if tp is not None and tp != self.pinned.tp:
                raise RecipeError(f"{self.file}: holds a plan for tp {self.pinned.tp}, not for {tp!r}: give the model as well")
            return self.pinned
        if not isinstance(model, nn.Module):
            raise InputError(f"to_plan takes an nn.Module, got {type(model).__name__}")
        if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
            raise InputError(f"to_plan(model) needs tp=, the number of ranks; got {tp!r}")
        check_ranks(tp)
        return untraced.static_plan(self, model, tp)


def _check_model(caller: str, model: object) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise InputError(f"{caller}: model is {type(model).__name__}, wanted an nn.Module")
