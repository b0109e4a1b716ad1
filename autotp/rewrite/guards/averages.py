"""Says which settings of a module change only how running statistics are averaged: no channel meets another by them, so they may change.

`torch.optim.swa_utils.update_bn` sets the momentum of batch norms to None, an average over all batches.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NONE: frozenset[str] = frozenset()
_MOMENTUM = frozenset(("momentum",))


def averaging(module: nn.Module) -> frozenset[str]:
    """Returns the names of these attributes; a class of the model's own may do anything else with them."""
    return _MOMENTUM if isinstance(module, _NormBase) and type(module).__module__.startswith("torch.nn.") else _NONE
