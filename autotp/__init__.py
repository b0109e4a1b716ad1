"""Makes any PyTorch model tensor-parallel, by a plan that it works out from the model's graph."""

from autotp import checkpoint as checkpoint
from autotp import integrations as integrations
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
