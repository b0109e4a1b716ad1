"""Lets PEFT put adapters on a parallel model.

PEFT gives the factors of an adapter the sizes of the module that it wraps. Of a weight that is a DTensor it takes a rank's own sizes,
as transformers' tensor parallelism computes on them. A module of autotp takes and gives what it took and gave on one device, and the
next plan cuts the factors (`autotp.replan`). So PEFT's one function that asks for the sizes answers for these modules with the whole
ones. The function is private to PEFT; nothing else of it is changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.hugging_face import is_hugging_face
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.undo import Undo

_SIZES = "_get_in_out_features"


class NoPlan(dict[str, str]):
    """The answer to `model.tp_plan`: no module has a style of transformers.

    PEFT looks modules up in it before it wraps them. PEFT may have been imported only after the model was made parallel.
    """

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's."""
        tell_whole_sizes()
        return super().get(key, default)


def install_adapters(model: nn.Module, mesh: DeviceMesh, undo: Undo) -> None:
    """Have PEFT ask for whole sizes; journalled in `undo` where the model has to answer for it."""
    tell_whole_sizes()
    if is_hugging_face(model):
        undo.set_attribute(model, "_tp_plan", NoPlan())


def tell_whole_sizes() -> None:
    """Make PEFT see the whole sizes of parallel modules, once it is loaded; a second call does nothing."""
    utils: Any = sys.modules.get("peft.tuners.tuners_utils")
    if utils is None or isinstance(original := getattr(utils, _SIZES), _Whole):
        return
    whole = _Whole(original)
    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and getattr(module, _SIZES, None) is original:
            setattr(module, _SIZES, whole)


class _Whole:
    """Answers for the modules of parallel models, and asks PEFT's own function for all others."""

    def __init__(self, original: Callable[[nn.Module], Any]) -> None:
        self.original = original
        functools.update_wrapper(self, original)

    def __call__(self, module: nn.Module) -> Any:
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, LayoutDTensor):
            return weight.shape[1], weight.shape[0]
        return self.original(module)
