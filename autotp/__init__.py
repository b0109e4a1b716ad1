"""Makes any PyTorch model tensor-parallel, by a plan that it works out from the model's graph."""

from typing import TYPE_CHECKING, Any

# Two packages are named like functions. Python binds a package here when it is first imported: that is done with before the names
# are given back, so `autotp.plan` is the function whatever was imported first.
import autotp.advise
import autotp.plan

del autotp

if TYPE_CHECKING:
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
else:
    del advise, plan

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


def __getattr__(name: str) -> Any:
    """Imports the public names when the first of them is asked for: DTensor and the compiler of torch take seconds."""
    if name not in (*__all__, "checkpoint", "integrations"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from autotp import public

    globals().update({key: getattr(public, key) for key in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
