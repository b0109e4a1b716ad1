"""Makes one small value for each keyword that a forward of the Hugging Face family asks for.

`VALUES` maps the keyword to a function of the model's `Facts`. The sizes below are odd and unequal, so that a batch or a length is
never mistaken for a head count or a width:

    batch 3 · text 7 · decoder text 5 · audio frames and image sides as the config says
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autotp.inputs.facts import AUDIO, VISION, Facts, Made

BATCH = 3
LENGTH = 7
DECODER_LENGTH = 5
GRID = 4  # patches a side of an image whose size is free
FRAMES = 64  # of a spectrogram whose length is free
SIDE = 64  # pixels a side of an image whose size is free


def token_ids(facts: Facts, batch: int, length: int) -> Tensor:
    """Ids in `[0, vocabulary)` without special ones: `[batch, length]`, long."""
    plain = [i for i in range(min(facts.vocabulary, 1000)) if i not in facts.special_ids] or [0]
    ids = [plain[(3 + 5 * i) % len(plain)] for i in range(batch * length)]
    return torch.tensor(ids).reshape(batch, length)


def padding_mask(batch: int, length: int) -> Tensor:
    """Ones, with two padded places at the end of the second row: `[batch, length]`, long.

    Padding at the start would leave the first queries of a causal model nothing to attend to: NaN in float64.
    """
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def noise(*shape: int) -> Tensor:
    """Reproducible floats in (-1, 1), not drawn from the global generator."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) * 0.7).reshape(shape)


def patch(facts: Facts) -> tuple[int, int]:
    """Height and width of an image patch, in pixels."""
    return facts.pair("patch_size", "vision_patch_size", default=16, part=VISION)


def grid(facts: Facts) -> tuple[int, int]:
    """Patches down and across of an image whose size is free: a multiple of the merge and window sizes."""
    merge = facts.number("spatial_merge_size", "merge_size", "downsample_factor", default=1, part=VISION)
    side = max(GRID, 2 * merge)
    return side, side


def _channels(facts: Facts) -> int:
    names = ("num_channels", "in_channels", "in_chans", "image_num_channels", "num_image_channels")
    return facts.number(*names, default=3, part=VISION)


def _frames(facts: Facts) -> int | None:
    frames = facts.find("num_frames", part=VISION)
    return frames if isinstance(frames, int) else None


def _image(facts: Facts) -> tuple[int, int]:
    names = ("image_size", "img_size", "input_size", "resolution", "crop_size")
    return facts.pair(*names, default=SIDE, part=VISION)


def pixel_values(facts: Facts) -> Tensor:
    """An image a row, in the form that the other keywords of the forward imply."""
    channels, (down, across) = _channels(facts), patch(facts)
    if facts.takes("image_grid_thw") or facts.takes("grid_thw"):
        return patches(facts, BATCH)
    if facts.takes("spatial_shapes") or facts.takes("pixel_position_ids"):
        rows, columns = grid(facts)
        return noise(BATCH, rows * columns, channels * down * across)
    if facts.takes("pixel_attention_mask"):
        return noise(BATCH, 2, channels, *_image(facts))
    pinpoints = facts.find("image_grid_pinpoints") if facts.takes("image_sizes") else None
    if pinpoints:
        return noise(BATCH, _tiles(_image(facts), pinpoints), channels, *_image(facts))
    frames = _frames(facts)
    if frames is not None and not facts.takes("pixel_values_videos"):
        return noise(BATCH, frames, channels, *_image(facts))
    return noise(BATCH, channels, *_image(facts))


def _tiles(image: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> int:
    """The tiles of an image of the tower's own size, cut to the best of `pinpoints`, and the image as a whole."""

    def fit(point: tuple[int, int]) -> tuple[int, int]:
        scale = min(point[0] / image[0], point[1] / image[1])
        used = min(int(image[0] * scale) * int(image[1] * scale), math.prod(image))
        return used, used - math.prod(point)

    best = max(pinpoints, key=fit)
    return 1 + math.prod(math.ceil(side / own) for side, own in zip(best, image, strict=True))


def patches(facts: Facts, images: int) -> Tensor:
    """The flattened patches of `images` images: `[images * rows * columns, channels * frames * height * width]`."""
    rows, columns = grid(facts)
    depth = facts.number("temporal_patch_size", "patch_temporal", default=1, part=VISION)
    return noise(images * rows * columns, _channels(facts) * depth * math.prod(patch(facts)))


def grid_thw(facts: Facts) -> Tensor:
    """Frames, rows and columns of each image: `[batch, 3]`."""
    return torch.tensor([[1, *grid(facts)]] * BATCH)


def _patch_places(facts: Facts) -> Tensor:
    """Column and row of each patch: `[batch, patches, 2]`."""
    rows, columns = grid(facts)
    places = torch.stack([torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)], dim=-1)
    return places.expand(BATCH, -1, -1).contiguous()


