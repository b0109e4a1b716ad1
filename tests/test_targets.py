"""What a TARGET resolves to, and what is said where it resolves to nothing."""

from __future__ import annotations

import json

import pytest
import transformers
from torch import nn

from autotp.errors import InputError
from autotp.targets import load, resolve

SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}


def linear():
    return nn.Linear(2, 3)


def wrong():
    return 3


def fails():
    raise RuntimeError("no\nluck")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def test_a_directory_and_its_config_file_are_the_same(folder):
    for target in (folder, str(folder), folder / "config.json", f"{folder}/config.json"):
        model = resolve(target)
        assert type(model) is transformers.LlamaForCausalLM
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert model.config.hidden_size == 16
        assert not model.training


def test_architectures_choose_the_class(folder):
    (folder / "config.json").write_text(json.dumps({**SMALL, "architectures": ["LlamaForSequenceClassification"]}))
    assert type(resolve(folder)) is transformers.LlamaForSequenceClassification


@pytest.mark.parametrize(
    ("model_type", "cls"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
        ("llava", "LlavaForConditionalGeneration"),
        ("clip", "CLIPModel"),
        ("clip_vision_model", "CLIPVisionModel"),
    ],
)
def test_a_model_type_gives_the_usual_head(model_type, cls):
    assert type(resolve(model_type)).__name__ == cls


def test_a_callable_is_called_on_the_meta_device():
    assert resolve("tests.test_targets:linear").weight.is_meta


def test_modules_and_configs_are_themselves():
    module, config = linear(), transformers.LlamaConfig(**SMALL)
    assert resolve(module) is module
    assert load(config) is config
    assert type(resolve(config)) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lama", r"no such model type; near names: llama, "),
        ("qqq", "and is neither a path nor package.module:callable"),
        ("no/such/dir", "no such directory with a config.json, and nothing is downloaded"),
        ("tests.test_targets:liner", "has no 'liner'; near names: linear"),
        ("tests.test_targets:SMALL", "SMALL is dict, wanted something to call"),
        ("tests.test_targets:wrong", "returned int, wanted an nn.Module"),
        ("tests.test_targets:fails", "failed with RuntimeError: no luck"),
        ("no.such.module:f", "no module named 'no'"),
        (3, "got int, wanted a path"),
    ],
)
def test_what_is_no_target_is_refused(target, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve(target)
    assert "\n" not in str(caught.value)


def test_near_directories_are_listed(folder):
    with pytest.raises(InputError, match=f"near names: {folder.name}"):
        resolve(f"{folder}x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "holds no `model_type`"),
        ('{"model_type": "lama"}', "near names: llama"),
        ('{"model_type": "llama", "num_attention_heads": "x"}', "llama config rejected"),
    ],
)
def test_bad_config_files_are_named(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        resolve(folder)
    assert str(folder) in str(caught.value)
