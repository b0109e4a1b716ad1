"""What a quantized weight of a parallel model does outside of forwards."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import autotp
from autotp.rewrite.parameters.quantized import QuantizedDTensor
from tests.composition.training import mesh_of
from tests.quantization.models import apart, build, config, failure, ids, mlp, parallel, parallel_mlp, quantized, states_differing
from tests.support.ranks import Pool, mesh

pytest.importorskip("torchao")


def both(name: str = "int8") -> tuple[Any, Any]:
    """The quantized model on one device, and over the ranks."""
    model = parallel(build("even"), "even", mesh())
    autotp.quantize_(model, config(name))
    return quantized(build("even"), name), model


def error(alone: nn.Module, model: nn.Module) -> float:
    """Of the logits."""
    with torch.no_grad():
        return apart(alone(ids()).logits, model(ids()).logits)


def copied() -> dict[str, float]:
    """Copies, moved models, states that go through files and come back."""
    alone, model = both()
    found = {"deepcopy": error(alone, copy.deepcopy(model)), "to": error(alone, copy.deepcopy(model).to("cpu"))}
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = parallel(build("even", seed=1), "even", mesh())
    autotp.quantize_(other, config("int8"))
    found["before"] = 1e-7 if error(alone, other) > 1e-2 else 1.0  # another model
    other.load_state_dict(torch.load(buffer, weights_only=True))
    found["a rank's state"] = error(alone, other)
    third = quantized(build("even", seed=2), "int8")
    other.load_state_dict(third.state_dict())
    found["the whole state of one device"] = error(third, other)
    other.load_state_dict(autotp.full_state_dict(model), assign=True)
    found["assigned"] = error(alone, other)
    alone.load_state_dict(autotp.full_state_dict(model))
    found["on one device"] = float(len(states_differing(alone.state_dict(), third.state_dict())) == 0)
    return found


def test_copies_and_states(pool: Pool) -> None:
    for found in pool.run(copied):
        assert max(found.values()) <= 1e-6, found


def read() -> list[Any]:
    alone, model = both()
    weight, whole = model.model.layers[0].mlp.down_proj.weight, alone.model.layers[0].mlp.down_proj.weight
    assert isinstance(weight, QuantizedDTensor) and not weight.requires_grad
    same = (
        torch.equal(weight.full_tensor().qdata, whole.qdata),
        torch.equal(weight.dequantize(), whole.dequantize()),
        torch.equal(weight.to_local().qdata, whole.qdata[:, model_rank() * 48 : (model_rank() + 1) * 48]),
        weight.shape == whole.shape and weight.dtype == whole.dtype,
        model.num_parameters() == alone.num_parameters(),
        "Int8Tensor" in repr(weight),
    )
    generated = [m.generate(ids(), max_new_tokens=5, do_sample=False) for m in (alone, model)]
    return [*same, torch.equal(*generated)]


def model_rank() -> int:
    """This rank."""
    return torch.distributed.get_rank()


def test_reading_and_generating(pool: Pool) -> None:
    assert pool.run(read) == [[True] * 7] * 2


def refused(folder: str) -> list[str]:
    """Everything that would compute with a part, or write one."""
    from torchao.quantization import quantize_

    _, model = both()
    plain = build("even")
    weight = model.lm_head.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    state = autotp.full_state_dict(model)
    found = [
        failure(lambda: weight * 2),
        failure(lambda: weight.sum()),
        failure(lambda: nn.functional.linear(torch.ones(1, 64), weight)),
        failure(lambda: model.load_state_dict(plain.state_dict())),
        failure(lambda: model.save_pretrained(folder, state_dict=state)),
        failure(lambda: model.save_pretrained(folder)),
        failure(lambda: autotp.save_pretrained(model, Path(folder) / "new")),
        failure(lambda: autotp.checkpoint.save(model, optimizer, Path(folder) / "state")),
        failure(lambda: autotp.quantize_(model, config("int8"))),
    ]
    other = parallel(plain, "even", mesh())
    found.append(failure(lambda: quantize_(other, config("int8"))))
    other.model.layers[0].mlp.up_proj._parameters["weight"] = nn.Parameter(state["model.layers.0.mlp.up_proj.weight"], False)
    found.append(failure(lambda: other(ids())))
    return found


def test_refusals(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(refused, str(tmp_path))
    assert first == second
    wanted = [
        "aten.mul.Tensor on a quantized weight",
        "aten.sum.default on a quantized weight",
        "on a quantized weight of a parallel model",
        "takes a weight that is quantized in the same way, got a Tensor of shape (64, 64), torch.float32",
        "save_pretrained would write a rank's part of quantized weights",
        "is not written by autotp.checkpoint.save or autotp.save_pretrained",
        "is not written by autotp.checkpoint.save or autotp.save_pretrained",
        "is not written by autotp.checkpoint.save or autotp.save_pretrained",
        "model.layers.0.self_attn.q_proj is quantized already",
        "call autotp.quantize_(model, config), or quantize before parallelize",
        "call autotp.quantize_(model, config), or quantize before parallelize",
    ]
    for got, part in zip(first, wanted, strict=True):
        assert part in got, got


def compiled(name: str) -> list[float]:
    """A compiled MLP, with gradients of the input where torchao gives them."""
    alone, model = quantized(mlp(96), name), parallel_mlp(mlp(96), mesh())
    autotp.quantize_(model, config(name))
    x = torch.randn(2, 5, 64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    a, b = alone(x), torch.compile(model, backend="aot_eager")(y)
    a.square().sum().backward(), b.square().sum().backward()
    return [apart(a, b), *([] if x.grad is None else [apart(x.grad, y.grad)])]


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["int8", "fp8", "int8 dynamic", "int4 rows dynamic"])
def test_compiled(pool: Pool, name: str) -> None:
    for found in pool.run(compiled, name, timeout=150):
        assert max(found) <= 1e-6


def with_fsdp() -> list[Any]:
    """FSDP beside it: quantized weights are left out, the others train as on one device."""
    over = mesh_of(2, 2)
    alone = quantized(build("even"), "int8").train()
    model = autotp.parallelize(build("even"), over, check="graph").train()
    autotp.quantize_(model, config("int8"))
    said = failure(lambda: autotp.fully_shard(copy.deepcopy(model), over))
    autotp.fully_shard(model, over, ignored_params={p for p in model.parameters() if not p.requires_grad})
    assert isinstance(model, FSDPModule)
    rank = over["dp"].get_local_rank()
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-4) for m in (alone, model)]
    for _ in range(2):
        loss = sum(alone(input_ids=ids(s), labels=ids(s)).loss for s in range(2)) / 2
        loss.backward()  # type: ignore[union-attr]
        model(input_ids=ids(rank), labels=ids(rank)).loss.backward()
        for step in steps:
            step.step(), step.zero_grad()
    state = autotp.full_state_dict(model)
    plain = {n: t for n, t in alone.state_dict().items() if type(t) is torch.Tensor}
    return [said, max(float((state[n] - t).abs().max()) for n, t in plain.items()), len(plain)]


def test_fsdp_leaves_quantized_weights_to_each_rank(pool: Pool) -> None:
    for said, difference, count in pool.run(with_fsdp, world=4):
        assert "FSDP does not shard quantized weights: call fully_shard(…, ignored_params=" in said
        assert difference <= 1e-6 and count >= 6
