"""The names of `autotp`: `autotp` imports this module when the first of them is asked for, and lists them."""
# ruff: noqa: F401

import autotp.checkpoint
import autotp.integrations
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
