"""Gives a parameter the name that it has in the user's model, whatever wrappers of torch's stand between."""

from __future__ import annotations

from functools import lru_cache

#: Names under which torch's wrappers hold the module that they wrap: checkpoint_wrapper, torch.compile, the first FSDP.
_WRAPPED = frozenset(("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"))


@lru_cache(maxsize=1 << 16)
def own_name(name: str) -> str:
    """Returns `name`, of a parameter, buffer or module, without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)
