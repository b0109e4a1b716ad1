"""`resize_token_embeddings` of a parallel model is that of one device, whatever comes before and after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import autotp
from autotp.plan.plan import Plan
from tests.composition.training import Data, apart, by_block, exact, loss_of, mesh_of
from tests.composition.training import parallel as over_mesh
from tests.rewrite.parameters.uses import build
from tests.support.ranks import Pool, mesh
from tests.support.slow import swept

KINDS = ["even", "tied", "fused", "padded", "biased", "experts"]


def pair(kind: str) -> tuple[Any, Any]:
    alone = build(kind, eager=False)
    return alone, autotp.parallelize(copy.deepcopy(alone), mesh(), check="graph")


def stepped(model: Any, rows: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, Data(1).ids(step) % rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _resized(model: Any, rows: int, **options: Any) -> Any:
    torch.manual_seed(5)
    return model.resize_token_embeddings(rows, mean_resizing=False, **options)


def grown_and_shrunk(kind: str) -> dict[str, float]:
    """Trained, grown, trained, shrunk, trained: states, logits, tokens; and the plan beside that of the resized model."""
    alone, model = pair(kind)
    found: dict[str, float] = {}
    for rows, options in ((40, {}), (47, {"pad_to_multiple_of": 8}), (29, {})):
        ends = [_resized(m, rows, **options) for m in (alone, model)]
        assert [e.num_embeddings for e in ends] == [model.config.vocab_size] * 2 == [alone.config.vocab_size] * 2
        assert ends[1] is model.get_input_embeddings() and model.get_output_embeddings().out_features == model.config.vocab_size
        rows = alone.config.vocab_size
        stepped(alone, rows), stepped(model, rows)
        found[f"{rows} state"] = apart(alone.state_dict(), autotp.full_state_dict(model))
        ids = Data(1).ids(3) % rows
        with torch.no_grad(), exact(model):
            found[f"{rows} logits"] = float((alone(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())
            tokens = [m.generate(ids[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (alone, model)]
        assert torch.equal(*tokens)
        if rows == 48:
            plan, again = autotp.plan_of(model), autotp.plan(copy.deepcopy(alone), tp=2, check="graph")
            assert _compared(plan) == _compared(again), (plan, again)
        with torch.no_grad(), exact(model):  # a copy is resized by itself
            copied = copy.deepcopy(model)
            copied.resize_token_embeddings(rows + 3, mean_resizing=False)
            assert copied.get_input_embeddings().weight.shape[0] == rows + 3 == model.get_input_embeddings().weight.shape[0] + 3
            copied(input_ids=ids)
    return found


def _compared(plan: Plan) -> Any:
    return {n: p.layout for n, p in plan.params.items()}, plan.modules, {(a.pattern, a.size) for a in plan.axes}, plan.traffic


@pytest.mark.parametrize("kind", swept(KINDS, "tied", "padded"))
def test_grown_and_shrunk(pool: Pool, kind: str) -> None:
    for found in pool.run(grown_and_shrunk, kind):
        assert max(found.values()) <= 1e-9, found


def in_training(folder: str) -> dict[str, float]:
    """An optimizer made before keeps the table; what is saved after is loaded into a model of the new size; random rows are rank 0's."""
    alone, model = pair("tied")
    optimizers = [SGD(m.parameters(), lr=0.1) for m in (alone, model)]
    for m in (alone, model):
        m.get_input_embeddings().weight.register_hook(lambda g: 0.5 * g)
    for m, optimizer in zip((alone, model), optimizers, strict=True):
        torch.manual_seed(1)
        m.resize_token_embeddings(44, mean_resizing=False)
        stepped(m, 44, optimizer)
    found = {"old optimizer": apart(alone.state_dict(), autotp.full_state_dict(model))}
    model.save_pretrained(folder)
    again = autotp.from_pretrained(folder, mesh(), dtype=torch.float64)
    found["saved"] = apart(autotp.full_state_dict(model), autotp.full_state_dict(again))
    torch.manual_seed(mesh().get_local_rank())
    again.resize_token_embeddings(50)
    whole: Tensor = again.get_input_embeddings().weight.full_tensor()
    found["kept"] = float((whole[:44] - model.get_input_embeddings().weight.full_tensor()).abs().max())
    with torch.no_grad():
        found["uses"] = float((loss_of(again, Data(1).ids(0)) - loss_of(model.eval(), Data(1).ids(0))).abs() > 5)
    return found


def test_in_training(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(in_training, str(tmp_path)):
        assert max(found.values()) <= 1e-9, found


def _same_size(m: Any) -> None:
    before = m.get_input_embeddings().weight
    assert m.resize_token_embeddings() is m.get_input_embeddings()
    m.resize_token_embeddings(40)
    assert m.get_input_embeddings().weight is before


def _failing(m: Any) -> None:
    """transformers' code raises half-way."""
    state = autotp.full_state_dict(m)
    m._get_resized_lm_head = lambda *args, **kwargs: 1 // 0
    with pytest.raises(ZeroDivisionError):
        m.resize_token_embeddings(48, mean_resizing=False)
    assert m.config.vocab_size == 40
    assert apart(state, autotp.full_state_dict(m)) == 0.0
    stepped(m, 40)


def _whole_head(m: Any) -> None:
    m.lm_head.weight = nn.Parameter(m.lm_head.weight.full_tensor().detach())
    m.resize_token_embeddings(48)


def _without_padding(m: Any) -> None:
    m.get_input_embeddings().padding_idx = 39
    m.resize_token_embeddings(30)


FINE: dict[str, Callable[[Any], None]] = {"same size": _same_size, "failing": _failing}
REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a head of its own": (_whole_head, "it is not cut along the tokens"),
    "padding token": (_without_padding, "padding token 39"),
}


def told() -> dict[str, str]:
    found = {}
    for name, use in {**FINE, **{n: u for n, (u, _) in REFUSED.items()}}.items():
        _, model = pair("even")
        try:
            use(model)
            found[name] = ""
        except autotp.AutoTPError as error:
            found[name] = str(error)
    return found


def test_what_is_refused_changes_nothing(pool: Pool) -> None:
    for found in pool.run(told):
        assert not any(found[name] for name in FINE), found
        for name, (_, text) in REFUSED.items():
            assert text in found[name] and "before parallelize" in found[name], found


def under_fsdp() -> str:
    model: Any = by_block(over_mesh("even", mesh_of(2, 2)), mesh_of(2, 2))
    with pytest.raises(autotp.AutoTPError) as error:
        model.resize_token_embeddings(48)
    stepped(model, 40)
    return str(error.value)


@pytest.mark.sweep
def test_under_fsdp(pool: Pool) -> None:
    assert all("FSDP has its parameters" in text for text in pool.run(under_fsdp, world=4))
