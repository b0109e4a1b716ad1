"""Makes the calls of a workload, at its sizes.

A transformers model that reads `input_ids` is called with ids of the wanted batch and length. Any other model is called with the
example inputs of the caller, whose size is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autotp.errors import InputError
from autotp.hugging_face import is_hugging_face
from autotp.inputs.facts import Facts, forward_keywords, takes_any_keyword

#: What configs call the number of positions that a model was made for.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
#: What a cache is called among the keywords of a forward, and in its results.
_CACHES = ("past_key_values", "cache_params")
_IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class TextCalls:
    """The calls of a transformers model that reads tokens."""

    facts: Facts

    @property
    def decodes(self) -> bool:
        """True for a model that hands a cache from step to step."""
        return self.facts.generates and self.facts.find("use_cache") is not False

    @property
    def positions(self) -> int | None:
        """The most tokens that a sequence may have by the config; None where it does not say."""
        found = [n for n in map(self.facts.find, _POSITIONS) if isinstance(n, int) and n > 0]
        return found[0] if found else None

    def prefill(self, batch: int, prompt: int, decoder: int = 1) -> dict[str, Any]:
        """The call that reads the prompts. `decoder`: tokens that a decoder beside an encoder has made already."""
        ids: dict[str, Any] = {"input_ids": _ids(batch, prompt)}
        if self.facts.is_encoder_decoder:
            ids["decoder_input_ids"] = _ids(batch, decoder)
        if self.decodes:
            ids["use_cache"] = True
        if self.facts.takes("logits_to_keep"):
            ids["logits_to_keep"] = 1
        return ids

    def kept(self, out: Any) -> dict[str, Any]:
        """What `out`, the result of a call, hands to the next one.

        Raises:
            InputError: it hands on nothing.
        """
        for name in _CACHES:
            if self.facts.takes(name) and getattr(out, name, None) is not None:
                kept: dict[str, Any] = {name: getattr(out, name)}
                encoded = getattr(out, "encoder_last_hidden_state", None)
                if self.facts.is_encoder_decoder and isinstance(encoded, Tensor):
                    from transformers.modeling_outputs import BaseModelOutput

                    kept["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
                return kept
        raise InputError(f"{type(self.facts.model).__name__} returned no cache, so no decode step of it can be measured")

    def decode(self, kept: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """The call that makes one token more."""
        return {**kept, ("decoder_input_ids" if self.facts.is_encoder_decoder else "input_ids"): _ids(batch, 1), "use_cache": True}

    def train(self, batch: int, seq: int) -> dict[str, Any]:
        """The call that gives a loss.

        Raises:
            InputError: the model takes no labels.
        """
        if not self.facts.takes("labels"):
            raise InputError(f"{type(self.facts.model).__name__} takes no labels, so it gives no loss to train on")
        call: dict[str, Any] = {"input_ids": _ids(batch, seq), "labels": _ids(batch, seq)}
        if self.facts.takes("use_cache") or (self.facts.any_keyword and self.facts.generates):
            call["use_cache"] = False
        return call


def text_calls(model: nn.Module) -> TextCalls:
    """The calls of `model`.

    Raises:
        InputError: it is no transformers model that reads tokens alone.
    """
    name = type(model).__name__
    if not is_hugging_face(model):
        raise InputError(f"{name} is not a transformers model, so its calls cannot be made at a size: pass example_inputs={{name: value}}")
    facts = Facts(model)
    needed = [k.name for k in facts.keywords.values() if k.required and k.name not in _IDS]
    if needed or not facts.takes("input_ids") or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise InputError(f"{name} reads more than tokens, so its calls cannot be made at a size: pass example_inputs={{name: value}}")
    return TextCalls(facts)


def checked(model: nn.Module, given: Any) -> dict[str, Any]:
    """The caller's example inputs, as one call.

    Raises:
        InputError: no mapping from keywords of forward, or one that holds no tensor.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(f"example_inputs is a {type(given).__name__}, wanted one mapping from keywords of forward to their values")
    keywords = forward_keywords(model)
    unknown = [key for key in given if key not in keywords and not takes_any_keyword(model)]
    missing = [k.name for k in keywords.values() if k.required and k.name not in given]
    if unknown or missing or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(dict(given))):
        problems = [f"forward takes no {key!r}" for key in unknown] + [f"forward requires {key!r}" for key in missing]
        raise InputError(f"example_inputs of {type(model).__name__}: {'; '.join(problems) or 'no tensor among them'}")
    return dict(given)


def _ids(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long)
