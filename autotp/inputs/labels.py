"""Makes labels that fit a model's loss, by the name of its own `loss_type`.

A loss over a sequence takes one small id a token, with one `-100` that it ignores; a classification takes one class a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autotp.inputs.facts import Facts
from autotp.inputs.values import BATCH, DECODER_LENGTH, LENGTH, made_value, token_ids

Labels = Callable[[], dict[str, object]]


def labels(facts: Facts) -> Labels | None:
    """A function that makes the keywords of the loss, or None where `forward` computes none that autotp knows."""
    kind = getattr(facts.model, "loss_type", None)
    if kind == "ForQuestionAnswering" and facts.takes("start_positions", "end_positions"):
        return lambda: {"start_positions": _classes(2), "end_positions": _classes(2)}
    if not facts.takes("labels"):
        return None
    make = _MAKERS.get(kind, _by_head if kind is None else None)
    return None if make is None else lambda: {"labels": make(facts)}


def _classes(count: int, *shape: int) -> Tensor:
    return (torch.arange(BATCH).reshape(-1, *[1] * len(shape)) % max(count, 1)).expand(BATCH, *shape).contiguous()


def _number(facts: Facts) -> int:
    return int(getattr(facts.config, "num_labels", 2))


def _tokens(facts: Facts) -> Tensor:
    ids = token_ids(facts, BATCH, DECODER_LENGTH if facts.is_encoder_decoder else LENGTH)
    ids[0, -1] = -100
    return ids


def _rows(facts: Facts) -> Tensor:
    problem = getattr(facts.config, "problem_type", None)
    if problem == "regression":
        count = _number(facts)
        return torch.zeros(BATCH) if count == 1 else torch.zeros(BATCH, count)
    if problem == "multi_label_classification":
        return torch.zeros(BATCH, _number(facts))
    return torch.zeros(BATCH) if _number(facts) == 1 else _classes(_number(facts))


def _each_token(facts: Facts) -> Tensor:
    return _classes(_number(facts), LENGTH)


def _each_pixel(facts: Facts) -> Tensor:
    pixels = made_value(facts, "pixel_values")
    assert isinstance(pixels, Tensor)
    return _classes(_number(facts), *pixels.shape[-2:])


def _by_head(facts: Facts) -> Tensor:
    """Without a named loss: a model with a vocabulary head labels tokens, any other labels rows."""
    try:
        head = facts.model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        head = None
    return _rows(facts) if head is None else _tokens(facts)


_MAKERS: Mapping[str | None, Callable[[Facts], Tensor]] = {
    "ForCausalLM": _tokens,
    "ForConditionalGeneration": _tokens,
    "ForMaskedLM": _tokens,
    "ForSequenceClassification": _rows,
    "ForImageClassification": _rows,
    "ForVideoClassification": _rows,
    "ForAudioClassification": _rows,
    "ForTokenClassification": _each_token,
    "ForSemanticSegmentation": _each_pixel,
    "ForCTC": lambda facts: token_ids(facts, BATCH, 2),
}
