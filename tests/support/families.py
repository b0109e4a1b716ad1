"""Picklable factories of tiny transformers models for the pool."""

from __future__ import annotations

from typing import Any

from torch import nn

from autotp.testing.inputs import tiny_inputs
from autotp.testing.tiny.models import tiny_config, tiny_model


def transformer(model_type: str, *, attn_implementation: str | None = None, experts: str | None = None, **overrides: Any) -> nn.Module:
    """The tiny model of a type; `experts` names how its mixture of experts is computed."""
    config = tiny_config(model_type, **overrides)
    if experts is not None:
        config._experts_implementation = experts
    return tiny_model(config, attn_implementation=attn_implementation)


def transformer_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs on which it runs."""
    return tiny_inputs(model)
