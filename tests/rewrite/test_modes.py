"""Under dispatch modes and saved-tensor hooks: what a mode has seen is not changed afterwards."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from autotp.rewrite.comm import keeps_results
from tests.support.ranks import Pool
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
