"""Makes tiny models of every transformers architecture, without network or tokenizer."""

from __future__ import annotations

from autotp.testing.tiny.models import model_class, randomise, tiny_config, tiny_model

__all__ = ["model_class", "randomise", "tiny_config", "tiny_model"]
