"""Answers questions about the inputs of a Hugging Face model from its forward signature and its tree of configs.

`Facts` answers two questions and holds nothing else: which keywords `forward` takes, and which number the config gives for a size.
A size is looked up under several spellings: first in the nested configs of the wanted part (`vision`, `audio`, `text`), then in the
config itself, then in every other nested config.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

TEXT = ("text", "decoder", "llm", "language", "generator", "thinker", "encoder")
VISION = ("vision", "image", "video", "vit", "backbone", "visual", "encoder")
AUDIO = ("audio", "acoustic", "speech", "encoder")


@dataclass(frozen=True)
class Keyword:
    """One keyword of a `forward`: its name, whether it must be given, and its annotation as text."""

    name: str
    required: bool
    annotation: str


def forward_keywords(model: nn.Module, method: str = "forward") -> dict[str, Keyword]:
    """The named parameters of `model.forward`, or of another method, in order; `*args` and `**kwargs` are left out.

    A method that names none hands on what it is given: to the method of the same name of the model inside.
    """
    parameters = inspect.signature(getattr(model, method)).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    inner = getattr(model, "base_model", model)
    if not named and method != "forward" and inner is not model and hasattr(inner, method):
        return forward_keywords(inner, method)
    return {p.name: Keyword(p.name, p.default is p.empty, str(p.annotation)) for p in named}


def takes_any_keyword(model: nn.Module, method: str = "forward") -> bool:
    """Whether `model.forward`, or another method, ends in `**kwargs`."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(getattr(model, method)).parameters.values())


@dataclass(frozen=True, slots=True)
class Made:
    """A value of another form than the first guess: `kind` is `floats`, `positive` (floats in [0, 1)), `ids`, `ones`, `true` (a mask of
    truth values), or `plain` for `value` itself.
    """

    kind: str
    shape: tuple[int, ...] = ()
    value: object = None


@dataclass(frozen=True, slots=True)
class Guess:
    """What the calls of a model are made with beside the first guess: values of another form, keywords given as well, and the number of
    placeholders for images or sound in a text.
    """

    made: Mapping[str, Made] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    marks: int | None = None


def _setting(config: Any, name: str) -> Any:
    """An attribute of a config, None where it has none or refuses to say: a setting that each layer has for itself."""
    try:
        return getattr(config, name, None)
    except Exception:  # whatever a config raises
        return vars(config).get(name)


class Facts:
    """The keywords of the forward (or of another `method`) and the config values of one Hugging Face model.

    `guess`: what its calls are made with beside the first guess.
    """

    def __init__(self, model: nn.Module, method: str = "forward", guess: Guess | None = None) -> None:
        self.guess = Guess() if guess is None else guess
        self.model: Any = model
        self.config: Any = model.config
        self.method = method
        self.keywords = forward_keywords(model, method)

    def takes(self, *names: str) -> bool:
        """Whether `forward` names every one of `names`."""
        return all(name in self.keywords for name in names)

    def flags(self, word: str) -> list[str]:
        """The keywords that hold a truth value and whose name has `word` as a part (`return_loss`)."""
        return [k.name for k in self.keywords.values() if word in k.name.split("_") and "bool" in k.annotation]

    def _nested(self, config: Any) -> Iterator[tuple[str, Any]]:
        for name, value in vars(config).items():
            if isinstance(value, self._config_type):
                yield name, value

    @cached_property
    def _config_type(self) -> type:
        kinds = (k for k in type(self.config).__mro__ if k.__name__.lower() == "pretrainedconfig")
        return next(kinds, type(self.config))

    def configs(self, part: Sequence[str] = ()) -> list[Any]:
        """The config tree, breadth first; the nested configs whose names hold a word of `part` come first."""
        found, queue, seen = [], [("", self.config)], set[int]()
        while queue:
            path, config = queue.pop(0)
            if id(config) in seen:  # one that names its parent
                continue
            seen.add(id(config))
            found.append((path, config))
            queue += [(f"{path}.{name}", nested) for name, nested in self._nested(config)]

        def rank(entry: tuple[str, Any]) -> int:
            path = entry[0]
            if not path:
                return len(part)
            return next((i for i, word in enumerate(part) if word in path), len(part) + 1)

        return [config for _, config in sorted(found, key=rank)]

    def find(self, *names: str, part: Sequence[str] = ()) -> Any:
        """The first value that is not None under one of `names`, config by config; None where there is none."""
        for config in self.configs(part):
            for name in names:
                value = _setting(config, name)
                if value is not None:
                    return value
        return None

    def number(self, *names: str, default: int, part: Sequence[str] = ()) -> int:
        """Like `find`, for an integer; a sequence of integers counts as its first."""
        for config in self.configs(part):
            for name in names:
                value = _setting(config, name)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def pair(self, *names: str, default: int, part: Sequence[str] = ()) -> tuple[int, int]:
        """Like `find`, for a height and a width: an integer, a pair, or a dict with `height` and `width`."""
        value = self.find(*names, part=part)
        if isinstance(value, dict):
            value = (value.get("height", default), value.get("width", default))
        if isinstance(value, (list, tuple)) and len(value) >= 2:
            return int(value[-2]), int(value[-1])
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        size = int(value) if isinstance(value, (int, float)) else default
        return size, size

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Every token id that the configs name (padding, begin, end, image and audio placeholders, …)."""
        ids: set[int] = set()
        for config in self.configs():
            for name, value in vars(config).items():
                if "token" in name or name.endswith(("_id", "_ids")):
                    values = value if isinstance(value, (list, tuple)) else (value,)
                    ids.update(v for v in values if isinstance(v, int) and not isinstance(v, bool))
        return frozenset(ids)

    @cached_property
    def vocabulary(self) -> int:
        """The number of ids that may stand in `input_ids`."""
        table = self.embedding_rows
        named = self.number("vocab_size", "text_vocab_size", "src_vocab_size", "n_vocab", default=0, part=TEXT)
        if table and named:
            return min(table, named)
        return table or named or 32

    @cached_property
    def embedding_rows(self) -> int:
        """The rows of the model's input embedding, 0 where it has no `nn.Embedding`."""
        try:
            table = self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            return 0
        return int(table.num_embeddings) if isinstance(table, nn.Embedding) else 0

    @cached_property
    def device(self) -> torch.device:
        """Where the parameters are (`meta` for a model without weights)."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a decoder input stands beside the encoder's."""
        return self.takes("decoder_input_ids") and bool(getattr(self.config, "is_encoder_decoder", True))

    @cached_property
    def any_keyword(self) -> bool:
        """Whether `forward` ends in `**kwargs`."""
        return takes_any_keyword(self.model, self.method)

    @cached_property
    def image_token(self) -> int | None:
        """The id that stands for an image feature in `input_ids`, None where text and images come apart."""
        return self._placeholder(
            "image_token_id", "image_token_index", "media_placeholder_token_id", "img_token_id", "img_context_token_id"
        )

    @cached_property
    def audio_token(self) -> int | None:
        """The id that stands for a feature of sound in `input_ids`, None where text and sound come apart."""
        return self._placeholder("audio_token_id", "audio_token_index", "speech_token_id", "audio_soft_token_id")

    def _placeholder(self, *names: str) -> int | None:
        token = self.find(*names)
        return token if isinstance(token, int) and 0 <= token < max(self.vocabulary, self.embedding_rows) else None

    @property
    def generates(self) -> bool:
        """Whether the model hands a cache from step to step."""
        return self.takes("past_key_values") or self.takes("cache_params")