def pixel_values_videos(facts: Facts) -> Tensor:
    """Frames of videos: `[batch, frames, channels, height, width]`, or flattened patches as of images."""
    if facts.takes("video_grid_thw"):
        return patches(facts, BATCH)
    frames = _frames(facts) or facts.number("frames_per_clip", "max_frames", default=2, part=VISION)
    return noise(BATCH, frames, _channels(facts), *_image(facts))


def _pixel_mask(facts: Facts) -> Tensor:
    return torch.ones(BATCH, *_image(facts), dtype=torch.long)


def _image_sizes(facts: Facts) -> Tensor:
    return torch.tensor([_image(facts)] * BATCH)


def _pixel_attention_mask(facts: Facts) -> Tensor:
    if facts.takes("spatial_shapes"):
        return torch.ones(BATCH, math.prod(grid(facts)), dtype=torch.long)
    images = made_value(facts, "pixel_values")
    shape = images.shape if isinstance(images, Tensor) and images.dim() > 3 else (BATCH, 2, 1, *_image(facts))
    return torch.ones(*shape[:-3], *shape[-2:], dtype=torch.bool)


def _mel_bins(facts: Facts) -> int:
    names = (
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_feat_per_channel",
        "n_mels",
        "mel_bins",
        "num_mel_bin",
        "input_feat_size",
        "feature_size",
        "input_dim",
        "spectrogram_bins",
    )
    return facts.number(*names, default=80, part=AUDIO)


def input_features(facts: Facts) -> Tensor:
    """A spectrogram: mel bins before frames where a first convolution reads them as channels, after them elsewhere."""
    bins = _mel_bins(facts)
    if _mel_first(facts, bins):
        convolutions = [m for m in facts.model.modules() if isinstance(m, nn.Conv1d)]
        stride = math.prod(c.stride[0] for c in convolutions[:2])
        return noise(BATCH, bins, facts.number("max_source_positions", default=32, part=AUDIO) * stride)
    return noise(BATCH, FRAMES, bins)


def _mel_first(facts: Facts, bins: int) -> bool:
    first = next((m for m in facts.model.modules() if isinstance(m, nn.Conv1d)), None)
    return first is not None and first.in_channels == bins and facts.find("input_feat_per_channel") is None


def _frame_mask(facts: Facts) -> Tensor:
    bins, features = _mel_bins(facts), made_value(facts, "input_features")
    assert isinstance(features, Tensor)
    first = features.shape[-1] != bins if "input_features" in facts.guess.made else _mel_first(facts, bins)
    return torch.ones(BATCH, features.shape[-1 if first else -2], dtype=torch.long)


def _attention_mask(facts: Facts) -> Tensor:
    """Over the text, or over the frames of a spectrogram where there is no text."""
    if facts.takes("input_features") and not facts.takes("input_ids"):
        return _frame_mask(facts)
    return padding_mask(BATCH, LENGTH)


def _waveform_samples(facts: Facts) -> int:
    strides = facts.find("conv_stride", "upsampling_ratios", "downsampling_ratios", part=AUDIO)
    hop = math.prod(strides) if isinstance(strides, (list, tuple)) else 320
    return max(hop, 160) * 20


def input_values(facts: Facts) -> Tensor:
    """A waveform `[batch, samples]`, with a channel dim where the config counts channels; or a spectrogram."""
    length = facts.find("max_length") if facts.find("num_mel_bins") is not None else None
    if isinstance(length, int) and length > 64:
        return noise(BATCH, length, _mel_bins(facts))
    channels = facts.number("audio_channels", "num_audio_channels", default=0)
    convolution = next((m for m in facts.model.modules() if isinstance(m, nn.Conv1d)), None)
    if channels or (not facts.takes("attention_mask") and convolution is not None and convolution.in_channels == 1):
        return noise(BATCH, channels or 1, _waveform_samples(facts))
    return noise(BATCH, _waveform_samples(facts))


def _bbox(facts: Facts) -> Tensor:
    side = facts.number("max_2d_position_embeddings", default=1024) // 4
    box = torch.tensor([1, 2, max(side, 4), max(side, 5)])
    return box.expand(BATCH, LENGTH, 4).contiguous()


def _past_length(facts: Facts) -> int:
    context = facts.number("context_length", "prediction_length", default=16)
    lags = facts.find("lags_sequence")
    return context + (max(lags) if isinstance(lags, (list, tuple)) and lags else 0)


