"""Makes recipes of transformers' `tp_plan` and of torch's `parallelize_module` dict.

Both name a style for each module and no sizes. So the factors of such a recipe are whole rows and columns, called after the module
around. Parameters that they do not mention are left to the planner. `Plan.to_tp_plan` and `Plan.to_parallelize_module` go the other
way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autotp.errors import RecipeError
from autotp.recipe.patterns import Pattern, nearest
from autotp.recipe.spec import Entry, RecipeSpec, Role, Shard

#: Styles of transformers that say nothing about layouts; the planner finds what they are for.
_LEFT_OUT = frozenset(("replicate", "moe_tp_experts", "mla_kv_a_proj", "all_reduce", "local_params"))
_STYLES = {
    "colwise": Role.COLUMN,
    "packed_colwise": Role.COLUMN,
    "rowwise": Role.ROW,
    "packed_rowwise": Role.ROW,
    "colwise_gather_output": Role.GATHERED,
    "colwise_rep": Role.GATHERED,
    "embedding_rowwise": Role.LOOKUP,
    "replicated_with_grad_allreduce": Role.INSIDE,
}


def from_tp_plan(tp_plan: Mapping[str, str], model: nn.Module | None = None) -> RecipeSpec:
    """Returns the recipe of a transformers `tp_plan`; see `Recipe.from_tp_plan`."""
    if not isinstance(tp_plan, Mapping) or not all(isinstance(k, str) for k in tp_plan):
        raise RecipeError(f"a tp_plan maps names of modules to styles, got {type(tp_plan).__name__}")
    problems: list[str] = []
    entries: list[Entry] = []
    missing: list[str] = []
    experts = [k for k, style in tp_plan.items() if style == "moe_tp_experts"]
    for key, style in tp_plan.items():
        role = _STYLES.get(style) if isinstance(style, str) else None
        if role is None:
            if style not in _LEFT_OUT:
                problems.append(
                    f"tp_plan[{key!r}]: the style {style!r} has no counterpart; known are {', '.join((*_STYLES, *sorted(_LEFT_OUT)))}"
                )
            continue
        inside = any(key.startswith(e + ".") for e in experts)
        where = _Place(key, inside) if model is None else _find(key, model)
        if where is None:
            missing.append(key)
        else:
            entries += _entries(where, role, packed=style.startswith("packed"))
    if missing and not entries:
        problems.append(f"the model has nothing that the tp_plan names: {_lacking(missing, model)}")
    about = f"left out, as the model does not have them: {', '.join(missing)}" if missing else ""
    return _recipe("tp_plan", about, entries, problems)


def from_parallelize_module(styles: Mapping[str, Any], model: nn.Module | None = None) -> RecipeSpec:
    """Returns the recipe of a dict of torch `ParallelStyle`s; see `Recipe.from_parallelize_module`."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if not isinstance(styles, Mapping):
        raise RecipeError(f"a parallelize_module plan maps names of modules to styles, got {type(styles).__name__}")
    problems: list[str] = []
    entries: list[Entry] = []
    for key, style in styles.items():
        found = (style.input_layouts[0], style.output_layouts[0]) if isinstance(style, ColwiseParallel | RowwiseParallel) else None
        if isinstance(style, ColwiseParallel) and found == (Replicate(), Shard(-1)):
            role = Role.COLUMN
        elif isinstance(style, ColwiseParallel) and found == (Replicate(), Replicate()):
            role = Role.GATHERED
        elif isinstance(style, RowwiseParallel) and found == (Shard(-1), Replicate()):
            role = Role.ROW
        elif isinstance(style, RowwiseParallel) and found == (Replicate(), Replicate()):
            role = Role.LOOKUP  # the form that torch asks for at nn.Embedding
        else:
            how = "" if found is None else f" from {found[0]} to {found[1]}"
            problems.append(f"plan[{key!r}]: {type(style).__name__}{how} has no counterpart in a recipe")
            continue
        where = _Place(key, False) if model is None else _find(key, model)
        if where is None:
            problems.append(f"{_lacking([key], model)}: the model has no such module")
        else:
            entries += _entries(where, role)
    return _recipe("parallelize_module plan", "", entries, problems)


@dataclass(frozen=True, slots=True)
class _Place:
    """A key names this: a module, or (`is_param`) a parameter of a mixture of experts, experts × out × in."""

    key: str
    is_param: bool


def _find(key: str, model: nn.Module) -> _Place | None:
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if any(Pattern(key).matches(n) for n in names):
        return _Place(key, True)
    return _Place(key, False) if any(Pattern(f"{key}.weight").matches(n) for n in names) else None


def _lacking(keys: list[str], model: nn.Module | None) -> str:
    """Returns the keys that a model does not have, each with the nearest one."""
    names = [] if model is None else [n.rpartition(".")[0] for n, _ in model.named_parameters(remove_duplicate=False)]
    return ", ".join(f"{key}{nearest(key, names)}" for key in keys)


def _recipe(name: str, about: str, entries: list[Entry], problems: list[str]) -> RecipeSpec:
    if problems:
        raise RecipeError(problems)
    cut = dict.fromkeys(n for e in entries if e.role.cut for n in re.findall(r"[A-Za-z_]\w*", e.layout) if n not in ("e", "x"))
    return RecipeSpec(name=name, about=about, shard=tuple(Shard((n,)) for n in cut), entries=tuple(entries))


def _entries(where: _Place, role: Role, *, packed: bool = False) -> Iterator[Entry]:
    key, parts = where.key, where.key.split(".")
    word = re.sub(r"\W", "_", next((p for p in reversed(parts[:-1]) if p not in ("*", "") and not p.isdigit()), parts[-1]))
    word = f"{word}_n" if word in ("e", "x", "_") or not word.isidentifier() else word
    if role is Role.INSIDE:
        yield Entry(f"{key}.weight", role, "e")
        yield Entry(f"{key}.bias", role, "e", optional=True)
        return
    cut = f"({word} | {word})" if packed else word
    if where.is_param:
        yield Entry(key, Role.PART, f"x {cut} e" if role is Role.COLUMN else f"x e {cut}")
        return
    yield Entry(f"{key}.weight", role, f"e {cut}" if role is Role.ROW else f"{cut} e")
    if role is not Role.LOOKUP:
        yield Entry(f"{key}.bias", role, "e" if role is Role.ROW else cut, optional=True)
