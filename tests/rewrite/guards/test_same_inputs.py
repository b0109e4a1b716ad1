"""Ranks that are given different inputs are told so, on all ranks."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.errors import InputError
from autotp.rewrite.guards.same_inputs import VARIABLE, described, mode_of_environment
from tests.support.ranks import Pool, mesh


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids, scale=1.0, mask=None):
        return self.b(self.a(self.e(ids)).relu()) * scale


def forwards(mode: str, calls: int, argument: str) -> str:
    os.environ[VARIABLE] = mode
    torch.manual_seed(0)
    ids = torch.arange(6).view(2, 3)
    try:
        model = autotp.parallelize(Net(), mesh(), example_inputs={"ids": ids, "scale": 1.0})
        for _ in range(calls):
            model(ids)
        rank = dist.get_rank()
        match argument:
            case "ids":
                model(ids + rank)
            case "scale":
                model(ids, scale=1.0 + rank)
            case "shape":
                model(ids[: 2 - rank])
            case "count":
                model(ids, **({"mask": ids} if rank else {}))
    except autotp.AutoTPError as error:
        return str(error)
    finally:
        del os.environ[VARIABLE]
    return ""


@pytest.mark.parametrize(("argument", "named"), [("ids", "argument 0"), ("scale", "'scale'"), ("shape", "argument 0"), ("count", "'mask'")])
def test_different_inputs_are_an_error_on_both_ranks(pool: Pool, argument: str, named: str) -> None:
    for mode, calls in (("first", 1), ("always", 9)):
        first, second = pool.run(forwards, mode, calls, argument)
        assert first == second and f"{named} on rank 1" in first and "Net" in first


def test_equal_inputs_pass_and_the_check_can_be_turned_off(pool: Pool) -> None:
    assert pool.run(forwards, "always", 3, "none") == ["", ""]
    assert pool.run(forwards, "never", 0, "ids") == ["", ""]
    assert pool.run(forwards, "first", 10, "ids") == ["", ""]  # between two of the seldom checks
    assert all("AUTOTP_CHECK_INPUTS is 'often'" in text for text in pool.run(forwards, "often", 0, "none"))


def test_what_counts(monkeypatch) -> None:
    a, b = torch.zeros(3), torch.ones(3)
    assert described((a,), {}) == described((b,), {}) != described((a[:2],), {})
    assert described((), {"x": [a.long()]}) != described((), {"x": [b.long()]})
    monkeypatch.setenv(VARIABLE, "sometimes")
    with pytest.raises(InputError, match="sometimes"):
        mode_of_environment()


def generations(argument: str) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, attention_dropout=0.3))

        def forward(self, input_ids):
            return self.lm(input_ids).logits

    ids = torch.arange(3, 9)[None]
    model = autotp.parallelize(Wrapper().eval(), mesh(), example_inputs={"input_ids": ids})
    torch.manual_seed(dist.get_rank())
    if argument == "same":
        model.train()
        dropped = float(model.lm(ids).logits.sum())
        return f"{model.eval().lm.generate(ids, max_new_tokens=8, do_sample=True, top_k=0).tolist()} {dropped}"
    try:
        model.lm.generate(ids + dist.get_rank(), max_new_tokens=2)
    except autotp.AutoTPError as error:
        return str(error)
    return ""


def test_an_inner_model_generates_and_drops_alike_on_all_ranks(pool: Pool) -> None:
    first, second = pool.run(generations, "same")
    assert first == second
    first, second = pool.run(generations, "other")
    assert first == second and "LlamaForCausalLM.generate was called with different inputs" in first
