"""Defines the form of a recipe file as pydantic models; `RecipeFile.model_json_schema()` gives it to editors.

Only form is checked here, by names and types. `autotp.recipe.bind` and `check` check the recipe against a model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from autotp.recipe.problems import Problem
from autotp.recipe.yaml_source import Source

Text = Annotated[StrictStr, Field(min_length=1)]


class EntryForm(BaseModel):
    """A parameter's layout with more to say than one line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Text = Field(description="its dims in layout notation")
    sizes: dict[StrictStr, StrictInt] = Field({}, description="sizes of names in this entry only")
    axis: StrictStr = Field("", description="label for people: attention, mlp, …")
    reason: StrictStr = Field("", description="why it stays whole")


class PlacementsForm(BaseModel):
    """Choices of placement beside layouts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss_parallel: StrictBool = Field(False, description="leave logits in parts over the ranks, for losses that need no more")
    sequence_parallel: StrictBool | Literal["auto"] = Field(
        False, description="leave hidden states between regions in parts over the tokens; `auto` does so in calls of many tokens"
    )
    experts: Literal["width", "whole", "auto"] = Field(
        "width", description="what of a mixture of experts is cut: the width inside each, or their number (whole); auto: the better one"
    )


Section = dict[StrictStr, Text | EntryForm | None]
_SECTION = (
    "parameter name or its last parts (* for any characters, ? at the end: may be missing) → layout; null takes an inherited key out. "
)


class RecipeFile(BaseModel):
    """A recipe: how the parameters of a family of models are laid out over the ranks of a tensor-parallel mesh."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="autotp recipe")

    recipe: Text | None = Field(None, description="name of the recipe")
    about: StrictStr = Field("", description="what it is for, in a sentence")
    extends: Text | list[Text] | None = Field(None, description="bundled name or path, relative to this file, of what this recipe adds to")
    families: list[Text] = Field([], description="model types that it is tested with; each is a name for it too")
    sizes: dict[StrictStr, StrictInt | Text] = Field(
        {}, description="name → number, or expression over fields of the model's config: `num_attention_heads // num_key_value_heads`"
    )
    shard: list[Text] | None = Field(
        None, description="names that are cut over the ranks; `kv group`: each kv's group is cut in pieces where tp does not divide kv"
    )
    granules: dict[StrictStr, StrictInt] = Field({}, description="name → number that each rank's part is a multiple of, as kernels want it")
    column: Section = Field({}, description=_SECTION + "Column-parallel: a whole activation enters, each rank makes its part")
    row: Section = Field({}, description=_SECTION + "Row-parallel: partial sums are all-reduced; a bias here is added once")
    lookup: Section = Field({}, description=_SECTION + "A table whose rows are cut: each rank looks up its own, results are all-reduced")
    gathered: Section = Field({}, description=_SECTION + "Column-parallel, its result gathered from all ranks (a language model's head)")
    part: Section = Field({}, description=_SECTION + "Cut, and used inside a sharded region: nothing is communicated")
    inside: Section = Field({}, description=_SECTION + "Whole, but used inside a sharded region: its gradient is summed over the ranks")
    whole: Section = Field({}, description=_SECTION + "Whole and used outside of sharded regions")
    attributes: dict[StrictStr, Text | None] = Field(
        {}, description="int attribute of a module that becomes local → its value in layout notation: `attn.split_size: (h d)`"
    )
    arguments: dict[StrictStr, dict[StrictStr, Text] | None] = Field(
        {}, description="module → argument of its forward → `enter` (whole, used inside a region) or the layout it is cut to"
    )
    results: dict[StrictStr, dict[StrictStr, Text] | None] = Field(
        {}, description="module → part of its result ('' for all of it) → `leave` (all-reduced), `enter`, or the layout it is gathered from"
    )
    placements: PlacementsForm = Field(
        PlacementsForm(loss_parallel=False, sequence_parallel=False, experts="width"),
        description="choices beside layouts: `loss_parallel: true`",
    )
    trace: Literal["required"] | None = Field(
        None, description="`required`: calls inside of forwards have to be changed, which only the traced model tells"
    )
    unsafe: StrictBool = Field(False, description="use the recipe as it is, without proof; wants a reason")
    reason: StrictStr = Field("", description="why the recipe is right though it cannot be proven")
    plan: dict[str, Any] | None = Field(None, description="the exact plan that the recipe was made from; not for editing")


