"""Models with PEFT's adapters: one on one device, one over the ranks, adapted before or after `parallelize`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autotp
from autotp.numeric.exact import DOUBLE
from tests.composition.training import MODELS

_MESHES: dict[int, DeviceMesh] = {}
Pair = tuple[Any, Any]


def mesh_of(tp: int) -> DeviceMesh:
    """The mesh of the ranks of the pool."""
    if tp not in _MESHES:
        _MESHES[tp] = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    return _MESHES[tp]


def base(kind: str) -> Any:
    """The model without adapters, in float64."""
    name, options = MODELS[kind]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).double().eval()


def ids(seed: int = 3) -> Tensor:
    """A batch of tokens."""
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(seed))


def adapt(model: Any, name: str = "default", seed: int = 1, **options: Any) -> Any:
    """Put an adapter on: a LoRA of rank 4 whose second factor is not zero."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    # PEFT gives routers, whose weight no Linear holds, another weight in each forward
    targets = ["q_proj", "v_proj", "o_proj"] if hasattr(model.config, "num_local_experts") else "all-linear"
    config = LoraConfig(**{"r": 4, "target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options})
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)


def pair(kind: str, tp: int, when: str, put: Callable[..., Any] = adapt, **options: Any) -> Pair:
    """The adapted model on one device, and over the ranks: adapted `before` they share it or `after`."""
    one = put(base(kind), **options)
    if when == "before":
        return one, autotp.parallelize(put(base(kind), **options), mesh_of(tp), check="graph")
    shared = autotp.parallelize(base(kind), mesh_of(tp), check="graph")
    with torch.no_grad(), DOUBLE.mode():
        shared(ids())
    return one, put(shared, **options)


@contextmanager
def plannings() -> Iterator[list[int]]:
    """How often models are planned again inside."""
    import autotp.replan as replan

    counted, original = [0], replan.plan_again

    def counting(*args: Any) -> None:
        counted[0] += 1
        original(*args)

    replan.plan_again = counting
    try:
        yield counted
    finally:
        replan.plan_again = original


def apart(models: Pair) -> float:
    """The largest difference of their logits."""
    with torch.no_grad(), DOUBLE.mode():
        one, other = (m(input_ids=ids()).logits for m in models)
    return float((one - other).abs().max())


def train(models: Pair, steps: int = 3) -> float:
    """Trains both alike; the largest difference of norms and of all tensors."""
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    norms: list[float] = []
    for step in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            with DOUBLE.mode():
                model(input_ids=ids(step), labels=ids(step)).loss.backward()
            norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            optimizer.step()
            model.eval()
    wanted, found = models[0].state_dict(), autotp.full_state_dict(models[1])
    assert list(wanted) == list(found)
    assert all(type(t) is Tensor for t in found.values())
    weights = max(float((found[name] - t).abs().max()) for name, t in wanted.items())
    return max(weights, *(abs(a - b) for a, b in zip(norms[::2], norms[1::2], strict=True)))
