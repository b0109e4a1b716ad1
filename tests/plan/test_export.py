"""Plans in the words of transformers and torch: equal where they can say it, an error where not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.distributed.tensor.parallel import parallelize_module

import autotp
from autotp.errors import PlanError
from tests.support.families import transformer
from tests.support.ranks import Pool, mesh


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama", "gemma3_text"))])
def test_what_transformers_wrote_by_hand_for_itself(kind):
    model = transformer(kind)
    assert autotp.plan(model, tp=2).to_tp_plan() == dict(model.tp_plan)


@pytest.mark.parametrize(
    ("kind", "tp", "problems"),
    [
        pytest.param("gpt2", 2, ["c_attn: ", "the attribute split_size becomes local (64 → 32)"], marks=pytest.mark.slow),
        ("phi3", 2, ["is fused", "config.num_attention_heads becomes local"]),
        ("llama", 3, ["model.layers.*.self_attn.q_proj.weight", "is padded: 3 ranks do not divide it"]),
        pytest.param("olmo2", 2, ["a call in", "is changed"], marks=pytest.mark.slow),
        pytest.param("bloom", 2, ["argument alibi: slice"], marks=pytest.mark.sweep),
        pytest.param("deepseek_v3", 2, ["mlp: result (all): reduce"], marks=pytest.mark.slow),
        ("falcon", 2, ["rows that several ranks hold"]),
    ],
)
def test_what_they_cannot_say(kind, tp, problems):
    plan = autotp.plan(transformer(kind), tp=tp)
    for export in (plan.to_tp_plan, plan.to_parallelize_module):
        with pytest.raises(PlanError, match="cannot say what this plan does") as caught:
            export()
        for problem in problems:
            assert problem in str(caught.value)


def test_a_convolution_that_is_cut_alone_stays_whole():
    """It gets and gives whole tensors, so the others do not depend on it."""
    plan = autotp.plan(transformer("vit"), tp=2, check="graph")
    (name,) = (n for n, p in plan.params.items() if len(p.layout.shape) == 4)
    assert plan.params[name].layout.dim == 0
    styles = plan.to_tp_plan(), plan.to_parallelize_module()
    assert not any("projection" in key for words in styles for key in words) and all("layers.*.mlp.fc2" in words for words in styles)


def test_torch_has_no_summed_gradients():
    with pytest.raises(PlanError, match="q_norm: whole, and used on shards"):
        autotp.plan(transformer("qwen3"), tp=2).to_parallelize_module()


def _logits(kind: str) -> float:
    model = transformer(kind).double()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(ids).logits
        styles = autotp.plan(model, tp=2).to_parallelize_module()
        parallelize_module(model, mesh(), styles)
        return float((model(ids).logits - whole).abs().max() / whole.abs().max())


def test_torch_gives_the_same_logits(pool: Pool):
    assert max(pool.run(partial(_logits, "llama"), world=2)) < 1e-9
