"""Lists the odd corners of a transformers config: which fields can be switched, and whether a model of it runs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autotp.errors import InputError
from autotp.testing.geometry import Geometry
from autotp.testing.inputs import tiny_inputs
from autotp.testing.tiny.irregular import DEFAULTS, FIELDS
from autotp.testing.tiny.models import tiny_model
from autotp.twin.roles import HEAD_NAMES, KV_NAMES, Sizes
from autotp.twin.shrink import shrink_config

#: Fields that are on or off, and change what a model is made of.
_SWITCH = re.compile(
    r"(.*_)?bias|tie_word_embeddings|(use_)?qk_(layer)?norm|use_qk_norm|qk_layernorm|use_parallel_residual|parallel_attn|multi_query|alibi"
    r"|new_decoder_architecture|do_layer_norm_before|scale_attn_by_inverse_layer_idx|norm_topk_prob|rotary"
)
_ACTIVATION = re.compile(r"hidden_act|activation_function|hidden_activation|afn|mlp_hidden_act")

Make = Callable[[Geometry, Mapping[str, Any]], PreTrainedConfig]


def corners(model_type: str) -> tuple[Make, dict[str, list[Any]]]:
    """(geometry, chosen fields → tiny config) of a model type, and the values that each field may be given.

    Raises:
        InputError: transformers has no such model type.
    """
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"configs: transformers has no model type {model_type!r}; see transformers.CONFIG_MAPPING")
    default = CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {}))
    fields = vars(default)
    options: dict[str, list[Any]] = {n: [v, not v] for n, v in sorted(fields.items()) if isinstance(v, bool) and _SWITCH.fullmatch(n)}
    options |= {n: [v, "gelu", "relu"] for n, v in fields.items() if isinstance(v, str) and _ACTIVATION.fullmatch(n)}
    options["attn_implementation"] = ["sdpa", "eager"]
    kv = next((n for n in KV_NAMES if isinstance(fields.get(n), int)), None)
    single = next((n for n in HEAD_NAMES if isinstance(fields.get(n), int)), None)

    def make(g: Geometry, chosen: Mapping[str, Any]) -> PreTrainedConfig:
        chosen = dict(chosen)
        attention = chosen.pop("attn_implementation")
        own = {kv: g.kv} if kv is not None and single is not None else {}
        sizes = Sizes(hidden=g.heads * g.size, heads=g.heads, kv_heads=g.kv, ffn=3 * g.width, vocab=96 + g.vocab)
        config = shrink_config(default, sizes, irregular=FIELDS, **{**own, **chosen})
        config._attn_implementation = attention
        return config

    return make, options


def usable(config: PreTrainedConfig) -> bool:
    """Does a model of this config run by itself?"""
    try:
        with torch.random.fork_rng(devices=()):
            tiny_inputs(tiny_model(copy.deepcopy(config)))
    except Exception:  # a class may refuse sizes in any way, some only when they meet
        return False
    return True
