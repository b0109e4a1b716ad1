"""Builds the twin of a transformers model: the same classes from a smaller config, with weights.

Widths, depths and vocabularies shrink. A size that `tp` does not divide is not divided in the twin either. A model that was changed
after its config built it (a replaced module) has no twin; adapters of PEFT are put on the twin too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from autotp.adapters import copy_onto
from autotp.hugging_face import is_hugging_face
from autotp.plan.names import folded


class NoTwin(Exception):
    """The model has no twin; says why."""


def twin_of(model: nn.Module, tp: int, *, smaller: bool) -> nn.Module:
    """A model like `model` with random weights on the CPU, from its own config, or from a `smaller` one.

    Raises:
        NoTwin: it is no transformers model, its config does not build it, or cannot be shrunk.
    """
    if not is_hugging_face(model):
        raise NoTwin("only a transformers model has a smaller twin")
    from autotp.twin.shrink import shrink_config, sizes_like

    config: Any = getattr(model, "config", None)
    build: Any = type(model)
    try:
        made = shrink_config(config, sizes_like(config, tp)) if smaller else copy.deepcopy(config)
        made._attn_implementation = config._attn_implementation
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            twin: nn.Module = build(made)
            copy_onto(model, twin)
    except Exception as error:  # a config class, or a model's constructor, may refuse in any way
        raise NoTwin(f"its config gives no smaller one ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    if _structure(twin) != _structure(model):
        raise NoTwin("it is not what its config builds")
    return twin.train(model.training)


def _structure(model: nn.Module) -> set[tuple[str, str]]:
    return {(folded(path), type(m).__qualname__) for path, m in model.named_modules()}
