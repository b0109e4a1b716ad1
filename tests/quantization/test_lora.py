"""LoRA on a quantized base trains as on one device: adapters are put on before `parallelize`, the base is quantized before or after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autotp
from tests.quantization.models import apart, build, config, failure, ids, quantized
from tests.support.ranks import Pool, mesh
from tests.support.slow import in_turns

pytest.importorskip("torchao")
pytest.importorskip("peft")


def base(module: nn.Module, path: str) -> bool:
    """The Linears of the base, but the head."""
    return isinstance(module, nn.Linear) and "lora_" not in path and not path.endswith("lm_head")


def with_adapters(model: nn.Module) -> Any:
    """The model with LoRA that is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    wanted = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=wanted, init_lora_weights=False)).train()  # type: ignore[arg-type]


def trained(model: Any, of: nn.Module, steps: int = 3) -> list[float]:
    """The losses of some steps of the parameters of `of`."""
    params = [p for p in of.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.9)
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids(step), labels=ids(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def beside_one_device(kind: str, name: str, order: str) -> dict[str, Any]:
    """Losses, gradients and adapters after three steps."""
    alone = with_adapters(quantized(build(kind), name, base))
    if order == "before":
        model = with_adapters(quantized(build(kind), name, base))
        inside = autotp.parallelize(model.get_base_model(), mesh(), check="graph")
    else:
        model = with_adapters(build(kind))
        inside = autotp.parallelize(model.get_base_model(), mesh(), check="graph")
        autotp.quantize_(inside, config(name), base)
    start = {n: t.clone() for n, t in autotp.full_state_dict(inside).items() if "lora_" in n}
    wanted, got = trained(alone, alone.get_base_model()), trained(model, inside)
    gradients = {n: p.grad for n, p in alone.get_base_model().named_parameters() if p.grad is not None}
    own = autotp.full_grads(inside)
    state, other = alone.get_base_model().state_dict(), autotp.full_state_dict(inside)
    adapters = [n for n in state if "lora_" in n]
    said = "" if order == "before" else failure(model.merge_adapter)  # torchao's own layer of peft is not there afterwards
    return {
        "merge": said,
        "losses": max(abs(a - b) for a, b in zip(wanted, got, strict=True)),
        "names": sorted(gradients) == sorted(own) and all("lora_" in n for n in own),
        "gradients": max(apart(g, own[n]) for n, g in gradients.items()),
        "adapters": max(apart(state[n], other[n]) for n in adapters),
        "learned": min(apart(start[n], other[n]) for n in adapters),
        "quantized": sum(type(p).__name__ == "QuantizedDTensor" for p in inside.parameters()),
    }


@pytest.mark.parametrize(
    ("of", "order"), in_turns([("even", "int8"), ("padded", "int4 asymmetric"), ("concatenated", "fp8")], ("before", "after"))
)
def test_lora_trains(pool: Pool, of: tuple[str, str], order: str) -> None:
    kind, name = of
    for found in pool.run(beside_one_device, kind, name, order, world=3 if kind == "padded" else 2):
        assert order == "before" or "on a quantized weight of a parallel model" in found["merge"]
        assert found["names"] and found["quantized"] >= 8
        assert found["losses"] <= 1e-5
        assert found["gradients"] <= 1e-4  # float32: the third step is of weights that two steps moved
        assert found["adapters"] <= 1e-5
        assert found["learned"] > 1e-3
