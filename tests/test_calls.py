"""Calls of a model that its plain forward does not make: a loss behind a flag, features of one kind of input, attention weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.inputs.paths import example_inputs
from autotp.numeric.exact import DOUBLE
from autotp.testing.equivalence.observe import weighted
from autotp.testing.outputs import tensors_of
from autotp.testing.ranks.run import run
from autotp.testing.tiny.models import tiny_config, tiny_model

Call = Callable[[nn.Module], Any]


def observed(model: nn.Module, call: Call, grads: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Every tensor of a call's result, and the gradients of a weighting of them."""
    model.zero_grad(set_to_none=True)
    with DOUBLE.mode():
        outputs = tensors_of(call(model))
    total = weighted(outputs)
    assert total is not None
    total.backward()
    return {k: t.detach() for k, t in outputs.items()} | {f"gradient of {n}": g.clone() for n, g in grads(model).items()}


def assert_calls_equal(model: nn.Module, calls: dict[str, Call], *, tp: int = 2, backend: str = "local", inputs: Any = None) -> autotp.Plan:
    """Each call gives the same on one device and on every rank."""
    plain = lambda m: {n: p.grad for n, p in m.named_parameters() if p.grad is not None}  # noqa: E731
    fresh = copy.deepcopy(model)  # a call may leave hooks that no pickle takes
    wanted = {name: observed(model, call, plain) for name, call in calls.items()}

    def rank(_: object) -> Any:
        parallel = copy.deepcopy(fresh)
        autotp.parallelize(parallel, init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)), example_inputs=inputs, check="graph")
        return autotp.plan_of(parallel), {name: observed(parallel, call, autotp.full_grads) for name, call in calls.items()}

    ranks = run(backend, rank, None, tp, 300.0)
    for _, found in ranks:
        for name, tensors in wanted.items():
            assert found[name].keys() == tensors.keys()
            floor = 1e-6 * max(float(t.abs().max()) for k, t in tensors.items() if k.startswith("gradient") and t.numel())
            for key, tensor in tensors.items():
                scale = max(float(tensor.abs().max()), floor if key.startswith("gradient") else 0.0)
                assert found[name][key].shape == tensor.shape, f"{name}: {key}"
                assert float((found[name][key] - tensor).abs().max()) <= 1e-9 * scale, f"{name}: {key}"
    return ranks[0][0]


def transformer(kind: str, attention: str | None = None) -> nn.Module:
    return tiny_model(tiny_config(kind), attn_implementation=attention).double()


def towers(model: nn.Module) -> dict[str, Call]:
    """The plain call, the loss, attention weights, and every method that answers one kind of input."""

    def cast(inputs: dict[str, object]) -> dict[str, Any]:
        return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}

    named = {e.name: e for e in example_inputs(model)}
    chosen = [n for n in named if n in ("forward", "return_loss", "attentions") or n.endswith("_features")]
    made = {n: (named[n].method or "__call__", cast(named[n].make())) for n in chosen}
    return {n: lambda m, call=call, inputs=inputs: getattr(m, call)(**inputs) for n, (call, inputs) in made.items()}


MORE = ("siglip", "altclip", "clipseg", "owlvit", "metaclip_2", "siglip2", "chinese_clip", "xclip", "flava")


@pytest.mark.parametrize("kind", ["clip", *(pytest.param(k, marks=pytest.mark.slow) for k in MORE)])
def test_two_towers(kind):
    model = transformer(kind)
    calls = towers(model)
    assert {"forward", "get_text_features"} <= calls.keys()
    assert ("return_loss" in calls) == (kind != "flava")
    plan = assert_calls_equal(model, calls)
    assert plan.local_share < 0.7
    assert not [note for note in plan.notes if "not traced" in note]


def test_features_of_images_in_text():
    model = transformer("llava")
    calls = towers(model)
    assert "get_image_features" in calls
    assert_calls_equal(model, calls)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("falcon", "sdpa"), ("gpt2", "eager"), *(pytest.param(k, "eager", marks=pytest.mark.slow) for k in ("falcon", "bart"))],
)
def test_attention_weights_are_whole(kind, attention):
    """falcon computes them for whoever asks, whatever attention it runs."""
    model = transformer(kind, attention)
    ids = torch.arange(10).view(2, 5)
    more = {"decoder_input_ids": ids} if kind == "bart" else {}
    plan = assert_calls_equal(
        model, {"weights": lambda m: m(input_ids=ids, output_attentions=True, **more), "none": lambda m: m(input_ids=ids, **more)}
    )
    assert plan.local_share < 0.6


class Towers(nn.Module):
    """Two towers of one width in code of the model itself; what the flag does is in no traced call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)) for _ in range(2))
        self.a, self.b = nn.Linear(16, 64, bias=False), nn.Linear(16, 64, bias=False)

    def forward(self, x: Tensor, y: Tensor, more: bool = False) -> dict[str, Tensor]:
        a = F.normalize(self.a(self.left(x)), dim=-1)
        b = F.normalize(self.b(self.right(y)), dim=-1)
        scores = a @ b.mT
        found = {"a": a, "b": b, "scores": scores}
        if more:
            found["loss"] = F.cross_entropy(scores, torch.arange(len(scores))) + a.std(-1).mean()
        return found


class Picked(nn.Module):
    """Sums that are smaller where the model returns them than where they are made, by a module and by code of the model."""

    def __init__(self, alone: bool = True) -> None:
        super().__init__()
        self.alone = alone
        torch.manual_seed(0)
        self.w, self.u = nn.Parameter(torch.randn(32, 16) / 4), nn.Parameter(torch.randn(16, 32) / 4)
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))

    def forward(self, x: Tensor, more: bool = False) -> tuple[Tensor, ...]:
        h = self.inner(x)
        g = F.linear(F.gelu(F.linear(x, self.w)), self.u) if self.alone else h + x
        found = (h[:, 0], g[:, 0])
        return (*found, h.square().mean(), g.exp().mean()) if more else found


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("model", [Towers, Picked])
def test_a_branch_of_the_model_that_no_call_took_meets_whole_values(model, wrapped):
    torch.manual_seed(1)
    inputs = {"x": torch.randn(3, 16, dtype=torch.float64)} if model is Towers else {"x": torch.randn(3, 5, 16, dtype=torch.float64)}
    inputs |= {"y": torch.randn(3, 16, dtype=torch.float64)} if model is Towers else {}
    made = Wrapped(Towers() if model is Towers else Picked(alone=False)) if wrapped else model()
    for tp in (2, 3):
        plan = assert_calls_equal(
            made.double(), {"traced": lambda m: m(**inputs), "more": lambda m: m(**inputs, more=True)}, tp=tp, inputs=inputs
        )
        assert plan.local_share < (1 if wrapped and model is Picked else 0.76)


@pytest.mark.sweep
def test_a_branch_of_the_model_that_no_call_took_over_processes():
    torch.manual_seed(1)
    inputs = {name: torch.randn(3, 16, dtype=torch.float64) for name in "xy"}
    assert_calls_equal(Towers().double(), {"more": lambda m: m(**inputs, more=True)}, tp=3, backend="gloo", inputs=inputs)
