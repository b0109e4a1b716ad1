"""Proposes other forms of the values of a call that a model did not take, from what its error says and from what its config holds.

    other_forms(facts, inputs, error)  ->  pairs of a keyword and a `Made`, the likeliest first

Numbers in an error's text are sizes that the code met and wanted: one that a value has is exchanged for one that it does not have.
Otherwise images come in other sizes, with other dims before them, or as patches; sound with a dim for channels, or with its mel bins
first; ids in several codebooks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from autotp.inputs.facts import AUDIO, VISION, Facts, Made
from autotp.inputs.values import BATCH, LENGTH

Form = tuple[str, Made]

_SIDES = (224, 640, 1024, 384, 128, 512, 256, 64)  # of most models first
_IMAGE_SIZES = ("image_size", "img_size", "input_size", "size", "crop_size", "resolution", "eval_size", "max_img_size")
_LENGTHS = ("max_source_positions", "max_length", "context_length", "spec_size", "n_window")
_LARGEST = 8192
_DTYPES = re.compile(r"dtype|scalar type|predicate|Float\b|Long\b|Int\b")
_UNPACKED = re.compile(r"values to unpack \(expected (\d+), got (\d+)\)")
_MOST_ELEMENTS = 4_000_000 * BATCH
_BOOKS = ("num_codebooks", "n_codes_total", "num_channels", "num_vq", "codebooks", "audio_channels")


def other_forms(facts: Facts, inputs: Mapping[str, object], error: str) -> Iterator[Form]:
    """Other forms of `inputs`, for a call of which `error` is the text; first those with as many dims as it says that it wants."""
    forms = _forms(facts, inputs, error)
    dims = _UNPACKED.search(error)
    if dims is None:
        return forms
    wanted, got = map(int, dims.groups())
    listed = list(forms)

    def unfit(form: Form) -> bool:
        value = inputs[form[0]]
        return not (isinstance(value, Tensor) and value.dim() == got and len(form[1].shape) == wanted)

    return iter(sorted(listed, key=unfit))


def _forms(facts: Facts, inputs: Mapping[str, object], error: str) -> Iterator[Form]:
    numbers = [n for n in dict.fromkeys(map(int, re.findall(r"(?<![\w.])\d+(?![\w.]\d)", error))) if 0 < n <= _LARGEST]
    tensors = {name: value for name, value in reversed(list(inputs.items())) if isinstance(value, Tensor)}  # the latest first
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    whole = {name: value for name, value in tensors.items() if name.endswith("ids") and not value.is_floating_point()}
    if _DTYPES.search(error):
        yield from _other_dtypes(tensors)
    yield from _fitting(tensors, numbers)
    for name, value in tensors.items():
        if "mask" in name and value.dim() == 2:  # of several images or queries
            yield from ((name, Made("ones", shape)) for shape in ((*value.shape, 1), (value.shape[0], 1, value.shape[1])))
        if "mask" in name and value.dim() > 2:  # of whole images
            yield name, Made(_kind(name, value), tuple(value.shape[:-2]))
    for name, value in whole.items():
        yield from ((name, made) for made in _codebooks(facts, value, numbers))
    for name, value in floats.items():
        if _is_image(name):
            yield from ((name, made) for made in _images(facts, value, numbers))
        else:
            yield from ((name, made) for made in _series(facts, name, value, numbers))


def _is_image(name: str) -> bool:
    return any(word in name for word in ("pixel", "image", "video"))


def _fits(shape: tuple[int, ...]) -> bool:
    return math.prod(shape) <= _MOST_ELEMENTS


def _other_dtypes(tensors: Mapping[str, Tensor]) -> Iterator[Form]:
    """Truth values for masks, whole numbers for floats, and floats for whole numbers."""
    for name, value in tensors.items():
        shape = tuple(value.shape)
        if "mask" in name or "padding" in name:
            yield name, Made("ones" if value.dtype is torch.bool else "true", shape)
            yield name, Made("positive", shape)
        elif value.is_floating_point():
            yield name, Made("ids", shape[:2])
            yield name, Made("ids", shape)
        else:
            yield name, Made("positive", shape)


def _kind(name: str, value: Tensor) -> str:
    """The kind of `Made` that is another one of its sort."""
    if value.is_floating_point():
        return "floats"
    return "true" if value.dtype is torch.bool else "ones" if "mask" in name else "ids"


def _fitting(tensors: Mapping[str, Tensor], numbers: list[int]) -> Iterator[Form]:
    """A size of a value that the error names, exchanged for another that it names."""
    for name, value in tensors.items():
        for dim in range(value.dim() - 1, 0, -1):
            if value.shape[dim] in numbers:
                for n in numbers:
                    shape = (*value.shape[:dim], n, *value.shape[dim + 1 :])
                    if n != value.shape[dim] and _fits(shape):
                        yield name, Made(_kind(name, value), shape)


def _codebooks(facts: Facts, value: Tensor, numbers: list[int]) -> Iterator[Made]:
    rows, length = value.shape[0], value.shape[-1]
    if value.dim() != 2:
        return
    known = [facts.number(name, default=0) for name in _BOOKS]
    for n in dict.fromkeys(n for n in (*known, *numbers) if 1 < n <= 64):
        yield Made("ids", (rows, length, n))
        yield Made("ids", (rows * n, length))
        yield Made("ids", (rows, n, length))
        yield Made("ids", (rows, length, n + 1))


def _images(facts: Facts, value: Tensor, numbers: list[int]) -> Iterator[Made]:
    sides = [n for config in facts.configs(VISION) for n in _pairs(config)]
    height, width = (int(n) for n in value.shape[-2:]) if value.dim() > 3 else next(iter(sides), (64, 64))
    channels = facts.number("num_channels", "in_channels", "in_chans", default=3, part=VISION)
    frames = facts.number("num_frames", "frames_per_clip", "num_views", default=2, part=VISION)
    if value.dim() == 2:
        yield from _patches(facts, value, channels)
    for shape in ((1,), (2,), (frames,), (1, facts.number("max_num_tiles", default=2, part=VISION))):
        yield from _made(BATCH, *shape, channels, height, width)
    yield from _made(BATCH, channels, height, width)
    for size in dict.fromkeys((*sides, *((s, s) for s in _SIDES), *((n, n) for n in numbers if n >= 16), (48, 320))):
        if size != (height, width):
            yield from _made(*(value.shape[:-2] if value.dim() > 3 else (BATCH, channels)), *size)
    if value.dim() != 2:
        yield from _patches(facts, value, channels)


def _patches(facts: Facts, value: Tensor, channels: int) -> Iterator[Made]:
    down, across = facts.pair("patch_size", default=16, part=VISION)
    depth = facts.number("temporal_patch_size", default=1, part=VISION)
    count = value.shape[0] if value.dim() == 2 else 16 * BATCH
    yield from _made(count, channels, down, across)
    yield from _made(BATCH, count // BATCH, int(value.shape[-1]))
    yield from _made(1, count, channels, down, across)
    yield from _made(count, depth, channels, down, across)
    yield from _made(BATCH, count // BATCH, channels * down * across)
    yield from _made(BATCH, count // BATCH, channels * depth * down * across)
    yield from _made(1, channels, down, across * count)


def _pairs(config: object) -> Iterator[tuple[int, int]]:
    """The sizes of images that a config names."""
    for name in _IMAGE_SIZES:
        value = vars(config).get(name)
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, int) and not isinstance(value, bool):
            value = (value, value)
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) and 1 < n <= _LARGEST for n in value):
            yield int(value[0]), int(value[1])


def _series(facts: Facts, name: str, value: Tensor, numbers: list[int]) -> Iterator[Made]:
    """Sound, features and hidden states in other layouts and lengths."""
    shape = tuple(value.shape)
    if value.dim() == 3:
        channels = facts.number("num_channels", "in_channels", "in_chans", default=3, part=VISION)
        yield from _made(shape[0], channels, 64, 64)  # an image under another name
        yield from _made(shape[0], shape[2], shape[1])
        yield from _made(shape[0], 1, shape[1], shape[2])
        yield from _made(shape[0], shape[1], 16, 16)
        yield from _made(shape[0], shape[2], 16, 16)
        yield from _made(shape[0], 16, 16, shape[2])
        yield from _made(shape[0], shape[2])
    if value.dim() == 2:
        yield from _made(shape[0], 1, shape[1])
        yield from _made(shape[0], LENGTH, shape[1])
    if value.dim() == 4:
        yield from _made(shape[0], shape[1] * shape[2], shape[3])
    lengths = [facts.number(name, default=0, part=AUDIO) for name in _LENGTHS]
    for n in dict.fromkeys((*numbers, *(k * n for n in lengths for k in (1, 2)), 100, 400, 1000, 1024, 3000)):
        if n > 1 and value.dim() > 1:
            for dim in range(value.dim() - 1, 0, -1):
                step = shape[dim]
                yield from _made(*shape[:dim], n, *shape[dim + 1 :])
                if step > n and step % n:
                    yield from _made(*shape[:dim], step - step % n + n, *shape[dim + 1 :])


def _made(*shape: int) -> Iterator[Made]:
    if _fits(shape) and all(n > 0 for n in shape):
        yield Made("floats", shape)


def form_of(value: object) -> tuple[object, ...]:
    """What tells two values of calls apart while they are searched: kind and shape."""
    return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else (repr(value),)
