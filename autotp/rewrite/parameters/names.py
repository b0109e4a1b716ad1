"""Gives a parameter the name that it had when the model was made parallel, whatever wrappers of torch's stand between since."""

from __future__ import annotations

from collections.abc import Collection

#: Names under which torch's wrappers hold the module that they wrap: checkpoint_wrapper, torch.compile, the first FSDP.
_WRAPPED = frozenset(("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"))


def own_name(name: str) -> str:
    """Returns `name`, of a parameter, buffer or module, without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


class Names:
    """Maps names of a parallel model as it is now to those of the plan.

    A wrapper that was there when the model was made parallel stays in the names.

    Args:
        planned: the names of the plan's parameters.
    """

    def __init__(self, planned: Collection[str]) -> None:
        self._planned = {own_name(name): name for name in planned}
        self._had_wrappers = any(own != name for own, name in self._planned.items())

    def __call__(self, name: str) -> str:
        """Returns the planned name of a parameter; of a buffer, the name without wrappers that came later."""
        own = own_name(name)
        return self._planned.get(own, name if self._had_wrappers else own)
