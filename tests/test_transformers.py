"""Families of transformers models, each tiny: equal at tensor-parallel 2, 3 and 4, and really sharded.

Every case compares what `assert_equivalent` does, on gloo processes, or on ranks of this process, which take a fraction of the time.
The fields of a family say which comparisons must not be skipped (see `tests.support.pooled.require`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from autotp.errors import InputError
from autotp.testing import Equivalence, assert_equivalent
from tests.support.families import transformer
from tests.support.pooled import CAUSAL, ENCODER, PLAIN, equivalent, require
from tests.support.ranks import Pool
from tests.support.slow import few, swept

RECURRENT = (*PLAIN, "generation")
HIDDEN = (*PLAIN, "with hidden states")


def _heads(heads: int, kv: int, width: int = 8) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": width, "hidden_size": heads * width}


#: name → (model type, fields, aspects that must be compared)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    **{
        name: (name, {}, CAUSAL)
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "olmo2",
            "stablelm",
            "cohere",
            "granite",
            "gpt2",
            "phi3",
            "gpt_neox",
            "bloom",
            "mpt",
            "codegen",
            "gptj",
            "phi",
            "opt",
            "starcoder2",
            "gemma3_text",
            "glm4",
            "gpt_neo",
            "biogpt",
            "xglm",
        )
    },
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}, CAUSAL),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}, CAUSAL),
    "llama_two_kv": ("llama", {"num_key_value_heads": 2}, CAUSAL),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, CAUSAL),
    "llama_wide_heads": ("llama", {"head_dim": 16}, CAUSAL),
    "qwen2_six_heads": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}, CAUSAL),
    "stablelm_qk_norm": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}, CAUSAL),
    "cohere_qk_norm": ("cohere", {"use_qk_norm": True}, CAUSAL),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}, CAUSAL),
    "gpt2_cross_layer_scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, CAUSAL),
    "opt_untied": ("opt", {"tie_word_embeddings": False}, CAUSAL),
    "opt_projected": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}, CAUSAL),
    "phi_qk_norm": ("phi", {"qk_layernorm": True}, CAUSAL),
    "gpt_bigcode_mqa": ("gpt_bigcode", {"multi_query": True}, CAUSAL),
    "gpt_bigcode_mha": ("gpt_bigcode", {"multi_query": False}, CAUSAL),
    "falcon_multi_query": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "alibi": False}, CAUSAL),
    "falcon_alibi": (
        "falcon",
        {"multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True, "parallel_attn": False},
        CAUSAL,
    ),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False}, CAUSAL),
    "deepseek_v3": ("deepseek_v3", {"experts": "eager"}, CAUSAL),
    "deepseek_v2": ("deepseek_v2", {"experts": "eager"}, CAUSAL),
    "bert": ("bert", {}, ENCODER),
    "roberta": ("roberta", {}, ENCODER),
    "electra": ("electra", {}, ENCODER),
    "distilbert": ("distilbert", {}, ENCODER),
    "deberta-v2": ("deberta-v2", {}, ENCODER),
    "modernbert": ("modernbert", {}, ENCODER),
    "t5": ("t5", {}, CAUSAL),
    "t5_gated": ("t5", {"feed_forward_proj": "gated-gelu"}, CAUSAL),
    "bart": ("bart", {}, CAUSAL),
    "marian": ("marian", {}, CAUSAL),
    "whisper": ("whisper", {}, (*HIDDEN, "generation")),
    "wav2vec2": ("wav2vec2", {}, HIDDEN),
    "vit": ("vit", {}, HIDDEN),
    "swin": ("swin", {}, HIDDEN),
    "dinov2": ("dinov2", {}, HIDDEN),
    "clip": ("clip", {}, PLAIN),
    "siglip": ("siglip", {}, PLAIN),
    "llava": ("llava", {}, RECURRENT),
    "qwen2_5_vl": ("qwen2_5_vl", {}, RECURRENT),
    **{
        name: (name, {}, RECURRENT)
        for name in ("mamba", "falcon_mamba", "mamba2", "bamba", "falcon_h1", "zamba2", "recurrent_gemma", "lfm2")
    },
    **{name: (name, {"experts": "eager"}, RECURRENT) for name in ("jamba", "nemotron_h", "qwen3_next")},
    # head counts, widths and vocabularies that the ranks do not divide
    "llama_nine_heads": ("llama", {**_heads(9, 3), "intermediate_size": 50, "vocab_size": 131}, CAUSAL),
    "llama_28_heads": ("llama", {**_heads(28, 4, 4), "intermediate_size": 51, "vocab_size": 131, "tie_word_embeddings": True}, CAUSAL),
    "qwen2_14_heads": ("qwen2", {**_heads(14, 2), "intermediate_size": 75}, CAUSAL),
    "qwen3_15_heads": ("qwen3", _heads(15, 5), CAUSAL),
    "phi3_nine_heads": ("phi3", {**_heads(9, 3), "intermediate_size": 45}, CAUSAL),
    "olmo2_six_heads": ("olmo2", {**_heads(6, 3), "intermediate_size": 45}, CAUSAL),
    "gpt2_five_heads": ("gpt2", {"n_embd": 40, "n_head": 5, "vocab_size": 133}, CAUSAL),
    "bloom_five_heads": ("bloom", {"hidden_size": 40, "n_head": 5, "vocab_size": 133}, CAUSAL),
    "falcon_five_heads": ("falcon", {"hidden_size": 40, "num_attention_heads": 5, "multi_query": True, "alibi": False}, CAUSAL),
}
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe")
#: Every rank holds at most this share of the parameters, at two ranks; a loose bound that catches a plan that gave up.
SHARE = 0.75


#: One family for each kind of layout has a case in this process; some have a second one, on processes. All others are slow.
DISTINCT = {
    "gemma2", "phi3", "bloom", "mpt", "gpt_bigcode_mqa", "falcon_new", "deepseek_v3", "bert", "t5", "whisper", "vit", "mamba2",
    "qwen3_next", "llama_28_heads", "gpt2_five_heads", "llava", "swin", "wav2vec2", "opt_projected", "deberta-v2", "jamba",
}  # fmt: skip
PROCESSES = {"phi3", "t5", "deepseek_v3", "mamba2"}
#: The cases that `make test` has; the others run in `make sweeps`.
FIRST = {"phi3": "local", "bloom": "local", "gpt2_five_heads": "local", "t5": "gloo"}
#: Families whose kinds of layers are many: at two ranks they show as much as at four, in half the time.
MANY_KINDS = {"zamba2", "jamba", "nemotron_h", "qwen2_5_vl", "recurrent_gemma", "falcon_h1"}


def cases() -> list[Any]:
    assert set(FAMILIES) >= DISTINCT | MANY_KINDS and DISTINCT >= PROCESSES
    found = []
    for number, (name, (model_type, fields, required)) in enumerate(FAMILIES.items()):
        quick = {}
        if name in DISTINCT:
            quick = {(2 if name in MANY_KINDS else 4 if number % 2 else 3, "eager"): "local"}
        if name in PROCESSES:
            quick[2, "sdpa"] = "gloo"
        for world in (2, 3, 4):
            for attention in ("eager", "sdpa"):
                backend = quick.get((world, attention), "gloo")
                later = [] if FIRST.get(name) == backend else [pytest.mark.sweep]
                marks = later if (world, attention) in quick else [pytest.mark.slow]
                case = f"{name}-{world}-{attention}-{backend}"
                found.append(pytest.param(model_type, fields, required, world, attention, backend, id=case, marks=marks))
    return found


@pytest.mark.parametrize(("model_type", "fields", "required", "world", "attention", "backend"), cases())
def test_family(
    request: pytest.FixtureRequest,
    model_type: str,
    fields: dict[str, Any],
    required: tuple[str, ...],
    world: int,
    attention: str,
    backend: str,
) -> None:
    try:
        transformer(model_type, attn_implementation=attention, **fields)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        attention = "eager"  # the one that it has
    factory = partial(transformer, model_type, attn_implementation=attention, **fields)
    if backend == "local":
        found = in_this_process(factory, world)
        require(found, *required)
    else:
        found = equivalent(request.getfixturevalue("pool"), factory, tp=world, needs=required)
    assert found.local_share <= SHARE


def in_this_process(factory: Callable[[], nn.Module], tp: int) -> Equivalence:
    """In float64, or float32 where the model has an operator without it; by the rules, without what would catch their faults."""
    try:
        return assert_equivalent(factory, tp=tp, steps=1, certificate="graph")
    except InputError as error:
        why = str(error)
    assert "dtype=torch.float32 may help" in why
    return assert_equivalent(factory, tp=tp, steps=1, dtype=torch.float32, certificate="graph")


def mixtures() -> list[Any]:
    forms = [(kind, experts) for kind in MIXTURES for experts in ("eager", "batched_mm", "grouped_mm")]
    quick = ("gpt_oss", "grouped_mm"), ("mixtral", "batched_mm")
    return [*swept(quick, quick[1]), *few([f for f in forms if f not in quick])]


@pytest.mark.parametrize(("model_type", "experts"), mixtures())
def test_experts(pool: Pool, model_type: str, experts: str) -> None:
    found = equivalent(pool, partial(transformer, model_type, experts=experts), needs=(*PLAIN, "generation", "loss"))
    assert found.local_share <= SHARE
