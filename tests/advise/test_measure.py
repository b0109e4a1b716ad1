"""What is measured on fake tensors is what real ranks hold and send: weights, caches, saved activations, collectives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import comb
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile

import autotp
from autotp.advise.calls import text_calls
from autotp.advise.measure import measured_serving, measured_training, recomputing
from autotp.advise.measured import Pass
from autotp.advise.rank import one_rank
from autotp.advise.routing import drawn
from autotp.advise.workload import Checkpointing
from autotp.data_parallel import units
from autotp.trace.keep import undone
from tests.advise.real import BATCH, LENGTH, NEW, PROMPT, SEQUENCES, build, count
from tests.support.ranks import Pool

#: (model type, tp, sequence parallel); 3 divides neither heads nor vocabulary.
CASES = [
    *(pytest.param(kind, 1, False, marks=pytest.mark.sweep) for kind in ("llama", "gpt2")),
    ("mixtral", 1, False),
    pytest.param("llama", 2, False, marks=pytest.mark.sweep),
    ("gpt2", 3, False),
    ("llama", 2, True),
    *(pytest.param(kind, tp, False, marks=pytest.mark.sweep) for kind, tp in (("gpt2", 2), ("llama", 3), ("mixtral", 2), ("mixtral", 3))),
    *(pytest.param(kind, tp, True, marks=pytest.mark.sweep) for kind, tp in (("gpt2", 2), ("llama", 4), ("mixtral", 2))),
]
EXPERTS = {"placements": {"experts": "whole"}}


def messages(done: Pass) -> dict[tuple[str, int], int]:
    return {(str(m.kind), m.bytes): n for m, n in done.messages.items()}


@pytest.mark.parametrize(("kind", "tp", "in_parts"), CASES)
def test_real_ranks_hold_and_send_as_much(kind: str, tp: int, in_parts: bool, pool: Pool) -> None:
    ranks = [count(kind, 1)] if tp == 1 else pool.run(count, kind, tp, in_parts, world=tp)
    model = build(kind)
    plan = autotp.plan(model, tp=tp, check="graph", sequence_parallel=in_parts)
    paths, calls = units(model, plan), text_calls(model)
    with one_rank(model, plan, torch.float32) as rank:
        served = measured_serving(rank, paths, calls, BATCH, PROMPT, NEW)
        trained = measured_training(rank, paths, calls.train(SEQUENCES, LENGTH), Checkpointing.NONE)
    for real in ranks:
        assert served.weights.parameters == trained.weights.parameters == real.weights
        assert served.cache == real.cache > 0
        assert trained.activations == pytest.approx(real.saved, rel=0.005)  # ranks after the first shift the ids that they look up
        assert messages(served.prefill) == real.prefill
        assert messages(served.decode) == real.decode
        assert messages(trained.forward) == real.forward
        assert messages(trained.backward) == real.backward
    assert (tp > 1) == bool(messages(served.decode))
    assert in_parts == any(kind == "reduce_scatter" for kind, _ in messages(trained.forward))


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch's allocator has handed out when `run` has ended and its result is alive, and the most at a time."""
    run()  # the first one makes what stays
    with profile(profile_memory=True) as seen:
        kept = run()
    changes = sorted((e.start_ns(), e.nbytes()) for e in seen.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    alive = list(accumulate(change for _, change in changes))
    del kept
    return alive[-1], max(alive)


def test_whole_experts_hold_and_send_as_much(pool: Pool) -> None:
    """Real routers choose other tokens than those that are drawn, so what the experts are sent differs in bytes alone."""
    model = build("mixtral")
    plan = autotp.plan(model, tp=2, check="graph", sequence_parallel=True, recipe=EXPERTS)
    assert any(m.pairs is not None for m in plan.modules)
    with one_rank(model, plan, torch.float32) as rank:
        served = measured_serving(rank, units(model, plan), text_calls(model), BATCH, PROMPT, NEW)
        trained = measured_training(rank, units(model, plan), text_calls(model).train(SEQUENCES, LENGTH), Checkpointing.NONE)
    assert not model.model.layers[0].mlp.experts._forward_pre_hooks  # type: ignore[union-attr, index]
    for real in pool.run(count, "mixtral", 2, True, EXPERTS, world=2):
        assert served.weights.parameters == real.weights
        assert (served.cache, messages(served.prefill), messages(served.decode)) == (real.cache, real.prefill, real.decode)
        for done, sent in ((trained.forward, real.forward), (trained.backward, real.backward)):
            assert apart(messages(done)) == apart(sent)
            assert apart(sent)[1] > 0


def apart(sent: dict[tuple[str, int], int]) -> tuple[dict[tuple[str, int], int], int]:
    """The messages that are none of experts, and the number of those."""
    rest = {key: n for key, n in sent.items() if key[0] != "all_to_all"}
    return rest, sum(sent.values()) - sum(rest.values())


@pytest.mark.parametrize(("experts", "each", "tp"), [(8, 2, 4), (64, 2, 8), (7, 3, 2), (4, 4, 2)])
def test_experts_are_drawn_evenly_and_the_first_rank_has_most(experts: int, each: int, tp: int) -> None:
    span = -(-experts // tp)
    spans = [(start, min(start + span, experts)) for start in range(0, experts, span)]
    for tokens in (1, 5, 4000):
        index = drawn(tokens, each, experts, spans)
        assert all(len(set(row)) == each for row in index.tolist())
        pairs = [int(((index >= a) & (index < b)).sum()) for a, b in spans]
        assert pairs[0] == max(pairs) > 0
    here = (index < span).any(-1).float().mean()
    assert float(here) == pytest.approx(1 - comb(experts - span, each) / comb(experts, each), abs=0.03)


@pytest.mark.parametrize("checkpointing", Checkpointing)
def test_memory_is_what_the_allocator_hands_out(checkpointing: Checkpointing) -> None:
    """The bytes alive after a forward, and the most while a model serves. Each kind of checkpointing keeps less than the one before."""
    model: Any = build("llama").train()
    ids = torch.zeros(4, 64, dtype=torch.long)
    plan = autotp.plan(model, tp=1)
    paths, calls = units(model, plan), text_calls(model)
    with one_rank(model, plan, torch.float32) as rank:
        trained = measured_training(rank, paths, calls.train(4, 64), checkpointing)
        more = measured_training(rank, paths, calls.train(4, 64), Checkpointing.NONE)
        served = measured_serving(rank, paths, calls, 4, 64, 2)
    assert (trained.activations < more.activations) == (checkpointing is not Checkpointing.NONE)
    assert (trained.backward.flops > more.backward.flops) == (checkpointing is Checkpointing.FULL)
    with undone() as undo:
        recomputing(model, paths, checkpointing, undo)
        alive, _ = allocated(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert trained.activations == pytest.approx(alive, rel=0.02)

    def serve() -> object:
        with torch.no_grad():
            out = model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)
            return model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True).past_key_values

    cache, most = allocated(serve)
    assert served.cache == pytest.approx(cache, rel=0.02)
    assert served.cache + served.temporary == pytest.approx(most, rel=0.1)
