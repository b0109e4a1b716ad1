"""Makes a recipe to start from where nothing can be planned: every parameter, whole."""

from __future__ import annotations

from torch import nn

from autotp.plan.names import folded
from autotp.recipe.config_fields import fields
from autotp.recipe.spec import Entry, RecipeSpec, Role, Size


def skeleton(model: nn.Module) -> RecipeSpec:
    """Puts every parameter of `model` under `whole`, its dims called after fields of the config where one has the size."""
    known = {value: name for name, value in reversed(fields(getattr(model, "config", None)).items())}
    names: dict[int, str] = {}
    sizes: dict[str, Size] = {}
    entries: dict[str, Entry] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        for n in p.shape:
            if n > 1 and n not in names:
                names[n] = known.get(n, f"n{n}")
                sizes[names[n]] = Size(names[n], known.get(n, n))
        layout = " ".join(names.get(n, "1") for n in p.shape) or "()"
        before = entries.setdefault(folded(name), Entry(folded(name), Role.WHOLE, layout))
        if before.layout != layout:
            entries[name] = Entry(name, Role.WHOLE, layout)
    return RecipeSpec(name=type(model).__name__, sizes=tuple(sizes.values()), entries=tuple(entries.values()))
