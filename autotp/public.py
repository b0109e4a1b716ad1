"""The names of `autotp`, all of them: `autotp` imports this module when the first of them is asked for."""

import autotp.checkpoint
import autotp.integrations  # noqa: F401 (packages are public names too)
from autotp.advise.advise import advise
from autotp.api import full_grads, full_state_dict, parallelize, plan, plan_of
from autotp.checkpoint.loading import from_pretrained
from autotp.checkpoint.presharded import shard, unshard
from autotp.checkpoint.saving import save_pretrained
from autotp.data_parallel import fully_shard
from autotp.errors import AutoTPError
from autotp.plan.plan import Plan
from autotp.quantize import quantize_
from autotp.recipe.recipe import Recipe
from autotp.serving.server import serve

__all__ = [
    "AutoTPError",
    "Plan",
    "Recipe",
    "advise",
    "from_pretrained",
    "full_grads",
    "full_state_dict",
    "fully_shard",
    "parallelize",
    "plan",
    "plan_of",
    "quantize_",
    "save_pretrained",
    "serve",
    "shard",
    "unshard",
]
