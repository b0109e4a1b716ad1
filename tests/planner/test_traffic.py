"""The collectives that a plan counts are those that run: what enters regions from one tensor is one, a layer norm has two statistics."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.plan.plan import Plan
from autotp.rewrite.collectives.comm import GroupComm
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.architectures.spec import Position, Projection, QKNorm
from autotp.testing.equivalence.observe import weighted
from autotp.testing.outputs import tensors_of
from autotp.testing.ranks.threads import ThreadRanks

SMALL = Architecture(kv=4, group=1, vocab=64, loss=False)
CASES = {
    "llama": SMALL,
    "one_tensor_for_both": replace(SMALL, parallel=True, projection=Projection.INTERLEAVED),
    "layer_norms_over_heads": replace(SMALL, qk_norm=QKNorm.FULL, layer_norm=True, position=Position.NONE),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_counted_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, ran, phase = CASES[name], Counter[tuple[str, str]](), ["forward"]
    reduce, gather = GroupComm.all_reduce_, GroupComm.all_gather

    def all_reduce(self: GroupComm, tensor: torch.Tensor) -> torch.Tensor:
        ran["all_reduce", phase[0]] += self.rank == 0
        return reduce(self, tensor)

    def all_gather(self: GroupComm, tensor: torch.Tensor) -> list[torch.Tensor]:
        ran["all_gather", phase[0]] += self.rank == 0
        return gather(self, tensor)

    monkeypatch.setenv("AUTOTP_CHECK_INPUTS", "never")  # comparing inputs gathers too
    monkeypatch.setattr(GroupComm, "all_reduce_", all_reduce)
    monkeypatch.setattr(GroupComm, "all_gather", all_gather)

    def train() -> Plan:
        model = autotp.parallelize(a.build(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), example_inputs=a.inputs())
        dist.barrier()
        ran.clear()
        dist.barrier()
        total = weighted(tensors_of(model(**a.inputs())))
        dist.barrier()
        phase[0] = "backward"
        assert total is not None
        total.backward()
        return autotp.plan_of(model)

    ranks = ThreadRanks(2, turns=True)
    plan = ranks.run(train)[0]
    ranks.stop()
    assert Counter((c.kind, c.when) for c in plan.collectives()) == +ran
