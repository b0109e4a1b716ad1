"""Finds inputs for a tiny transformers model from the signature of its `forward` and its config alone.

Several sets of arguments are possible for most models (text with images, text only, …). `tiny_inputs` proposes them from rich to
plain and returns the first that the model runs on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from autotp.errors import InputError
from autotp.planner.make_plan import plain_call

Inputs = dict[str, Any]


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _value(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these fields that the config, or one nested in it, sets."""
    for part in _configs(config):
        for name in names:
            value = vars(part).get(name)
            if value is not None and not isinstance(value, PreTrainedConfig):
                return value
    return default


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        value = list(value.values())
    return (int(value), int(value)) if isinstance(value, (int, float)) else (int(value[0]), int(value[-1]))


class _Maker:
    """Draws arguments by name for one model."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int, seed: int) -> None:
        self.model = model
        self.config = model.config
        self.batch = batch
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
        self.dtype = floats[0] if floats else torch.float32

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32).to(self.dtype)

    def ints(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    @property
    def width(self) -> int:
        value = _value(self.config, "hidden_size", "d_model", "n_embd", "dim", "embed_dim", default=64)
        return int(value[0] if isinstance(value, (list, tuple)) else value)  # of several stages

    @property
    def channels(self) -> int:
        value = _value(self.config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
        return int(value if isinstance(value, int) else 3)

    @property
    def special_ids(self) -> set[int]:
        ids: set[int] = set()
        for part in _configs(self.config):
            for name, value in vars(part).items():
                if name.endswith(("_token_id", "_token_index", "_id")) and isinstance(value, int):
                    ids.add(value)
        return ids

    def tokens(self, length: int | None = None) -> Tensor:
        """Ordinary token ids: none that the config gives a meaning."""
        vocab = int(_value(self.config, "vocab_size", "n_tokens", "vocabulary_size", default=128))
        plain = [i for i in range(min(vocab, 128)) if i not in self.special_ids] or list(range(vocab))
        picks = self.ints(len(plain), self.batch, length or self.length)
        return torch.tensor(plain)[picks]

    def pixels(self) -> Tensor:
        height, width = _pair(_value(self.config, "image_size", "img_size", "input_size", default=32))
        frames = _value(self.config, "num_frames", "frames_per_clip", "video_length")
        shape = [self.batch, self.channels, height, width]
        return self.floats(*shape) if frames is None else self.floats(self.batch, int(frames), *shape[1:])

    def video(self) -> Tensor:
        height, width = _pair(_value(self.config, "image_size", "crop_size", "img_size", default=32))
        frames = int(_value(self.config, "num_frames", "frames_per_clip", default=4))
        return self.floats(self.batch, frames, self.channels, height, width)

    def features(self) -> Tensor:
        bins = int(_value(self.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_bins", "input_dim", default=80))
        frames = 2 * int(_value(self.config, "max_source_positions", default=32))
        wide = (self.batch, bins, frames)
        return self.floats(*wide) if "max_source_positions" in _all_fields(self.config) else self.floats(self.batch, frames, bins)

    def waves(self) -> Tensor:
        return self.floats(self.batch, 3200)

    @property
    def patch(self) -> int:
        return _pair(_value(self.config, "patch_size", default=8))[0]

    @property
    def grid(self) -> Tensor:
        """(time, height, width) in patches, for each image."""
        return torch.tensor([[1, 4, 4]] * self.batch)

    def flat_patches(self) -> list[Tensor]:
        """16 patches of each image in a row, in the forms that models take."""
        steps = int(_value(self.config, "temporal_patch_size", default=1))
        area = self.patch * self.patch
        flat = self.floats(self.batch * 16, self.channels * steps * area)
        whole = flat[:, : self.channels * area].reshape(-1, self.channels, self.patch, self.patch).contiguous()
        return [flat, whole, whole.unsqueeze(0)]

    def media(self, medium: str, names: Container[str]) -> Iterator[Inputs]:
        """Images or sound with what goes with them, in the forms that models take."""
        if medium != "pixel_values":
            made = {medium: MAKERS[medium](self)}
            masks = [n for n in ("feature_attention_mask", "input_features_mask", "audio_attention_mask", "attention_mask") if n in names]
            yield made
            if masks and medium == "input_features":
                yield {**made, masks[0]: torch.ones(self.batch, made[medium].shape[-1], dtype=torch.long)}
                swapped = made[medium].transpose(1, 2).contiguous()
                yield {medium: swapped, masks[0]: torch.ones(self.batch, swapped.shape[1], dtype=torch.long)}
            return
        grid = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hws", "target_sizes") if n in names), None)
        if grid is not None:
            for pixels in self.flat_patches():
                made = {medium: pixels, grid: self.grid if grid.endswith("thw") else self.grid[:, 1:]}
                for name in ("merge_sizes", "image_merge_sizes"):
                    if name in names:
                        made[name] = torch.full((self.batch,), 2)
                yield made
        if "spatial_shapes" in names:
            steps = int(_value(self.config, "num_patches", default=16))
            mask = torch.zeros(self.batch, steps, dtype=torch.long)
            mask[:, :16] = 1
            area = self.channels * self.patch * self.patch
            yield {medium: self.floats(self.batch, steps, area), "pixel_attention_mask": mask, "spatial_shapes": self.grid[:, 1:].clone()}
        if "aspect_ratio_ids" in names:
            tiles = int(_value(self.config, "max_num_tiles", default=4))
            made = {
                medium: self.pixels()[:, None, None].repeat(1, 1, tiles, 1, 1, 1),
                "aspect_ratio_ids": torch.ones(self.batch, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(self.batch, 1, tiles, dtype=torch.long),
            }
            if "cross_attention_mask" in names:
                made["cross_attention_mask"] = torch.ones(self.batch, self.length, 1, tiles, dtype=torch.long)
            yield made
        pixels = self.pixels()
        size = torch.tensor([list(pixels.shape[-2:])] * self.batch)
        yield {medium: pixels}
        if "image_sizes" in names:
            yield {medium: pixels, "image_sizes": size}
            yield {medium: pixels.unsqueeze(1).repeat(1, 3, 1, 1, 1), "image_sizes": size}
        if pixels.dim() == 4:
            yield {medium: pixels.unsqueeze(1)}
            yield {medium: pixels.unsqueeze(1).repeat(1, 2, 1, 1, 1)}
        else:
            yield {medium: pixels[:, 0].contiguous()}


def _all_fields(config: PreTrainedConfig) -> set[str]:
    return {name for part in _configs(config) for name in vars(part)}


MAKERS: dict[str, Callable[[_Maker], Any]] = {
    "input_ids": lambda m: m.tokens(),
    "decoder_input_ids": lambda m: m.tokens(6),
    "attention_mask": lambda m: torch.ones(m.batch, m.length, dtype=torch.long),
    "token_type_ids": lambda m: torch.zeros(m.batch, m.length, dtype=torch.long),
    "inputs_embeds": lambda m: m.floats(m.batch, m.length, m.width),
    "hidden_states": lambda m: m.floats(m.batch, m.length, m.width),
    "hidden_state": lambda m: m.floats(m.batch, m.length, m.width),
    "encoder_hidden_states": lambda m: m.floats(m.batch, m.length, m.width),
    "query_embeds": lambda m: m.floats(m.batch, 4, m.width),
    "pixel_values": lambda m: m.pixels(),
    "pixel_values_videos": lambda m: m.video(),
    "video_values": lambda m: m.video(),
    "high_res_pixel_values": lambda m: m.pixels(),
    "pixel_mask": lambda m: torch.ones(m.batch, *_pair(_value(m.config, "image_size", default=32)), dtype=torch.long),
    "input_features": lambda m: m.features(),
    "input_values": lambda m: m.waves(),
    "audio_values": lambda m: m.waves(),
    "bbox": lambda m: _boxes(m),
    "position_ids": lambda m: torch.arange(m.length).expand(m.batch, m.length).contiguous(),
    "past_values": lambda m: m.floats(m.batch, _series_length(m), *_series_channels(m)),
    "query_ids": lambda m: m.tokens(),
    "image": lambda m: m.pixels(),
    "images": lambda m: m.pixels(),
    "visual_embeds": lambda m: m.floats(m.batch, 4, m.width),
    "spectrogram": lambda m: m.floats(m.batch, 20, int(_value(m.config, "model_in_dim", "num_mel_bins", default=80))),
    "return_loss": lambda m: False,
    "timestep": lambda m: torch.full((m.batch,), 0.5, dtype=m.dtype),
    "input_features_mask": lambda m: torch.ones(m.batch, m.features().shape[1], dtype=torch.long),
    "qformer_input_ids": lambda m: m.tokens(),
    "past_time_features": lambda m: m.floats(m.batch, _series_length(m), int(_value(m.config, "num_time_features", default=0))),
    "past_observed_mask": lambda m: torch.ones(m.batch, _series_length(m)),
    "states": lambda m: m.floats(m.batch, 4, int(_value(m.config, "state_dim", default=17))),
}


def _series_length(m: _Maker) -> int:
    """The context, and before it what the largest lag looks back to."""
    return int(_value(m.config, "context_length", default=32)) + int(max(_value(m.config, "lags_sequence", default=[0])))


def _series_channels(m: _Maker) -> tuple[int, ...]:
    channels = _value(m.config, "num_input_channels")
    return () if channels is None else (int(channels),)


def _boxes(m: _Maker) -> Tensor:
    corner = m.ints(8, m.batch, m.length, 2)
    return torch.cat([corner, corner + 1 + m.ints(8, m.batch, m.length, 2)], dim=-1)


def _proposals(model: PreTrainedModel, m: _Maker) -> Iterator[Inputs | Exception]:
    """Sets of arguments to try, rich to plain."""
    parameters = inspect.signature(model.forward).parameters
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [n for n in names if parameters[n].default is inspect.Parameter.empty]
    main = model.main_input_name if model.main_input_name in names else None
    base = list(dict.fromkeys(([main] if main else []) + required))
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in names and model.config.is_encoder_decoder else []
    text = ["input_ids"] if "input_ids" in names else []
    media = [n for n in ("pixel_values", "input_features", "input_values") if n in names]
    if text and media:
        yield from _with_placeholders(model, m, names, media[0])
    sets = [
        base + decoder + text,
        base + decoder,
        text,
        [*text, "bbox"],
        [*base, "position_ids"],
    ]
    if media and set(required) <= {media[0], *_BESIDES, "input_ids"}:
        for with_text in [text + decoder, decoder] if text else [decoder]:
            for made in m.media(media[0], names):
                yield {**{n: MAKERS[n](m) for n in with_text}, **made}
    if "grid_thw" in names and "hidden_states" in required:
        for patches in m.flat_patches():
            yield {"hidden_states": patches, "grid_thw": m.grid}
    books = _value(model.config, "num_codebooks", "num_vq", "n_codes_total")
    if text and isinstance(books, int):
        yield {"input_ids": m.tokens().repeat(books, 1)}
        yield {"input_ids": m.tokens()[..., None].repeat(1, 1, books)}
        yield {"input_ids": m.tokens()[..., None].repeat(1, 1, books + 1)}
    seen: list[set[str]] = []
    for chosen in sets:
        wanted = set(chosen)
        if not wanted or wanted in seen or not wanted <= set(names) or not wanted <= set(MAKERS):
            continue
        seen.append(wanted)
        made = {n: MAKERS[n](m) for n in dict.fromkeys(chosen)}
        yield made
        if "input_values" in made:
            yield {**made, "input_values": made["input_values"].unsqueeze(1)}
            bins = int(_value(m.config, "num_mel_bins", default=80))
            yield {**made, "input_values": m.floats(m.batch, int(_value(m.config, "max_length", default=64)), bins)}
        if "input_features" in made:
            yield {**made, "input_features": made["input_features"].transpose(1, 2).contiguous()}


#: What media arguments bring with them.
_BESIDES = {
    "image_grid_thw",
    "grid_thw",
    "image_grid_hws",
    "target_sizes",
    "merge_sizes",
    "image_merge_sizes",
    "pixel_attention_mask",
    "spatial_shapes",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
    "image_sizes",
    "feature_attention_mask",
    "input_features_mask",
    "audio_attention_mask",
    "attention_mask",
}


def _with_placeholders(model: PreTrainedModel, m: _Maker, names: list[str], medium: str) -> Iterator[Inputs | Exception]:
    """Text in which as many placeholder tokens stand as the model makes features of the image or sound."""
    kind = "image" if medium == "pixel_values" else "audio"
    token = _value(model.config, f"{kind}_token_id", f"{kind}_token_index")
    getter = getattr(model, f"get_{kind}_features", None) or getattr(model.base_model, f"get_{kind}_features", None)
    if token is None or getter is None:
        return
    for made in m.media(medium, names):
        try:
            count = _feature_count(getter, made)
        except Exception as error:  # the model's own feature extraction, on a wrong guess
            yield error
            continue
        if count % m.batch:
            continue
        plain = m.tokens(6)
        ids = torch.cat([plain[:, :2], torch.full((m.batch, count // m.batch), int(token)), plain[:, 2:]], dim=1)
        extra: Inputs = {n: (ids == int(token)).long() for n in ("mm_token_type_ids", "token_type_ids") if n in names}
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **{n: v for n, v in made.items() if n in names}, **extra}


def _feature_count(getter: Callable[..., Any], made: Inputs) -> int:
    """Counts the placeholder tokens that these images or sounds need."""
    taken = inspect.signature(getter).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    with torch.no_grad():
        found = getter(**{n: v for n, v in made.items() if n in taken or open_ended})
    features = found if isinstance(found, (Tensor, tuple, list)) else getattr(found, "pooler_output", None)
    if features is None:
        features = found[0]
    return sum(_rows(f) for f in features) if isinstance(features, (tuple, list)) else _rows(features)


def _rows(features: Tensor) -> int:
    return features.numel() // features.shape[-1]


def tiny_inputs(model: PreTrainedModel, *, batch: int = 2, length: int = 10, seed: int = 0) -> Inputs:
    """Keyword arguments on which `model` runs: text, images, sound, whatever its `forward` asks for.

    Raises:
        InputError: no proposal ran; says which argument sets were tried and what each met.
    """
    tried: list[str] = []
    proposals = _proposals(model, _Maker(model, batch, length, seed))
    for inputs in proposals:
        if isinstance(inputs, Exception):
            tried.append(f"with placeholders: {type(inputs).__name__}: {str(inputs)[:160]}")
            continue
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # a wrong guess may fail in any way
            tried.append(f"{sorted(inputs)}: {type(error).__name__}: {str(error)[:160]}")
            continue
        return inputs
    try:
        inputs = plain_call(model)  # as `autotp.plan` makes it
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # a call that can be traced may still fail for real
        tried.append(f"autotp's own call: {type(error).__name__}: {str(error)[:500]}")
        raise InputError(
            f"tiny_inputs: {type(model).__name__} ran on no guess; pass inputs by hand. Tried:\n  " + "\n  ".join(tried)
        ) from error
    return inputs


def training_inputs(model: PreTrainedModel, *, seed: int = 0) -> Inputs:
    """`tiny_inputs`, with labels where the model takes them and generates; without a cache, which holds shards (generation has one).

    Raises:
        InputError: as for `tiny_inputs`.
    """
    inputs = tiny_inputs(model, seed=seed)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if model.can_generate() and ids is not None and "labels" in inspect.signature(model.forward).parameters:
        inputs["labels"] = ids
    if getattr(model.config, "use_cache", False):
        inputs["use_cache"] = False
    return inputs
