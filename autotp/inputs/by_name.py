"""Makes a value for a keyword that no table knows, from its name, its annotation and the config.

    value_of(facts, name)     the value; the table `VALUES` first
    why_not(facts, name)      None, or why there is none

A mask is as long as what it masks, an index counts up, and a float tensor is as wide as the field of the config that its name leads
to (`visual_feats` → `visual_feat_dim`). A guess that does not fit is another one's start: see `autotp.inputs.search`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from autotp.inputs.facts import Facts, Keyword
from autotp.inputs.values import (
    BATCH,
    LENGTH,
    VALUES,
    built,
    input_features,
    input_values,
    made_value,
    noise,
    pixel_values,
    pixel_values_videos,
    token_ids,
)

_WIDTHS = ("hidden_size", "d_model", "embed_dim", "dim", "n_embd")
_ENDS = re.compile(r"_?(embeds|embeddings?|states?|features?|feats?|values?|encodings?|inputs?|vectors?|queries|query|context|hidden)$")
_FLOATS = re.compile(r"embed|state|feat|hidden|encoding|context|vector|quer(y|ies)|^inputs$|latent|noise|memory|returns|rewards|actions")
_TENSOR = re.compile(r"Tensor")


def value_of(facts: Facts, name: str) -> object:
    """The value of a keyword.

    Raises:
        KeyError: there is none, see `why_not`.
    """
    if name in facts.guess.made:
        return built(facts, facts.guess.made[name])
    if name in VALUES:
        return made_value(facts, name)
    make = _rule(facts, name)
    if make is None:
        raise KeyError(name)
    return make()


def why_not(facts: Facts, name: str) -> str | None:
    """Says why no value can be made for a keyword; None where one can."""
    if name in facts.guess.made or name in VALUES or _rule(facts, name) is not None:
        return None
    annotation = facts.keywords[name].annotation if name in facts.keywords else ""
    kind = re.sub(r"<class '(.*)'>", r"\1", annotation).replace("inspect._empty", "").strip("'\" ")
    return f"it is a {kind}, which no rule makes" if kind else "neither its name nor an annotation says what it is"


def _rule(facts: Facts, name: str) -> Callable[[], object] | None:
    keyword = facts.keywords.get(name, Keyword(name, False, ""))
    told = keyword.annotation not in ("", str(inspect.Parameter.empty))
    if told and not _TENSOR.search(keyword.annotation):
        return _plain(keyword)
    for pattern, make in _BY_NAME:
        if re.search(pattern, name):
            return lambda: make(facts, name)
    return None


def _plain(keyword: Keyword) -> Callable[[], object] | None:
    """A number for an annotation that asks for one."""
    words = set(re.findall(r"[A-Za-z_.]+", keyword.annotation)) - {"class", "None", "Optional", "typing.Optional", "inspect._empty"}
    for kind, value in (("bool", False), ("int", LENGTH), ("float", 0.5)):
        if words == {kind}:
            return lambda: value
    return None


def _masked(facts: Facts, name: str) -> tuple[int, ...]:
    """The shape of what a mask covers: of the keyword whose name is most like its own; else of a text."""
    stem = re.sub(r"_?(attention_)?(mask|padding)$", "", name)
    own = [n for n in facts.keywords if n != name and "mask" not in n and stem and _alike(stem, n) >= 4]
    for other in sorted(own, key=lambda n: -_alike(stem, n)):
        try:
            value = value_of(facts, other)
        except KeyError:
            continue
        if isinstance(value, Tensor):
            return tuple(value.shape[:2]) if value.dim() < 4 else (value.shape[0], *value.shape[-2:])
    return BATCH, LENGTH


def _alike(stem: str, name: str) -> int:
    """How many letters two names begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(stem, name, strict=False)) if a != b), min(len(stem), len(name)))


def _fields(name: str) -> Iterator[str]:
    """The fields of a config that may tell how wide a keyword is."""
    stem = _ENDS.sub("", name)
    for part in dict.fromkeys((name, name.rstrip("s"), stem, stem.rstrip("s"))):
        if part:
            yield from (f"{part}_dim", f"{part}_size", f"{part}_hidden_size", f"{part}_width", f"{part}_feat_dim")


def _width(facts: Facts, name: str) -> int:
    named = facts.number(*_fields(name), default=0)
    return named or facts.number(*_WIDTHS, default=64)


def _floats(facts: Facts, name: str) -> Tensor:
    return noise(BATCH, LENGTH, _width(facts, name))


def _positions(facts: Facts, name: str) -> Tensor:
    """Corners of boxes for what they belong to: four numbers in [0, 1) each."""
    return noise(BATCH, LENGTH, 4).abs()


#: What is in a keyword's name → its value, the first that fits.
_BY_NAME: tuple[tuple[str, Callable[[Facts, str], object]], ...] = (
    (r"mask$|padding$", lambda f, n: torch.ones(_masked(f, n), dtype=torch.long)),
    (r"type_ids?$|^freq$", lambda f, n: torch.zeros(_masked(f, n) if n != "freq" else (BATCH, 1), dtype=torch.long)),
    (r"pos(ition)?_ids?$", lambda f, n: torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()),
    (r"aspect_ratio_ids$", lambda f, n: torch.ones(BATCH, 1, dtype=torch.long)),
    (r"lang(uage)?_ids$|speaker_ids?$", lambda f, n: torch.zeros(BATCH, dtype=torch.long)),
    (r"ids$|codes?$|task_inputs", lambda f, n: token_ids(f, BATCH, LENGTH)),
    (r"_pos$|box", _positions),
    (r"_len(gth)?s?$", lambda f, n: torch.full((BATCH,), _masked(f, n)[-1])),
    (r"time_?steps?$|^time$", lambda f, n: noise(BATCH).abs() if n != "timesteps" else torch.arange(LENGTH).expand(BATCH, -1).contiguous()),
    (r"video|frames", lambda f, n: pixel_values_videos(f)),
    (r"pixel|^images?$", lambda f, n: pixel_values(f)),
    (r"mel|spectrogram", lambda f, n: input_features(f)),
    (r"audio_values|waveform|speech", lambda f, n: input_values(f)),
    (_FLOATS.pattern, _floats),
)
