"""Under dispatch modes and saved-tensor hooks: what a mode has seen is not changed afterwards."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import autotp
from autotp.rewrite.collectives.comm import keeps_results
from autotp.testing.ranks.run import run
from tests.support.ranks import Pool, mesh
from tests.support.side_by_side import equal

ATEN = torch.ops.aten


def every(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


SAVED: dict[str, Any] = {
    "mm": lambda: [ATEN.mm.default],
    "addmm": lambda: [ATEN.mm.default, ATEN.addmm.default],
    "lookups": lambda: [ATEN.embedding.default, ATEN.index_select.default],
    "linear": lambda: [ATEN.linear.default],
    "all": lambda: every,
}
IDS = torch.arange(12).view(2, 6)


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.n, self.gate, self.up = nn.LayerNorm(16), nn.Linear(16, 24, bias), nn.Linear(16, 24, bias)
        self.down = nn.Linear(24, 16, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]


class Saved(nn.Module):
    """Blocks between an embedding with sharded rows and a head, run under `how`."""

    def __init__(self, how: str, bias: bool) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(64, 16), nn.ModuleList(Block(bias) for _ in range(2)), nn.Linear(16, 64, bias)
        self.how = how

    def run(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.run(ids)
        if self.how == "flops":
            with FlopCounterMode(display=False):
                return self.run(ids)
        if self.how == "on the CPU":
            with torch.autograd.graph.save_on_cpu():
                return self.run(ids)
        if self.how == "checkpoint":
            return checkpoint(self.run, ids, use_reentrant=False)  # type: ignore[no-any-return]
        contexts = functools.partial(create_selective_checkpoint_contexts, SAVED[self.how]())
        return checkpoint(self.run, ids, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", [*SAVED, "checkpoint", "flops", "on the CPU"])
def test_what_a_mode_keeps(how: str, bias: bool) -> None:
    assert equal(lambda: Saved(how, bias), {"ids": IDS})


@pytest.mark.parametrize("how", ["mm", "all"])
def test_selective_checkpoints_in_processes(pool: Pool, how: str) -> None:
    assert equal(functools.partial(Saved, how, True), {"ids": IDS}, pool=pool)


def test_results_are_kept_under_a_mode_only() -> None:
    assert not keeps_results()
    with FlopCounterMode(display=False):
        assert keeps_results()


class Mixed(nn.Module):
    """Code that shows dtypes: a row-parallel Linear with a bias, a norm over a sharded dim, a write into another tensor."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.n = {"layer": nn.LayerNorm(24), "rms": nn.RMSNorm(24), "": nn.Identity()}[norm]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.n(self.a(x))
        y = self.b(F.gelu(h))
        z = torch.zeros(12, 16, dtype=y.dtype).index_add(0, torch.arange(12), y.flatten(0, 1))
        return z, y


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own, of one device too
@pytest.mark.parametrize("norm", ["layer", "rms", ""])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_autocast_gives_the_dtypes_of_one_device(norm: str, grad: bool, mixed: bool) -> None:
    torch.manual_seed(0)
    whole, x = Mixed(norm), torch.randn(2, 6, 16)

    def dtypes(model: nn.Module) -> list[Any]:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            z, y = model(x)
        if grad:
            (z.float() + y.float().flatten(0, 1)).pow(2).sum().backward()
        return [z.dtype, y.dtype, *(p.grad.dtype for p in model.parameters() if grad and p.grad is not None)]

    wanted = dtypes(copy.deepcopy(whole))

    def rank(_: object) -> list[Any]:
        model = autotp.parallelize(copy.deepcopy(whole), mesh(), example_inputs={"x": x}, check="graph")
        return dtypes(model)

    assert all(found == wanted for found in run("local", rank, None, 2, 60.0))
    assert (torch.bfloat16 in wanted) is mixed  # the control


class Normed(nn.Module):
    """A norm over a sharded dim whose inputs are so small that its ε shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False), nn.RMSNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x * 1e-3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_default_epsilon_is_that_of_one_device(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole, x = Normed().to(dtype), torch.randn(2, 6, 16, dtype=dtype)
    wanted = whole(x).detach()

    def rank(_: object) -> float:
        model = autotp.parallelize(copy.deepcopy(whole), mesh(), example_inputs={"x": x}, check="graph")
        assert autotp.plan_of(model).local_share < 0.6
        return float((model(x).detach() - wanted).abs().max() / wanted.abs().max())

    assert max(run("local", rank, None, 2, 60.0)) < 16 * torch.finfo(dtype).eps
