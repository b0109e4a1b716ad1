"""Refuses transformers' own `save_pretrained` of a parallel model: it would write a rank's part of each weight."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from autotp.errors import AutoTPError
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.quantized_form import is_quantized
from autotp.rewrite.undo import Undo


class SaveWhole:
    """Replaces `model.save_pretrained`, and accepts only whole weights. It looks like the original and survives deepcopy."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._save: Callable[..., Any] = model.save_pretrained  # type: ignore[assignment]
        functools.update_wrapper(self, self._save)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = inspect.signature(self._save).bind(*args, **kwargs).arguments.get("state_dict")
        if state is None or any(isinstance(t, LayoutDTensor) for t in state.values()):
            raise AutoTPError(
                f"{type(self._model).__qualname__}.save_pretrained would write parts of the weights: call autotp.save_pretrained(model, "
                "directory) on every rank, or give it state_dict=autotp.full_state_dict(model), which every rank has to make"
            )
        if any(is_quantized(t) for t in state.values()):
            raise AutoTPError(
                f"{type(self._model).__qualname__}.save_pretrained would write a rank's part of quantized weights: save the state with "
                "torch.save, or quantize and save the model on one device"
            )
        # It writes the dtype into the config, and a plan rests on what the config says.
        configs = {id(c): c for m in self._model.modules() if hasattr(c := m.__dict__.get("config"), "__dict__")}
        before = [(vars(c), dict(vars(c))) for c in configs.values()]
        try:
            return self._save(*args, **kwargs)
        finally:
            for now, old in before:
                now.clear()
                now.update(old)


def install_saving(model: nn.Module, undo: Undo) -> None:
    """Have `save_pretrained` of the model, and of models inside of it, refuse parts; journalled in `undo`.

    A model that has one of its own already (`autotp.integrations.transformers`) keeps it.
    """
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)) and "save_pretrained" not in module.__dict__:
            undo.set_attribute(module, "save_pretrained", SaveWhole(module))
