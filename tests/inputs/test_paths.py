"""Examples run on the real model, on the CPU and on fake tensors; what cannot be derived is said by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCTC, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from autotp.errors import InputError
from autotp.inputs.paths import example_inputs, user_examples
from autotp.numeric.exact import Float64
from autotp.testing.tiny.models import tiny_config, tiny_model

TEXT = ["llama", "gpt2", "bloom", "falcon", "mixtral", "qwen3_moe", "mamba2", "deepseek_v3"]
ENCODERS = ["bert", "modernbert"]
ENCODER_DECODERS = ["t5", "bart", "whisper", "vision-encoder-decoder"]
OTHERS = ["vit", "clip", "siglip2", "wav2vec2", "wav2vec2-bert", "videomae", "layoutlm"]
WITH_IMAGES = ["llava", "qwen2_vl", "idefics3", "mistral3"]


def build(model_type, attention="eager"):
    return tiny_model(tiny_config(model_type), attn_implementation=attention).eval()


def named(model):
    return {example.name: example for example in example_inputs(model)}


@pytest.mark.parametrize("model_type", TEXT + ENCODERS + ENCODER_DECODERS + OTHERS + WITH_IMAGES)
def test_every_example_runs(model_type):
    model = build(model_type)
    examples = example_inputs(model)
    assert examples[0].name == "forward"
    assert not examples[0].optional
    assert all(example.optional for example in examples[1:])
    with torch.no_grad():
        for example in examples:
            example.call(model, example.make())


@pytest.mark.parametrize("model_type", [*TEXT, *ENCODER_DECODERS])
def test_the_second_step_feeds_one_token_to_the_returned_cache(model_type):
    model = build(model_type)
    prefill = named(model)["prefill"]
    with torch.no_grad():
        step = prefill.decode(model(**prefill.make()))
        assert step is not None
        outputs = model(**step)
    token = step["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
    assert token.shape == (3, 1)
    assert outputs.logits.shape[:2] == (3, 1)


def test_decode_continues_the_prefill():
    """Two steps with the cache answer what one call over the whole text answers."""
    model = build("llama").double()
    prefill = named(model)["prefill"]
    with torch.no_grad(), Float64():  # rounded to float32 inside, the two would differ by a last place of that
        first = prefill.make()
        step = prefill.decode(model(**first))
        stepped = model(**step).logits[:, -1]
        ids = torch.cat([first["input_ids"], step["input_ids"]], dim=1)
        whole = model(input_ids=ids, attention_mask=step["attention_mask"]).logits[:, -1]
    torch.testing.assert_close(stepped, whole, rtol=1e-9, atol=1e-12)


def test_no_second_step_without_a_cache():
    model = build("llama")
    prefill = named(model)["prefill"]
    assert prefill.decode(model(input_ids=prefill.make()["input_ids"], use_cache=False)) is None


@pytest.mark.parametrize("model_type", ["llama", "t5", "bert", "whisper", "gpt2"])
def test_labels_give_a_loss_with_gradients(model_type):
    model = build(model_type)
    loss = model(**named(model)["labels"].make()).loss
    assert torch.isfinite(loss)
    loss.backward()


@pytest.mark.parametrize(
    ("auto", "shape"),
    [(AutoModelForSequenceClassification, (3,)), (AutoModelForTokenClassification, (3, 7)), (AutoModelForMaskedLM, (3, 7))],
)
def test_labels_fit_the_head(auto, shape):
    model = auto.from_config(tiny_config("bert")).eval()
    inputs = named(model)["labels"].make()
    assert inputs["labels"].shape == shape
    assert torch.isfinite(model(**inputs).loss)


def test_the_mask_pads():
    assert named(build("llama"))["mask"].make()["attention_mask"].tolist()[1] == [1, 1, 1, 1, 1, 0, 0]


def test_labels_of_a_transcript():
    model = AutoModelForCTC.from_config(tiny_config("wav2vec2")).eval()
    assert torch.isfinite(model(**named(model)["labels"].make()).loss)


def test_ids_are_plain_and_each_call_makes_new_tensors():
    model = build("llama")
    model.config.pad_token_id, model.config.eos_token_id = 3, [8, 13]
    forward = named(model)["forward"]
    ids = forward.make()["input_ids"]
    assert ids.shape == (3, 7)
    assert not {3, 8, 13} & set(ids.flatten().tolist())
    assert int(ids.max()) < model.config.vocab_size
    ids.zero_()
    assert int(forward.make()["input_ids"].max()) > 0


def test_making_inputs_leaves_the_global_generator_alone():
    model = build("llava")
    before = torch.get_rng_state()
    for example in example_inputs(model):
        example.make()
    assert torch.equal(before, torch.get_rng_state())


def test_attention_weights_are_asked_of_any_attention():
    """Some models compute them whatever attention they run; from the others they are empty."""
    for attention in ("eager", "sdpa"):
        asked = named(build("llama", attention))["attentions"].make()
        assert asked["output_attentions"] is True
        assert asked["output_hidden_states"] is True


def test_flags_that_switch_a_loss_on_are_found_by_their_names_and_annotations():
    assert named(build("clip"))["return_loss"].make()["return_loss"] is True
    assert "return_loss" not in named(build("llama"))


@pytest.mark.parametrize(
    ("model_type", "methods"),
    [
        ("clip", {"get_text_features": {"input_ids"}, "get_image_features": {"pixel_values"}}),
        ("siglip2", {"get_image_features": {"pixel_values", "pixel_attention_mask", "spatial_shapes"}}),
        (
            "qwen2_vl",
            {"get_image_features": {"pixel_values", "image_grid_thw"}, "get_video_features": {"pixel_values_videos", "video_grid_thw"}},
        ),
        ("llama", {}),
    ],
)
def test_methods_that_answer_one_kind_of_input(model_type, methods):
    examples = named(build(model_type))
    found = {name: example for name, example in examples.items() if example.method}
    assert methods.keys() <= found.keys()
    assert bool(methods) == bool(found)
    for name, keywords in methods.items():
        assert found[name].method == name
        assert found[name].make().keys() == keywords


def test_an_inner_model_that_generates():
    """BLIP's own `generate` hands its decoder the generation, which forward never calls with a cache."""
    examples = named(build("blip"))
    assert examples["text_decoder prefill"].method == "text_decoder" and examples["text_decoder prefill"].decode is not None
    assert not [name for kind in ("llama", "llava", "clip") for name in named(build(kind)) if "." in name or " prefill" in name]


