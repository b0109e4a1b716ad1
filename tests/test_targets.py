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
        ("", r"target: got '', wanted a path, a model type"),
        (" ", r"target: got ' ', wanted a path, a model type"),
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


ABSURD = {
    "layers": ({**SMALL, "num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, wanted at most 1000"),
    "nested layers": (
        {"model_type": "llava", "text_config": {**SMALL, "num_hidden_layers": 10**6}},
        "text_config.num_hidden_layers is 1000000, wanted at most 1000",
    ),
    "depths": ({"model_type": "swin", "depths": [2, 10**7, 2, 2]}, "depths is 10000000, wanted at most 1000"),
    "classes": ({"model_type": "bert", "num_labels": 10**8}, "num_labels is 100000000, wanted at most 1000000"),
    "width": ({**SMALL, "hidden_size": 10**30}, "building it failed|rejected"),
    "no width": ({**SMALL, "hidden_size": 0}, "building it failed|rejected"),
    "text": ({**SMALL, "num_hidden_layers": "many"}, "rejected"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_built(folder, name):
    values, message = ABSURD[name]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        resolve(folder)


def test_absurd_sizes_of_a_config_object():
    with pytest.raises(InputError, match="num_hidden_layers is 5000, wanted at most 1000"):
        resolve(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 5000}))


def test_a_config_of_very_many_modules_names_its_largest_number(monkeypatch):
    from autotp import targets

    monkeypatch.setattr(targets, "MOST_MODULES", 50)
    with pytest.raises(InputError, match="more than 50 modules; its largest number is vocab_size = 999983"):
        resolve(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 30, "vocab_size": 999983, "max_position_embeddings": 64}))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 20000, "recursion"),
        (b'{"model_type": "llama", "a": ' + b'{"a": ' * 20000 + b"1" + b"}" * 20001, "recursion"),
        (b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}", "digits"),
        (bytes(range(256)), "not text in UTF-8"),
        (b"x" * (16 * 2**20 + 1), "larger than"),
        (b"", "Expecting value"),
    ],
)
def test_files_that_are_no_configs(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        resolve(folder)


@pytest.mark.parametrize("name", ["a" * 5000, "/a" * 5000, "a\0b"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(InputError, match="target"):
        resolve(name)
