"""Parts of a model that its plain call does not read are read by calls with images, with sound, or with another keyword."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autotp
from autotp.inputs.by_name import value_of
from autotp.inputs.facts import Facts, Guess, Made, forward_keywords
from autotp.inputs.forms import other_forms
from autotp.inputs.media import AUDIO, with_medium
from autotp.inputs.search import named
from autotp.planner.make_plan import traced_calls
from autotp.testing.tiny.models import tiny_config, tiny_model
from autotp.trace.repeats import alike_blocks
from tests.support.slow import swept

#: A model type → the share of its parameters on one of two ranks.
READ = {
    "idefics2": 0.52,  # images that are all zero are left out
    "granite_docling": 0.6,  # several images a row, and a mask of whole images
    "qwen2_audio": 0.54,  # sound in a text, and no method that gives its features
    "voxtral": 0.53,  # such a method, which hands on what it is given
    "canary_decoder": 0.52,  # the states of an encoder
    "instructblip_qformer": 0.55,  # these, beside another keyword
    "evolla": 0.53,  # ids of its own kind, with their mask
}


@pytest.mark.parametrize("model_type", swept(READ, "voxtral", "canary_decoder", "instructblip_qformer"))
def test_what_no_plain_call_reads_is_sharded(model_type: str) -> None:
    assert autotp.plan(tiny_model(tiny_config(model_type)), tp=2, check="graph").local_share < READ[model_type]


def test_without_time_it_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotp.inputs.unread.MOST_SECONDS", 0.0)
    plan = autotp.plan(tiny_model(tiny_config("canary_decoder")), tp=2, check="graph")
    assert plan.local_share > 0.6
    assert any(p.reason == "no traced call reads it" for p in plan.params.values())


def test_a_model_whose_parameters_are_all_read_is_called_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("autotp.inputs.unread._found", searched)
    assert autotp.plan(tiny_model(tiny_config("llama")), tp=2, check="graph").local_share < 0.6


def test_placeholders_are_as_many_as_they_are_to_be() -> None:
    model = tiny_model(tiny_config("qwen2_audio"))
    facts = Facts(model, guess=Guess(marks=7))
    ids = with_medium(facts, ("input_ids",), AUDIO)["input_ids"]
    assert isinstance(ids, Tensor)
    assert (ids == facts.audio_token).sum(dim=1).tolist() == [3, 2, 2]
    assert int((named(model, Guess(marks=5), "audio").make()["input_ids"] == facts.audio_token).sum()) == 5  # type: ignore[union-attr]


def test_patches_of_each_image_in_a_row_of_its_own() -> None:
    facts = Facts(tiny_model(tiny_config("colqwen2")))
    pixels = value_of(facts, "pixel_values")
    assert isinstance(pixels, Tensor) and pixels.dim() == 2
    forms = [made.shape for name, made in other_forms(facts, {"pixel_values": pixels}, "") if name == "pixel_values"]
    assert (3, pixels.shape[0] // 3, pixels.shape[1]) in forms[:3]


def test_as_many_dims_as_the_code_unpacks() -> None:
    facts = Facts(tiny_model(tiny_config("mllama")))
    text = "ValueError: not enough values to unpack (expected 6, got 4)"
    first, made = next(other_forms(facts, {"input_ids": torch.ones(3, 4), "pixel_values": torch.ones(3, 3, 32, 32)}, text))
    assert first == "pixel_values" and made.shape == (3, 1, 4, 3, 32, 32)


def test_a_mask_of_whole_images() -> None:
    facts = Facts(tiny_model(tiny_config("granite_docling")))
    mask = value_of(facts, "pixel_attention_mask")
    assert isinstance(mask, Tensor) and mask.dim() == 4
    assert Made("true", tuple(mask.shape[:2])) in [made for _, made in other_forms(facts, {"pixel_attention_mask": mask}, "")]


def test_a_method_that_hands_on_what_it_is_given() -> None:
    model = tiny_model(tiny_config("voxtral"))
    assert list(forward_keywords(model, "get_audio_features")) == ["input_features"]
    assert "input_ids" in forward_keywords(model)


def test_what_only_a_found_call_runs_shows_its_hidden_states() -> None:
    """A layer that the plain call leaves out: its sum is taken before the hidden states are given away."""
    model = tiny_model(tiny_config("canary_decoder"))
    examples, _ = traced_calls(model, None, alike_blocks(model), {})
    (found,) = [e for e in examples if e.name == "with encoder_hidden_states with attentions"]
    assert {"encoder_hidden_states", "output_hidden_states"} <= found.make().keys()
