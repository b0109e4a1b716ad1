"""Builds a model from its text."""

from __future__ import annotations

import linecache
from typing import Any

import torch
from torch import nn


def built(text: str) -> nn.Module:
    """The class `Model` of a text, with random weights of a fixed seed, in float64; biases and norms are random too."""
    from autotp.testing.tiny.models import randomise  # wants transformers, which specs and texts do without

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: nn.Module = compiled(text)["Model"]()
    randomise(model, seed=3)
    return model.double()


def compiled(text: str) -> dict[str, Any]:
    """The names that the text of a model defines; tracebacks show its lines."""
    file = f"<architecture {hash(text) & 0xFFFFFFFF:08x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space: dict[str, Any] = {"__name__": "__main__"}  # dataclasses look their module up
    exec(compile(text, file, "exec"), space)
    return space
