"""Calls that a model takes are found from what its errors say; what cannot be made is named."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import autotp
from autotp.errors import InputError, TraceError
from autotp.inputs.by_name import value_of, why_not
from autotp.inputs.facts import Facts, Guess, Made
from autotp.inputs.missing import missing_keywords
from autotp.inputs.paths import calls_with
from autotp.planner.make_plan import plain_call
from autotp.testing.tiny.models import tiny_config, tiny_model
from tests.support.slow import halved

#: A model type → a keyword that its plain call needs beside what is required, or in another form, and what is told by its value.
FOUND = {
    "lxmert": ("visual_pos", lambda t: t.shape == (3, 7, 4)),  # two more keywords, named by errors
    "blip_2_qformer": ("encoder_hidden_states", lambda t: t.dim() == 3),
    "decision_transformer": ("actions", lambda t: t.shape[-1] == 4),  # as wide as the code says that it wants
    "perceiver": ("inputs", lambda t: not t.is_floating_point()),  # ids, under a name that says nothing
    "udop": ("bbox", lambda t: t.is_floating_point()),
    "dia_decoder": ("input_ids", lambda t: t.shape[-1] == 9),  # several codebooks
    "clap_audio_model": ("input_features", lambda t: t.shape[1] == 1),  # a dim for channels
    "gemma4_vision": ("pixel_position_ids", lambda t: t.shape[-1] == 2),
    "gemma3n_audio": ("audio_mel_mask", lambda t: t.dtype is torch.bool),
    "speech-encoder-decoder": ("input_values", lambda t: t.dim() == 2),  # of the encoder, under another name than the model says
    "florence_vision": ("hidden_states", lambda t: t.dim() == 4),  # an image
}


@pytest.mark.parametrize("model_type", halved(FOUND))
def test_a_call_is_found_and_runs(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    call = plain_call(model)
    name, told = FOUND[model_type]
    assert isinstance(call[name], Tensor) and told(call[name])
    with torch.no_grad():
        model(**call)


def test_a_plan_needs_no_inputs() -> None:
    plan = autotp.plan(tiny_model(tiny_config("lxmert")), tp=2, check="graph")
    assert plan.local_share < 0.7


def test_settings_that_each_layer_has_for_itself() -> None:
    """transformers raises where such a setting of the whole config is read."""
    assert autotp.plan(tiny_model(tiny_config("gemma4_text")), tp=2, check="graph").local_share < 0.6


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        (
            "edgetam_video",
            r"requires what .* cannot make up .*'inference_session' \(it is a .*EdgeTamVideoInferenceSession.*example_inputs=",
        ),
        ("glm_image_vqmodel", "has no forward of its own"),
    ],
)
def test_what_cannot_be_made_is_named(model_type: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        autotp.plan(tiny_model(tiny_config(model_type)), tp=2)


def test_where_no_call_runs_the_best_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own layers do not fit each other: no inputs help."""
    monkeypatch.setattr("autotp.inputs.search.MOST_TRIES", 3)
    with pytest.raises(
        TraceError, match=r"cannot trace .*No call that autotp made up .*, of \d+; this one came furthest: pixel_values: \["
    ):
        autotp.plan(tiny_model(tiny_config("groupvit_vision_model")), tp=2)


def test_the_search_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotp.inputs.search.MOST_SECONDS", 0.0)
    with pytest.raises(TraceError, match="cannot trace") as caught:
        autotp.plan(tiny_model(tiny_config("groupvit_vision_model")), tp=2)
    assert "No call that autotp made up" not in str(caught.value)


def stopped(model: torch.nn.Module, call: Mapping[str, object]) -> TraceError:
    with pytest.raises(TraceError) as caught:
        autotp.plan(model, tp=2, example_inputs=dict(call), check="graph")
    return caught.value


def test_missing_keywords_are_read_from_errors() -> None:
    model = tiny_model(tiny_config("decision_transformer"))
    keywords = set(Facts(model).keywords)
    error = stopped(model, {"states": torch.randn(3, 7, 17)})  # by the variable that is None in a Linear
    assert missing_keywords(error, keywords - {"states"}) == ["actions"]
    assert missing_keywords(error, {"timesteps"}) == []
    model = tiny_model(tiny_config("blip_2_qformer"))
    error = stopped(model, {"query_embeds": torch.randn(3, 7, 64)})  # by the text
    assert missing_keywords(error, {"encoder_hidden_states", "attention_mask"}) == ["encoder_hidden_states"]


def test_values_by_name() -> None:
    facts = Facts(tiny_model(tiny_config("lxmert")))
    assert value_of(facts, "visual_feats").shape == (3, 7, facts.config.visual_feat_dim)
    assert value_of(facts, "visual_attention_mask").shape == (3, 7)
    assert why_not(facts, "matched_label") is not None
    guess = Guess({"visual_feats": Made("floats", (3, 2, 5))}, ("visual_feats", "visual_pos"))
    call = calls_with(facts.model, guess)[0].make()
    assert call["visual_feats"].shape == (3, 2, 5)
