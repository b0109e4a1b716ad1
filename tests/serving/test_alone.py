"""A call of a parallel model on one rank alone ends at its group's timeout, with an error that says what happened."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from autotp.agree import raise_lost
from autotp.errors import LostRankError
from autotp.parallel_state import state_of
from tests.serving.served import GREEDY, caught, ids, masked, models
from tests.support.slow import halved

CALLS = ("generate", "generate_batch", "forward", "forward, inputs not compared", "broadcast")


def alone(kind: str, on: int) -> Any:
    """Rank `on` makes a call that the other does not make."""
    with pytest.MonkeyPatch.context() as patch:
        if "not compared" in kind or kind == "broadcast":
            patch.setenv("AUTOTP_CHECK_INPUTS", "never")
        _, model = models("llama", 6, 3)
    state_of(model).comm.wire = dist.new_group(timeout=timedelta(seconds=2))  # planning may take longer
    prompt = ids()
    calls = {
        "generate": lambda: model.generate(prompt, **masked(prompt), **GREEDY),
        "generate_batch": lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=2),
        "forward": lambda: model(prompt),
        "forward, inputs not compared": lambda: model(prompt),
        "broadcast": lambda: model.generate(prompt, **masked(prompt), **GREEDY),
    }
    both = caught(lambda: model(prompt))  # a control
    found = caught(calls[kind]) if dist.get_rank() == on else None
    dist.barrier()
    return both, found


@pytest.mark.parametrize("kind", halved(CALLS))
def test_a_call_on_one_rank_alone_is_noticed(pool, kind):
    on = 1 if kind == "broadcast" else 0  # who sends does not wait
    answers = pool.run(alone, kind, on, world=2)
    assert [both for both, _ in answers] == [("nothing", "")] * 2
    name, text = answers[on][1]
    assert name == "LostRankError"
    assert "for another rank, which did not come" in text and "with autotp.serve(model) one rank makes it for all" in text
    assert "Timed out waiting 2000ms" in text
    called = {"generate": ".generate", "generate_batch": ".init_continuous_batching", "forward": ""}
    if kind in called:
        assert text.startswith(f"LlamaForCausalLM{called[kind]} was called on rank 0, and 2 s later not on every rank: rank 0 waited")
    elif kind != "broadcast":
        assert text.startswith("a call of LlamaForCausalLM could not be completed: rank 0 waited in the model's all-reduce")


def test_other_errors_of_collectives_stay_what_they_are():
    """What is wrong with a tensor, and not with the ranks."""
    for error in (RuntimeError("Tensors must be contiguous"), ValueError("Invalid tensor"), RuntimeError("all_reduce: unsupported dtype")):
        raise_lost("all-reduce", 0, error)
    with pytest.raises(LostRankError, match="rank 1 waited in the model's all-reduce"):
        raise_lost("all-reduce", 1, RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
