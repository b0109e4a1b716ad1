"""Tiny models keep what matters of the large ones."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from autotp.errors import InputError
from autotp.planner.make_plan import plain_call
from autotp.testing.inputs import tiny_inputs
from autotp.testing.shrink import shrink_config, sizes_like
from autotp.testing.tiny.models import model_class, tiny_config, tiny_model


def test_grouped_heads_stay_grouped() -> None:
    config = tiny_config("mistral")
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (8, 4, 64)


def test_equal_heads_stay_equal() -> None:
    config = tiny_config("llama")
    assert config.num_attention_heads == config.num_key_value_heads


def test_one_key_value_head_stays_one() -> None:
    large = tiny_config("llama", num_attention_heads=32, num_key_value_heads=1, hidden_size=4096, head_dim=128)
    assert shrink_config(large).num_key_value_heads == 1


def test_heads_wider_than_the_hidden_size_stay_wider() -> None:
    config = tiny_config("gemma2")
    assert config.head_dim * config.num_attention_heads == 2 * config.hidden_size


def test_every_kind_of_layer_stays_once() -> None:
    assert set(tiny_config("gpt_oss").layer_types) == {"sliding_attention", "full_attention"}
    assert len(tiny_config("gpt_oss").layer_types) == tiny_config("gpt_oss").num_hidden_layers


def test_dense_and_sparse_layers_stay() -> None:
    model = tiny_model(tiny_config("deepseek_v3"))
    assert len({type(layer.mlp) for layer in model.model.layers}) == 2


def test_token_ids_fit_and_stay_distinct() -> None:
    config = tiny_config("gemma3")
    ids = [config.image_token_id, config.boi_token_id, config.eoi_token_id]
    assert len(set(ids)) == 3
    assert max(ids) < config.text_config.vocab_size


@pytest.mark.parametrize(
    ("heads", "kv", "kept"), [(9, 3, (9, 3)), (28, 4, (28, 4)), (71, 1, (71, 1)), (128, 8, (64, 8)), (40, 40, (40, 40))]
)
def test_sizes_divide_as_the_large_ones_do(heads: int, kv: int, kept: tuple[int, int]) -> None:
    large = CONFIG_MAPPING["llama"](
        num_attention_heads=heads, num_key_value_heads=kv, hidden_size=64 * heads, intermediate_size=11_011, vocab_size=50_257
    )
    small = shrink_config(large, sizes_like(large, 3))
    assert (small.num_attention_heads, small.num_key_value_heads) == kept
    assert small.vocab_size % 3 == 50_257 % 3
    assert small.intermediate_size % 24 == 11_011 % 24
    assert max(small.vocab_size, small.intermediate_size) < 160
    tiny_inputs(tiny_model(small))


@pytest.mark.parametrize("model_type", ["gpt2", "mamba2", "qwen3_next", "t5", "llava"])
def test_sizes_like_those_of_other_kinds(model_type: str) -> None:
    large = CONFIG_MAPPING[model_type]()
    tiny_inputs(tiny_model(shrink_config(large, sizes_like(large, 3))))


def test_nested_overrides() -> None:
    assert tiny_config("llava", **{"text_config.num_hidden_layers": 3}).text_config.num_hidden_layers == 3
    with pytest.raises(ValueError, match="no nested config"):
        tiny_config("llama", **{"text_config.num_hidden_layers": 3})


def test_the_argument_is_left_alone() -> None:
    large = tiny_config("llama", hidden_size=4096)
    shrink_config(large)
    assert large.hidden_size == 4096


def test_unknown_type() -> None:
    with pytest.raises(InputError, match="no model type 'lama'"):
        tiny_config("lama")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertForMaskedLM"),
        ("bart", "BartForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("vit", "ViTModel"),
        ("siglip_text_model", "SiglipTextModel"),
    ],
)
def test_model_class(model_type: str, name: str) -> None:
    assert model_class(tiny_config(model_type)).__name__ == name


def test_weights_come_from_the_seed() -> None:
    one, two, other = (tiny_model(tiny_config("gpt2"), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_no_parameter_hides() -> None:
    """Biases are not zero and norms not one, so a mistake with them shows."""
    model = tiny_model(tiny_config("gpt2"))
    assert all(parameter.std() > 0.01 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", {"input_ids"}),
        ("t5", {"input_ids", "decoder_input_ids"}),
        ("vit", {"pixel_values"}),
        ("whisper", {"input_features", "decoder_input_ids"}),
        ("llava", {"input_ids", "attention_mask", "pixel_values"}),
        ("qwen2_5_vl", {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"}),
        ("clip", {"input_ids", "pixel_values"}),
    ],
)
def test_inputs(model_type: str, names: set[str]) -> None:
    model = tiny_model(tiny_config(model_type))
    assert set(tiny_inputs(model)) == names


def test_widths_of_stages_that_are_equal_stay_equal() -> None:
    config = tiny_config("hgnet_v2")
    assert config.stage_out_channels[1:] == config.hidden_sizes[1:]
    assert config.stage_in_channels[1:] == config.stage_out_channels[:-1]
    assert config.stem_channels[0] == 3 and config.stem_channels[-1] == config.stage_in_channels[0]
    config = tiny_config("clap_audio_model")
    assert config.hidden_size == config.patch_embeds_hidden_size << (len(config.depths) - 1)


@pytest.mark.parametrize("model_type", ["superpoint", "clvp_encoder", "mimi", "deepseek_ocr2_vision"])
def test_widths_that_are_written_in_the_code_fit(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    with torch.no_grad():
        model(**plain_call(model))
