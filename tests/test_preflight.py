"""Models that differ between ranks are refused with what differs."""

from __future__ import annotations

import logging
import uuid

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from tests.support.ranks import Pool, mesh


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.register_buffer("m", torch.eye(4).to_sparse())
        self.scales = [1.0, 2.0]

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.n(x))) * self.scales[0])


def _other(model: nn.Module, how: str) -> None:
    with torch.no_grad():
        match how:
            case "constant":
                nn.init.constant_(model.n.weight, 3.0)
            case "permuted":
                model.a.weight.copy_(model.a.weight.flip(0))
            case "two signs":
                model.a.weight[0, :2] *= -1
            case "attribute":
                model.n.eps = 1e-3
            case "name":
                model.label = "another"
            case "list":
                model.scales[1] = 3.0
            case "class":
                model.n = nn.RMSNorm(16)
            case "frozen":
                model.a.weight.requires_grad_(False)
            case "sparse buffer":
                model.m = model.m * 2


HOW = {
    "constant": "the tensor n.weight",
    "permuted": "the tensor a.weight",
    "two signs": "the tensor a.weight",
    "attribute": r"the attribute eps of n on rank 1 is not what it is on rank 0 \(0.001 and 1e-05\)",
    "name": r"the attribute label of the model on rank 1 is not what it is on rank 0 \('another' and 'one'\)",
    "list": "the attribute scales of the model",
    "class": "the class of n",
    "frozen": "the tensor a.weight",
    "sparse buffer": "the tensor m",
}


def build(how: str) -> str:
    torch.manual_seed(0)
    model = Net()
    model.rank = dist.get_rank()  # each rank's own number is no difference
    model.key, model.label = str(uuid.uuid4()), "one"  # nor is a name that is random by intention
    model.log = logging.getLogger("autotp.tests.net")  # nor what a rank says
    model.log.setLevel(10 * dist.get_rank())
    if dist.get_rank():
        _other(model, how)
    try:
        autotp.parallelize(model, mesh(), example_inputs={"x": torch.randn(2, 16)})
    except autotp.AutoTPError as error:
        return str(error)
    return "" if autotp.plan_of(model).local_share < 0.7 else "nothing is sharded"


@pytest.mark.filterwarnings("ignore:Sparse")
def test_other_models_are_refused_on_every_rank(pool: Pool) -> None:
    import re

    assert pool.run(build, "same") == ["", ""]
    for how, wanted in HOW.items():
        first, second = pool.run(build, how)
        assert first == second and re.search(wanted, first), (how, first)