def _series(facts: Facts) -> tuple[int, ...]:
    if facts.takes("past_time_features"):
        width = facts.number("input_size", default=1)
        return (BATCH, _past_length(facts)) + ((width,) if width > 1 else ())
    if facts.find("num_input_channels") is not None:
        return BATCH, _past_length(facts), facts.number("num_input_channels", default=1)
    return BATCH, _past_length(facts)


def _time_features(facts: Facts, length: int) -> Tensor:
    return noise(BATCH, length, facts.number("num_time_features", default=0))


def _prediction(facts: Facts) -> int:
    return facts.number("prediction_length", default=4)


def _hidden_states(facts: Facts) -> Tensor:
    if facts.takes("grid_thw"):
        return patches(facts, BATCH)
    return noise(BATCH, LENGTH, facts.number("hidden_size", "d_model", "embed_dim", default=64))


def _masked_patches(facts: Facts) -> Tensor:
    """Every other patch of a clip is masked: `[batch, patches]`, bool."""
    rows, columns = (side // size for side, size in zip(_image(facts), patch(facts), strict=True))
    depth = (_frames(facts) or 1) // facts.number("tubelet_size", default=1, part=VISION)
    return (torch.arange(depth * rows * columns) % 2 == 0).expand(BATCH, -1).contiguous()


def _latents(facts: Facts) -> Tensor:
    width = facts.number("latent_dim", "hidden_size", "codebook_dim", default=64)
    return noise(BATCH, width, LENGTH)


def _patch_rows(facts: Facts) -> Tensor:
    width = 2 + math.prod(patch(facts)) * _channels(facts)
    return torch.cat([torch.ones(BATCH, GRID, 2), noise(BATCH, GRID, width - 2)], dim=-1)


VALUES: dict[str, Callable[[Facts], object]] = {
    "input_ids": lambda f: token_ids(f, BATCH, LENGTH),
    "decoder_input_ids": lambda f: token_ids(f, BATCH, DECODER_LENGTH),
    "qformer_input_ids": lambda f: token_ids(f, BATCH, LENGTH),
    "attention_mask": _attention_mask,
    "input_features_mask": lambda f: _frame_mask(f).bool(),
    "feature_attention_mask": lambda f: _frame_mask(f),
    "token_type_ids": lambda f: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "position_ids": lambda f: torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
    "bbox": _bbox,
    "pixel_values": pixel_values,
    "pixel_values_videos": pixel_values_videos,
    "pixel_mask": _pixel_mask,
    "pixel_attention_mask": _pixel_attention_mask,
    "image_sizes": _image_sizes,
    "image_grid_thw": grid_thw,
    "grid_thw": grid_thw,
    "video_grid_thw": grid_thw,
    "pixel_position_ids": _patch_places,
    **dict.fromkeys(("merge_sizes", "image_merge_sizes", "video_merge_sizes"), lambda f: torch.ones(BATCH, dtype=torch.long)),
    "target_sizes": lambda f: torch.tensor([grid(f)] * BATCH),
    "spatial_shapes": lambda f: torch.tensor([grid(f)] * BATCH),
    "flattened_patches": _patch_rows,
    "hidden_states": _hidden_states,
    "inputs_embeds": _hidden_states,
    "query_embeds": _hidden_states,
    "bool_masked_pos": _masked_patches,
    "latents": _latents,
    "input_features": input_features,
    "input_values": input_values,
    "past_values": lambda f: noise(*_series(f)),
    "past_observed_mask": lambda f: torch.ones(_series(f)),
    "past_time_features": lambda f: _time_features(f, _past_length(f)),
    "future_time_features": lambda f: _time_features(f, _prediction(f)),
    "future_values": lambda f: noise(BATCH, _prediction(f), *_series(f)[2:]),
}


def made_value(facts: Facts, name: str) -> object:
    """The value of a keyword of `VALUES`, in the form of the guess where that has one.

    Raises:
        KeyError: `VALUES` has no such keyword.
    """
    other = facts.guess.made.get(name)
    return VALUES[name](facts) if other is None else built(facts, other)


def built(facts: Facts, made: Made) -> object:
    """The value that is described by `made`."""
    if made.kind == "floats":
        return noise(*made.shape)
    if made.kind == "positive":
        return noise(*made.shape).abs()
    if made.kind == "ids":
        return token_ids(facts, 1, math.prod(made.shape)).reshape(made.shape)
    if made.kind in ("ones", "true"):
        return torch.ones(made.shape, dtype=torch.long if made.kind == "ones" else torch.bool)
    return made.value
