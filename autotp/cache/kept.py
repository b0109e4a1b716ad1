"""Takes plans from the folder `AUTOTP_CACHE`, where there is one, and keeps them there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from autotp.cache import store
from autotp.cache.key import Asked, key_of
from autotp.cache.walk import Unseen
from autotp.plan.plan import Plan

#: The variable of the environment that names the folder. Without it, with nothing in it, or with 0, no plan is kept.
VARIABLE = "AUTOTP_CACHE"


def folder() -> Path | None:
    """Returns the folder of the cache; None where there is none."""
    named = os.environ.get(VARIABLE, "0").strip()
    return None if named in ("", "0") else Path(named).expanduser()


def kept(asked: Asked, make: Callable[[], Plan]) -> Plan:
    """Returns the plan of a request: one that is kept, else the one that `make` makes, which is kept from then on."""
    where = folder()
    if where is None or asked.tp == 1:
        return make()
    try:
        key = key_of(asked)
    except Unseen:
        return make()
    plan = store.read(where, key)
    if plan is not None and _fits(plan, asked):
        return plan
    made = make()
    try:
        again = key_of(asked)
    except Unseen:
        return made
    if again == key:  # what planning changes for good cannot be told from what it depends on
        store.write(where, key, made)
    return made


def _fits(plan: Plan, asked: Asked) -> bool:
    """True for a plan of this model's parameters and modules over so many ranks."""
    model: nn.Module = asked.model
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    return (
        plan.tp == asked.tp
        and plan.model == type(model).__name__
        and {name: p.layout.shape for name, p in plan.params.items()} == shapes
        and all(m.path in paths for m in plan.modules)
    )
