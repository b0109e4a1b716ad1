"""The collectives that a plan counts are those that run: what enters regions from one tensor is one, a layer norm has two statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.plan.plan import Plan
from autotp.rewrite.collectives.comm import GroupComm
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.architectures.spec import Position, Projection, QKNorm
from autotp.testing.equivalence.observe import weighted
from autotp.testing.outputs import tensors_of
from autotp.testing.ranks.threads import ThreadRanks
from tests.support.collectives import noted

SMALL = Architecture(kv=4, group=1, vocab=64, loss=False)


class Statistic(nn.Module):
    """A statistic over the width that is sharded."""

    def __init__(self, statistic: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.statistic = nn.Linear(8, 32), nn.Linear(32, 8), statistic

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h * torch.sigmoid(self.statistic(h)))


X = {"x": torch.randn(2, 3, 8)}
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "deviations": lambda h: h.std(-1, keepdim=True),
    "variances": lambda h: h.var(-1, keepdim=True),
    "lengths": lambda h: h.norm(dim=-1, keepdim=True),
    "means": lambda h: h.mean(-1, keepdim=True),
}
CASES = {
    "llama": SMALL,
    "one_tensor_for_both": replace(SMALL, parallel=True, projection=Projection.INTERLEAVED),
    "layer_norms_over_heads": replace(SMALL, qk_norm=QKNorm.FULL, layer_norm=True, position=Position.NONE),
}


#: Drawn models whose hidden states are in token parts too.
IN_TOKENS = ["llama", "one_tensor_for_both"]


@pytest.mark.parametrize(("name", "tokens"), [*((name, False) for name in (*CASES, *STATISTICS)), *((name, True) for name in IN_TOKENS)])
def test_what_is_counted_is_what_runs(name: str, tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each collective, and each byte that tokens in parts send: no more than without, but for what products gather again."""
    ran, phase, sent = Counter[tuple[str, str]](), ["forward"], Counter[str]()
    build, inputs = (CASES[name].build, CASES[name].inputs()) if name in CASES else (partial(Statistic, STATISTICS[name]), X)

    def note(comm: GroupComm, kind: str, given: torch.Tensor, nbytes: int) -> None:
        ran[kind, phase[0]] += comm.rank == 0
        if given.ndim == 2:  # a message of rows
            sent[kind] += nbytes * (comm.rank == 0)

    monkeypatch.setenv("AUTOTP_CHECK_INPUTS", "never")  # comparing inputs gathers too

    def train() -> Plan:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        model = autotp.parallelize(build(), mesh, example_inputs=inputs, sequence_parallel=tokens)
        dist.barrier()
        ran.clear()
        dist.barrier()
        own = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
        total = weighted(tensors_of(model(**own)))
        dist.barrier()
        phase[0] = "backward"
        assert total is not None
        total.backward()
        return autotp.plan_of(model)

    ranks = ThreadRanks(2, turns=True)
    with noted(note):
        plan = ranks.run(train)[0]
    assert plan.local_share < 0.6
    ranks.stop()
    assert Counter((c.kind, c.when) for c in plan.collectives()) == +ran
    if tokens:
        count = next(iter(inputs.values())).numel()
        found = plan.collectives(tokens=count, dtype=torch.float64)
        width = {kind: sum(c.bytes for c in found if c.kind == kind) for kind in ("all_gather", "reduce_scatter")}
        logits = sum(t.width for t in plan.traffic if t.kind == "all_gather" and not t.tokens) * count * 8
        assert {k: n for k, n in sent.items() if k in width} == {k: n - logits * (k == "all_gather") for k, n in width.items()}
