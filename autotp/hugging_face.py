"""Tells whether a model is one of transformers."""

from __future__ import annotations

import sys

from torch import nn


def is_hugging_face(model: nn.Module) -> bool:
    """Whether `model` is a `transformers.PreTrainedModel`; never imports transformers itself."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)
