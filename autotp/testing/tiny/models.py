"""Makes tiny models of every transformers architecture: config, random weights and inputs, without network or tokenizer."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autotp.errors import InputError
from autotp.testing.tiny.irregular import DEFAULTS, FIELDS
from autotp.twin.roles import Sizes
from autotp.twin.shrink import shrink_config

#: Which head to build when a model has several: what people run comes first.
TASKS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
ENCODER_ONLY = ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",)
ENCODER_DECODER = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES")


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The default config of `model_type`, shrunk: hidden 64, 2 layers, 8 heads (4 key-value heads where grouped), vocabulary 128.

    Args:
        model_type: a key of transformers' `CONFIG_MAPPING`.
        overrides: fields to set; `**{"text_config.hidden_size": 128}` reaches nested configs.

    Raises:
        InputError: transformers knows no such model type.
    """
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"tiny_config: transformers has no model type {model_type!r}; see transformers.CONFIG_MAPPING")
    config = CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {}))
    return shrink_config(config, Sizes(), irregular=FIELDS, **overrides)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `tiny_model` builds: the first of `TASKS` that has one, or whichever class in the module takes this config."""
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    unfit: tuple[str, ...] = ENCODER_ONLY if getattr(config, "is_decoder", False) else ()
    if not getattr(config, "is_encoder_decoder", False):
        unfit += ENCODER_DECODER
    names = [name for task in TASKS if task not in unfit for name in _names(getattr(modeling_auto, task).get(config.model_type))]
    found: list[type[PreTrainedModel]] = [getattr(module, name) for name in names if hasattr(module, name)]
    fitting = [cls for cls in found if cls.config_class is type(config) or cls.config_class is None]
    if fitting or found:
        return (fitting or found)[0]
    candidates: list[type[PreTrainedModel]] = [
        cls for name, cls in vars(module).items() if _takes(cls, config) and not name.endswith("PreTrainedModel")
    ]
    if not candidates:
        raise InputError(f"tiny_model: no model class takes {type(config).__name__} (model type {config.model_type!r})")
    return max(candidates, key=_preference)


def _preference(cls: type[PreTrainedModel]) -> tuple[bool, bool, int]:
    """Larger is better: a head that generates, then the shorter name."""
    return "ForCausalLM" in cls.__name__, "ForConditionalGeneration" in cls.__name__, -len(cls.__name__)


def _takes(cls: object, config: PreTrainedConfig) -> bool:
    """Is this a model class with a forward of its own, made for configs of this class?"""
    if not (inspect.isclass(cls) and issubclass(cls, PreTrainedModel)):
        return False
    model: Any = cls
    return model.config_class is type(config) and model.forward is not nn.Module.forward


def _names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def tiny_model(config: PreTrainedConfig, *, seed: int = 0, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model of `config` with random weights in eval mode, the same for the same seed.

    Every parameter is drawn afresh: norms near one, everything else (biases too) wide enough that each part shows in
    the output, so a bias added twice or a norm over the wrong part is an error and not a zero.
    """
    cls = model_class(config)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    torch.manual_seed(seed)
    model = cls(config)
    randomise(model, seed=seed)
    return model.eval()


def randomise(model: nn.Module, *, seed: int = 0) -> None:
    """Draw every parameter of `model` afresh, in place: matrices with std ~ 1/sqrt(fan in), ones near one, the rest small.

    Running statistics of batch norms stay positive; other buffers stay.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() >= 2:
                std = float(min(0.2, max(0.02, (parameter.shape[-1]) ** -0.5)))
                parameter.copy_(noise * std)
            elif bool((parameter == 1).all()):
                parameter.copy_(1 + 0.2 * noise)
            elif bool((parameter == 0).all()):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(parameter * (1 + 0.1 * noise) + 0.01 * noise)
