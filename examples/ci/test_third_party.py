"""A model of someone else, checked over several ranks: `pytest test_third_party.py --tp 2,3`.

Replace `config` and `Encoder` by the models that you ship. Nothing here is specific to them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import autotp


@pytest.fixture
def config() -> object:
    """A transformers model in small: 6 heads and 2 key/value heads, which 4 ranks do not divide. Its inputs are guessed."""
    return AutoConfig.for_model(
        "smollm3",
        vocab_size=131,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class Encoder(nn.Module):
    """A model from another library, wrapped as you call it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 72, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


X = torch.randn(2, 7, 32)


def test_config(tp, config) -> None:
    found = tp.assert_equivalent(config, steps=2)
    assert not found.plan.replicated_products, found.plan  # every Linear is sharded, and stays so


def test_module(tp) -> None:
    tp.assert_equivalent(Encoder, inputs=X, steps=2)


@pytest.mark.tp(2)
def test_the_check_would_notice(tp) -> None:
    """Each mistake that the plan could have is made once, and must fail the check."""
    assert not tp.survey(Encoder, inputs=X).survived


@pytest.mark.tp(2)
@pytest.mark.tp_backend("gloo")
def test_real_processes(tp) -> None:
    tp.assert_equivalent(Encoder, inputs=X)


def test_the_plan_is_the_reviewed_one(tp) -> None:
    """What is replicated is replicated on purpose; a new reason here is a change to look at."""
    whole = autotp.plan(Encoder(), tp=tp.size, example_inputs={"x": X}).replicated
    assert set(whole) >= {"layers.layers.0.norm1.weight"}
