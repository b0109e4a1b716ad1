"""Makes a text call with images or sound in it: one a row, its placeholder tokens in `input_ids`.

The model decides the number of placeholders. Where the forward takes a grid, it is the grid over the merge size. Otherwise it is
the rows of `get_image_features` (`get_audio_features`), run on fake tensors (no memory, no arithmetic, no change of the model's
buffers). A tower that reads its data while it runs cannot run there. Then the config's own count stands in, or the patches of an
image over the square of the merge factor. An error that names another number corrects it: see `autotp.inputs.search`.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autotp.inputs.by_name import value_of
from autotp.inputs.facts import VISION, Facts
from autotp.inputs.values import BATCH, grid, patch, token_ids


@dataclass(frozen=True, slots=True)
class Medium:
    """What stands in a text beside its tokens. `values`: the keywords that may hold it, of which one is given. `along`: what goes with
    it. `encode`: the method that gives its features. `start`, `stop`: the fields of a config for the tokens around it.
    """

    name: str
    values: tuple[str, ...]
    along: tuple[str, ...]
    encode: str
    start: tuple[str, ...]
    stop: tuple[str, ...]

    def value(self, facts: Facts) -> str | None:
        """The keyword that holds it, None where the forward takes none."""
        return next((name for name in self.values if facts.takes(name)), None)

    def token(self, facts: Facts) -> int | None:
        """The id that stands for a feature in `input_ids`, None where there is none."""
        return facts.image_token if self.name == "images" else facts.audio_token


IMAGES = Medium(
    "images",
    ("pixel_values",),
    ("image_grid_thw", "image_sizes", "spatial_shapes", "pixel_attention_mask", "merge_sizes", "image_merge_sizes", "target_sizes"),
    "get_image_features",
    ("vision_start_token_id", "image_start_token_id", "boi_token_id", "image_begin_token_id"),
    ("vision_end_token_id", "image_end_token_id", "eoi_token_id"),
)
AUDIO = Medium(
    "audio",
    ("input_features", "input_values", "audio_values", "input_audio_features"),
    ("input_features_mask", "feature_attention_mask"),
    "get_audio_features",
    ("audio_start_token_id", "audio_bos_token_id", "boa_token_id"),
    ("audio_end_token_id", "audio_eos_token_id", "eoa_token_id"),
)


def with_medium(facts: Facts, base: tuple[str, ...], medium: Medium) -> dict[str, object]:
    """The keywords of a call with one image (one piece of sound) a row.

    Where the number of its features cannot be found, or is not the same for all rows, one placeholder a row is written; it is the
    model that then says what is wrong.
    """
    token, value = medium.token(facts), medium.value(facts)
    more = (*(() if value is None else (value,)), *(name for name in medium.along if facts.takes(name)), *facts.guess.more)
    inputs = {name: value_of(facts, name) for name in dict.fromkeys((*base, *more))}
    if not _reads_sizes(facts):
        inputs.pop("image_sizes", None)
    if token is None or value is None:
        return inputs
    marks = facts.guess.marks
    if marks is None:
        marks = BATCH * max(1, (_features(facts, inputs, medium, value) or 0) // BATCH)
    ids = _marked(facts, token, marks, _edge(facts, *medium.start), _edge(facts, *medium.stop))
    inputs["input_ids"] = ids
    for name in ("mm_token_type_ids", "token_type_ids"):
        if facts.takes(name):
            inputs[name] = (ids == token).long()
    if facts.takes("attention_mask"):
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs


def _marked(facts: Facts, token: int, marks: int, start: list[int], stop: list[int]) -> Tensor:
    """A text with `marks` placeholders over all rows, as even as may be: a row with fewer ends in more text."""
    most = -(-marks // BATCH)
    text = token_ids(facts, BATCH, 5 + most)
    rows = []
    for row in range(BATCH):
        count = marks // BATCH + (row < marks % BATCH)
        placed = torch.tensor([*start, *[token] * count, *stop], dtype=torch.long)
        rows.append(torch.cat([text[row, :2], placed, text[row, 2 : 5 + most - count]]))
    return torch.stack(rows)


def _edge(facts: Facts, *names: str) -> list[int]:
    token = facts.find(*names)
    return [token] if isinstance(token, int) and token < facts.vocabulary else []


def _encoder(facts: Facts, medium: Medium) -> Any:
    return getattr(facts.model, medium.encode, None) or getattr(facts.model.base_model, medium.encode, None)


def _reads_sizes(facts: Facts) -> bool:
    """Whether the image tower is told the sizes of the images (a keyword of the forward that most towers don't know)."""
    encode = _encoder(facts, IMAGES)
    return encode is not None and "image_sizes" in inspect.signature(encode).parameters


def _features(facts: Facts, inputs: dict[str, object], medium: Medium, value: str) -> int | None:
    """The number of features of all images (of all sound) together."""
    images = medium is IMAGES
    if images and facts.takes("image_grid_thw"):
        merge = facts.number("spatial_merge_size", "merge_size", default=1, part=VISION)
        return BATCH * math.prod(grid(facts)) // merge**2
    encode = _encoder(facts, medium)
    counted = None if encode is None else _rows(_run_fake(encode, facts.device, inputs))
    return _configured(facts, inputs[value]) if counted is None and images else counted


def _run_fake(encode: Any, device: torch.device, inputs: dict[str, object]) -> Any:
    parameters = inspect.signature(encode).parameters
    taken = [name for name in inputs if name in parameters]
    if not taken:  # it hands on whatever it is given
        taken = [name for name in inputs if name in (*IMAGES.values, *IMAGES.along, *AUDIO.values, *AUDIO.along)]
    # Towers read the sizes as numbers, which a tensor under fake tensors does not give.
    sizes = {
        name: value.tolist() for name, value in inputs.items() if name == "image_sizes" and name in taken and isinstance(value, Tensor)
    }
    weight = next(encode.__self__.parameters(), None)
    mode = weight.fake_mode if isinstance(weight, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        given: dict[str, Any] = {
            name: torch.empty(value.shape, dtype=value.dtype, device=device) if value.is_floating_point() else value
            for name, value in inputs.items()
            if name in taken and isinstance(value, Tensor)
        } | sizes
        try:
            return encode(**given)
        except Exception:  # whatever the tower raises: the caller says what to do
            return None


def _configured(facts: Facts, pixels: object) -> int | None:
    """Reads from the config how many features an image has, for all images in `pixels`."""
    if not isinstance(pixels, Tensor):
        return None
    images = math.prod(pixels.shape[:-3]) if pixels.dim() > 3 else BATCH
    named = facts.find("mm_tokens_per_image", "image_seq_length", "image_seq_len", "num_image_tokens")
    if isinstance(named, int):
        return images * named
    merge = facts.number("spatial_merge_size", "pixel_shuffle_factor", "scale_factor", "downsample_factor", "merge_size", default=1)
    across = (
        grid(facts) if facts.takes("spatial_shapes") else (side // size for side, size in zip(pixels.shape[-2:], patch(facts), strict=True))
    )
    return images * math.prod(across) // merge**2


def _rows(outputs: Any) -> int | None:
    """Rows over all dims but the last of a tensor, of a list of tensors, or of an output's `pooler_output`."""
    found = getattr(outputs, "pooler_output", outputs)
    if isinstance(found, (list, tuple)):
        counts = [_rows(one) for one in found]
        return None if None in counts or not counts else sum(c for c in counts if c is not None)
    return math.prod(found.shape[:-1]) if isinstance(found, Tensor) else None