def validated(source: Source, problems: list[Problem]) -> RecipeFile | None:
    """Returns the form of a source's data. Mistakes go to `problems`, each with its place, the value found and the value wanted."""
    try:
        return RecipeFile.model_validate(source.data)
    except ValidationError as error:
        wrong: dict[tuple[str, ...], Problem] = {}
        for item in error.errors():
            if item["type"] == "string_type" and isinstance(item["input"], Mapping) and "EntryForm" in str(error):
                continue  # the other form of an entry says what is wrong in it
            path = tuple(str(part) for part in item["loc"])
            path, problem = _explained(path, item, source)
            wrong.setdefault(path, problem)
        problems += wrong.values()
        return None


def _explained(path: tuple[str, ...], item: Mapping[str, Any], source: Source) -> tuple[tuple[str, ...], Problem]:
    known: tuple[str, ...] = ()
    for part in path:  # pydantic adds which member of a union it tried
        if _reach(source.data, (*known, part)) is not _NOTHING:
            known = (*known, part)
    got = item["input"]
    name = ".".join(known)
    if item["type"] == "extra_forbidden":
        form = RecipeFile if len(known) == 1 else PlacementsForm if known[0] == "placements" else EntryForm
        fields = form.model_fields
        near = difflib.get_close_matches(known[-1], fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; wanted one of {', '.join(fields)}"
        return known, Problem(source.at(known, key=True), f"unknown key {known[-1]!r}{hint}")
    shown = json.dumps(got, default=str, ensure_ascii=False)
    text = f"{name or 'the recipe'}: got {shown if len(shown) < 60 else type(got).__name__}, wanted {_wanted(known)}"
    return known, Problem(source.at(known), text)


def _wanted(path: tuple[str, ...]) -> str:
    if len(path) == 2 and path[0] in _SECTIONS:
        return 'a layout, as in "(h d) e"'
    if path == ("placements", "experts"):
        return "width, whole or auto"
    if path == ("placements", "sequence_parallel"):
        return "true, false or auto"
    if len(path) > 1 and path[0] == "placements":
        return "true or false"
    if len(path) > 1 and path[0] in ("attributes", "arguments", "results"):
        return "a layout or one of its words"
    return _WANTED.get(path[:1], "a mapping")


_NOTHING = object()


def _reach(data: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            return _NOTHING
    return data


_SECTIONS = ("column", "row", "lookup", "gathered", "part", "inside", "whole")
_WANTED: dict[tuple[str, ...], str] = {
    **{(s,): "parameter names with a layout each, as in \"q_proj.weight: '(h d) e'\"" for s in _SECTIONS},
    ("sizes",): "names with a whole number or an expression over the config each",
    ("shard",): "a list of names",
    ("granules",): "names with a whole number each",
    ("families",): "a list of model types",
    ("attributes",): "attributes with a layout each",
    ("arguments",): "modules with their arguments, each with `enter` or a layout",
    ("results",): "modules with their results, each with `leave`, `enter` or a layout",
    ("unsafe",): "true or false",
    ("placements",): "choices of placement, as in `loss_parallel: true`",
    ("trace",): "`required`, or no such key",
    **{(s,): "text" for s in ("recipe", "about", "reason")},
    ("extends",): "a recipe's name or path, or a list of them",
}


def json_schema() -> str:
    """Returns the JSON schema of recipe files, as text."""
    schema = RecipeFile.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


__all__ = ["EntryForm", "RecipeFile", "json_schema", "validated"]
