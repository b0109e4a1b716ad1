"""Training as users do it: accumulation, clipping, fused AdamW, autograd.grad, checkpointing, autocast, frozen parameters."""

from __future__ import annotations

import pytest
import torch

from autotp.rewrite.parameters.full import full_state_dict
from tests.rewrite.plans import error, llama_plan, rewrite, tiny_llama, worst_grad
from tests.support.ranks import Pool
from tests.support.slow import swept

IDS = torch.tensor([[1, 5, 9, 63, 31, 32], [2, 3, 4, 40, 3, 8]])


def steps() -> dict[str, float]:
    reference, model = tiny_llama(bias=True, tied=True), tiny_llama(bias=True, tied=True)
    params, modules = llama_plan(model, 2)
    comm, undo = rewrite(model, params, modules)
    undo.release()
    norms = []
    for m in (reference, model):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True)
        for _ in range(2):
            for batch in (IDS, IDS.flip(1)):
                m(batch, labels=batch).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            optimizer.step()
            optimizer.zero_grad()
    full = full_state_dict(model, params, comm)
    errors = {k: error(v, full[k]) for k, v in reference.state_dict().items()}
    return {"weights": max(errors.values()), "norm": max(error(norms[0], norms[2]), error(norms[1], norms[3]))}


def test_two_steps_of_training(pool: Pool) -> None:
    for errors in pool.run(steps):
        assert all(e <= 1e-6 for e in errors.values()), errors  # the norms of llama run in float32


def variant(kind: str) -> float:
    reference, model = tiny_llama(bias=True), tiny_llama(bias=True)
    params, modules = llama_plan(model, 2)
    comm, _ = rewrite(model, params, modules)
    if kind == "autograd.grad":
        wanted = torch.autograd.grad(reference(IDS, labels=IDS).loss, list(reference.parameters()))
        got = torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters()))
        for p, g in zip(model.parameters(), got, strict=True):
            p.grad = g
        for p, g in zip(reference.parameters(), wanted, strict=True):
            p.grad = g
        return worst_grad(reference, model, params, comm)
    for m in (reference, model):
        if kind == "checkpoint":
            m.train()
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if kind == "frozen":
            for name, p in m.named_parameters():
                p.requires_grad_("o_proj" in name or "norm" in name)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = m(IDS, labels=IDS).loss
        loss.backward()
    return worst_grad(reference, model, params, comm)


@pytest.mark.parametrize(("kind", "limit"), [("autograd.grad", 1e-7), ("checkpoint", 1e-7), ("frozen", 1e-7), ("autocast", 0.2)])
def test_gradients(pool: Pool, kind: str, limit: float) -> None:
    for e in pool.run(variant, kind):
        assert e <= limit


@pytest.mark.filterwarnings("ignore")
def compiled(train: bool) -> float:
    torch._dynamo.reset()
    reference, model = tiny_llama(bias=True), tiny_llama(bias=True)
    params, modules = llama_plan(model, 2)
    comm, _ = rewrite(model, params, modules)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    if not train:
        with torch.no_grad():
            return error(reference(IDS).logits, run(IDS, use_cache=False).logits)
    reference(IDS, labels=IDS).loss.backward()
    run(IDS, labels=IDS, use_cache=False).loss.backward()
    return worst_grad(reference, model, params, comm)


@pytest.mark.parametrize("train", swept([False, True], False))
def test_compile_makes_one_graph(pool: Pool, train: bool) -> None:
    for e in pool.run(compiled, train, timeout=120.0):
        assert e <= 1e-7