def test_a_call_that_gives_something_else_asks_for_attentions_too():
    from autotp.inputs.paths import user_internals

    (example,) = user_internals(build("layoutlmv3"), {"pixel_values": torch.zeros(2, 3, 32, 32)})
    assert example.name == "user with attentions"
    assert example.make().keys() == {"pixel_values", "output_attentions", "output_hidden_states"}


@pytest.mark.parametrize("model_type", WITH_IMAGES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_placeholders_match_the_features_of_the_images(model_type, device):
    """A model without weights counts the same placeholders as one with weights, on which they fit."""
    model = build(model_type)
    wanted = named(model)["images"].make()["input_ids"]
    found = named(model.to(device))["images"].make()["input_ids"]
    assert torch.equal(wanted, found)
    assert int((found == model.config.image_token_id).sum()) > 0


@pytest.mark.parametrize("model_type", ["llama", "t5", "vit", "whisper"])
def test_the_tensors_convert_to_fake_ones(model_type):
    model = build(model_type)
    inputs = named(model)["forward"].make()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        model(**{name: fake.from_tensor(value) for name, value in inputs.items()})


class Plain(nn.Module):
    def forward(self, x, gate, scale=1.0):
        return x * gate * scale


class Open(nn.Module):
    def forward(self, x, **more):
        return x, more


def test_a_model_may_name_several_main_inputs():
    """As oneformer does, whose encoder-decoder counterparts name theirs by a method."""
    model = build("bart")
    model.main_input_name = ["input_ids", "decoder_input_ids"]
    assert {"input_ids", "decoder_input_ids"} <= set(named(model)["forward"].make())


def test_a_plain_module_needs_inputs_of_the_caller():
    with pytest.raises(InputError, match=r"Plain is not a transformers model.*example_inputs=.*'x', 'gate'"):
        example_inputs(Plain())


def test_inputs_of_the_caller():
    given = {"x": torch.ones(2), "gate": torch.ones(2)}
    (example,) = user_examples(Plain(), given)
    assert example.make() == given
    assert example.make() is not given
    assert example.decode is None
    assert not example.optional
    assert user_examples(Open(), {"x": 1, "anything": 2})[0].make() == {"x": 1, "anything": 2}


def test_all_that_is_wrong_with_the_callers_inputs_is_said_at_once():
    with pytest.raises(InputError) as caught:
        user_examples(Plain(), {"x": 1, "gates": torch.zeros(2, 3), 4: 5})
    message = str(caught.value)
    for part in ("example_inputs of Plain", "'gates'", "float32 tensor of shape (2, 3)", "'gate'", "key 4 is a int"):
        assert part in message


def test_the_callers_inputs_must_be_mappings():
    for given, kind in (((torch.ones(2),), "Tensor"), ([{"x": 1, "gate": 2}, 3], "int"), ((), "tuple"), (torch.ones(2), "Tensor")):
        with pytest.raises(InputError, match=f"got a {kind}, wanted a mapping"):
            user_examples(Plain(), given)


class Flagged(nn.Module):
    """A flag that is off, and an argument that may be absent."""

    def forward(self, x, mask=None, hard=False, scale=1.0):
        return x


def test_other_calls_follow_from_the_callers():
    made = user_examples(Flagged(), {"x": 1, "mask": 2})
    assert [e.name for e in made] == ["user", "user with mask=None", "user with hard=True", "user with mask=None, hard=True"]
    assert [e.optional for e in made] == [False, True, True, True]
    assert made[2].make() == {"x": 1, "mask": 2, "hard": True}
    made = user_examples(Flagged(), [{"x": 1, "hard": True}, {"x": 3, "mask": 2, "hard": False}])
    assert [e.name for e in made] == ["user", "user 2"]


def test_transformers_is_not_imported():
    code = (
        "import sys, torch; from autotp.inputs.paths import example_inputs, is_hugging_face;"
        "assert not is_hugging_face(torch.nn.Linear(2, 2)); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
