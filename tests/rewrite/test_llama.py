"""A hand-written plan on a tiny llama, two real ranks: same outputs, gradients, tokens, state dict; and back again."""

from __future__ import annotations

import copy

import pytest
import torch

from autotp.rewrite.parameters.full import full_state_dict
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from tests.rewrite.plans import error, llama_plan, rewrite, tiny_llama, worst_grad
from tests.support.ranks import Pool

IDS = torch.tensor([[1, 5, 9, 63, 31, 32], [2, 3, 4, 40, 3, 8]])


def run_all(bias: bool, tied: bool) -> dict[str, float]:
    reference, model = tiny_llama(bias=bias, tied=tied), tiny_llama(bias=bias, tied=tied)
    params, modules = llama_plan(model, 2)
    cls, keys = type(model), list(model.state_dict())
    comm, _ = rewrite(model, params, modules)
    assert type(model) is cls and list(model.state_dict()) == keys
    assert all(type(p) is LayoutDTensor for p in model.parameters())
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    errors = {}
    with torch.no_grad():
        errors["inference"] = error(reference(IDS).logits, model(IDS).logits)
    a, b = reference(IDS, labels=IDS), model(IDS, labels=IDS)
    errors["forward"] = error(a.logits, b.logits)
    errors["loss"] = error(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    errors["grad"] = worst_grad(reference, model, params, comm)
    full = full_state_dict(model, params, comm)
    assert list(full) == keys
    errors["state"] = float(not all(torch.equal(full[k], v) for k, v in reference.state_dict().items()))
    same = reference.generate(IDS, max_new_tokens=8, do_sample=False), model.generate(IDS, max_new_tokens=8, do_sample=False)
    errors["generate"] = float(not torch.equal(*same))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight._local_tensor.zero_()
        errors["deepcopy"] = error(model(IDS).logits, reference(IDS).logits)
        assert not twin(IDS).logits.any()
    assert "Linear(" in repr(model) and isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert len(comm.memo) == 0
    return errors


@pytest.mark.parametrize(("bias", "tied"), [(False, False), (True, False), (False, True)])
def test_llama(pool: Pool, bias: bool, tied: bool) -> None:
    for errors in pool.run(run_all, bias, tied):
        assert all(e <= 1e-9 for e in errors.values()), errors


def undo_and_error() -> None:
    reference, model = tiny_llama(), tiny_llama()
    before = {n: (type(m), dict(m.__dict__), dict(m._parameters), len(m._forward_hooks)) for n, m in model.named_modules()}

    def unchanged() -> bool:
        return all(
            (type(m), m.__dict__.keys(), m._parameters, len(m._forward_hooks)) == (c, d.keys(), p, h)
            and all(m._parameters[k] is v for k, v in p.items())
            for (n, m), (c, d, p, h) in zip(model.named_modules(), before.values(), strict=True)
        )

    params, modules = llama_plan(model, 2)
    _, undo = rewrite(model, params, modules)
    assert not unchanged()
    undo.undo()
    assert unchanged()
    assert torch.equal(reference(IDS).logits, model(IDS).logits)

    from autotp.rewrite.apply import apply
    from autotp.rewrite.collectives.comm import DryComm

    calls = []

    def failing(name, old, layout):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == 5:
            raise MemoryError("no room")
        return torch.nn.Parameter(layout.shard(old.detach(), 0))

    with pytest.raises(MemoryError):
        apply(model, params, modules, comm=DryComm(2), make_param=failing)
    assert unchanged()


def test_undo_restores_everything(pool: Pool) -> None:
    pool.run(undo_and_error)


def collectives_of_a_step() -> list[int]:
    """All-reduces forward, backward of one step."""
    import torch.distributed as dist

    model = tiny_llama(layers=3)
    params, modules = llama_plan(model, 2)
    rewrite(model, params, modules)
    counts, original = [0], dist.all_reduce

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        counts[-1] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        loss = model(IDS, labels=IDS).loss
        counts.append(0)
        loss.backward()
    finally:
        dist.all_reduce = original
    return counts


def test_the_number_of_collectives_is_megatrons(pool: Pool) -> None:
    assert pool.run(collectives_of_a_step)[0] == [2 * 3 + 1, 2 * 3 + 1]


def dry_run() -> None:
    """No process group values: plain local parameters on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from autotp.rewrite.apply import apply
    from autotp.rewrite.collectives.comm import DryComm

    model = tiny_llama()
    params, modules = llama_plan(model, 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        apply(model, params, modules, comm=DryComm(2),
              make_param=lambda name, old, layout: torch.nn.Parameter(mode.from_tensor(layout.shard(old.detach(), 0))))  # fmt: skip
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.shape == (24, 32)


def test_dry_run() -> None:
    dry_run()
