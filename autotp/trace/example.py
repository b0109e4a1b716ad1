"""Holds the calls of a model that are traced, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

Inputs = dict[str, object]


#: One call by its keywords, or several.
Given = Mapping[str, object] | Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Example:
    """One way to call a model.

    name: `forward`, `mask`, `prefill`, `labels`, `attentions`, `hidden_states`, `images`, a flag of the forward (`return_loss`) or
    a method (`get_text_features`); `user` for the caller's own, and `user 2`, `user with flag=True`; `text_decoder prefill` of an
    inner model that a `generate` hands on to.
    make: builds the keywords of the call, new tensors each time.
    decode: from the outputs of that call, the keywords of the next one (the returned cache and one more token). It returns None
    where the outputs hold no cache.
    optional: the model may turn this call down without harm.
    training: the call is made in training mode.
    quiet: autotp made the call up, so a model that turns it down is not reported.
    method: the method or inner model that is called, past the hooks of the model; "" for the model itself.
    """

    name: str
    make: Callable[[], Inputs]
    decode: Callable[[Any], Inputs | None] | None = None
    optional: bool = False
    training: bool = False
    quiet: bool = False
    method: str = ""

    @property
    def inputs(self) -> Inputs:
        """Returns the keywords of the call."""
        return self.make()

    def call(self, model: nn.Module, inputs: Inputs) -> Any:
        """Calls `model` with `inputs` in this way."""
        return attrgetter(self.method)(model)(**inputs) if self.method else model(**inputs)
