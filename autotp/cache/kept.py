"""Takes plans from the folder `AUTOTP_CACHE`, where there is one, and keeps them there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from autotp.cache import store
from autotp.cache.key import Asked, key_of
from autotp.cache.walk import Unseen
from autotp.plan.plan import Plan

_LOG = logging.getLogger(__name__)
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
    except Unseen as unseen:
        _LOG.info("%s: no plan is kept: nothing says when %s changes", type(asked.model).__name__, unseen)
        return make()
    plan = store.read(where, key)
    if plan is not None and _fits(plan, asked):
        _LOG.info("%s: the plan was kept in %s", type(asked.model).__name__, where)
        return plan
    made = make()
    try:
        same = key_of(asked) == key
    except Unseen:
        same = False
    if same:
        store.write(where, key, made)
    else:  # what planning changes for good cannot be told from what it depends on
        _LOG.info("%s: no plan is kept: planning changed what the plan depends on", type(asked.model).__name__)
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
