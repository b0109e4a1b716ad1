"""Holds the calls of a model that are traced, as values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

Inputs = dict[str, object]
_ABSENT: Any = object()


#: One call by its keywords, or several.
Given = Mapping[str, object] | Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Attributes of modules that users switch together (another adapter, none at all). `values`: (path, attribute) → value."""

    name: str
    values: Mapping[tuple[str, str], object]

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """The attributes of `model` have these values inside."""
        tables = {path: model.get_submodule(path).__dict__ for path, _ in self.values}
        before = [(tables[path], name, tables[path].get(name, _ABSENT)) for path, name in self.values]
        for (path, name), value in self.values.items():
            tables[path][name] = copy.copy(value)
        try:
            yield
        finally:
            for table, name, value in before:
                if value is _ABSENT:
                    table.pop(name, None)
                else:
                    table[name] = value


@dataclass(frozen=True, slots=True)
class Example:
    """One way to call a model.

    name: `forward`, `mask`, `prefill`, `labels`, `attentions`, `hidden_states`, `images`, `audio`, a flag of the forward (`return_loss`) or
    a method (`get_text_features`); `user` for the caller's own, and `user 2`, `user with flag=True`; `text_decoder prefill` of an
    inner model that a `generate` hands on to; `encoder forward` of an encoder that generation calls by itself.
    make: builds the keywords of the call, new tensors each time.
    decode: from the outputs of that call, the keywords of the next one (the returned cache and one more token). It returns None
    where the outputs hold no cache.
    optional: the model may turn this call down without harm.
    training: the call is made in training mode.
    quiet: autotp made the call up, so a model that turns it down is not reported.
    method: the method or inner model that is called, past the hooks of the model; "" for the model itself.
    setting: the model is called in this setting; None for the one that it has.
    sought: where the model turns this call down, one of other forms is looked for.
    drawn: its path was traced along numbers drawn for its data.
    operators: how many its trace has.
    """

    name: str
    make: Callable[[], Inputs]
    decode: Callable[[Any], Inputs | None] | None = None
    optional: bool = False
    training: bool = False
    quiet: bool = False
    method: str = ""
    setting: Setting | None = None
    sought: bool = False
    drawn: bool = False
    operators: int = 0

    @property
    def inputs(self) -> Inputs:
        """Returns the keywords of the call."""
        return self.make()

    def call(self, model: nn.Module, inputs: Inputs) -> Any:
        """Calls `model` with `inputs` in this way."""
        with nullcontext() if self.setting is None else self.setting.on(model):
            return attrgetter(self.method)(model)(**inputs) if self.method else model(**inputs)
