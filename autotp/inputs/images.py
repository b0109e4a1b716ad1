"""Makes a text call with images in it: one image a row, its placeholder tokens in `input_ids`.

The model decides the number of placeholders. Where the forward takes a grid, it is the grid over the merge size. Otherwise it is
the rows of `get_image_features`, run on fake tensors (no memory, no arithmetic, no change of the model's buffers). A tower that
reads its data while it runs cannot run there. Then the config's own count stands in, or the patches of an image over the square of
the merge factor.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autotp.inputs.facts import VISION, Facts
from autotp.inputs.values import BATCH, grid, made_value, patch, token_ids

_WITH = ("pixel_values", "image_grid_thw", "image_sizes", "spatial_shapes", "pixel_attention_mask", "merge_sizes", "target_sizes")
_ENCODE = "get_image_features"


def with_images(facts: Facts, base: tuple[str, ...]) -> dict[str, object]:
    """The keywords of a call with one image a row.

    Where the number of features of an image cannot be found, or is not the same for all rows, one placeholder a row is
    written; it is the model that then says what is wrong.
    """
    token = facts.image_token
    inputs = {name: made_value(facts, name) for name in (*base, *_WITH) if facts.takes(name)}
    if not _reads_sizes(facts):
        inputs.pop("image_sizes", None)
    if token is None:
        return inputs
    text = token_ids(facts, BATCH, 5)
    marks = torch.full((BATCH, max(1, (_features(facts, inputs) or 0) // BATCH)), token)
    start = _edge(facts, "vision_start_token_id", "image_start_token_id", "boi_token_id", "image_begin_token_id")
    stop = _edge(facts, "vision_end_token_id", "image_end_token_id", "eoi_token_id")
    ids = torch.cat([text[:, :2], *start, marks, *stop, text[:, 2:]], dim=1)
    inputs["input_ids"] = ids
    for name in ("mm_token_type_ids", "token_type_ids"):
        if facts.takes(name):
            inputs[name] = (ids == token).long()
    if facts.takes("attention_mask"):
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs


def _edge(facts: Facts, *names: str) -> list[Tensor]:
    token = facts.find(*names)
    return [torch.full((BATCH, 1), token)] if isinstance(token, int) and token < facts.vocabulary else []


def _encoder(facts: Facts) -> Any:
    return getattr(facts.model, _ENCODE, None) or getattr(facts.model.base_model, _ENCODE, None)


def _reads_sizes(facts: Facts) -> bool:
    """Whether the image tower is told the sizes of the images (a keyword of the forward that most towers don't know)."""
    encode = _encoder(facts)
    return encode is not None and "image_sizes" in inspect.signature(encode).parameters


def _features(facts: Facts, inputs: dict[str, object]) -> int | None:
    """The number of features of all images together."""
    if facts.takes("image_grid_thw"):
        merge = facts.number("spatial_merge_size", "merge_size", default=1, part=VISION)
        return BATCH * math.prod(grid(facts)) // merge**2
    encode = _encoder(facts)
    if encode is None:
        return _configured(facts, inputs["pixel_values"])
    counted = _rows(_run_fake(encode, facts.device, inputs))
    return counted if counted is not None else _configured(facts, inputs["pixel_values"])


def _run_fake(encode: Any, device: torch.device, inputs: dict[str, object]) -> Any:
    taken = inspect.signature(encode).parameters
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
        except Exception:  # whatever the image tower raises: the caller says what to do
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
