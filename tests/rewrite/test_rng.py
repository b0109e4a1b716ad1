"""Sampling and replicated dropout agree between ranks whose generators differ."""

from __future__ import annotations

import copy
import inspect

import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.rewrite.rng import install_generate
from tests.rewrite.plans import llama_plan, rewrite, tiny_llama, tp_mesh
from tests.support.ranks import Pool

IDS = torch.tensor([[1, 5, 9]])


def sample() -> list[list[int]]:
    model = tiny_llama()
    plain = type(model).generate
    params, modules = llama_plan(model, 2)
    comm, undo = rewrite(model, params, modules)
    install_generate(model, comm, undo)
    tokens = []
    for m in (model, copy.deepcopy(model)):
        torch.manual_seed(dist.get_rank())
        tokens.append(m.generate(IDS, max_new_tokens=12, do_sample=True, top_k=0)[0].tolist())
    assert model.generate.__name__ == "generate" and inspect.signature(model.generate) == inspect.signature(plain.__get__(model))
    undo.undo()
    assert "generate" not in model.__dict__ and not model._forward_pre_hooks
    return tokens


def test_sampling_agrees(pool: Pool) -> None:
    first, second = pool.run(sample)
    assert first == second
    assert first[0] == first[1]


def dropout() -> list[bool]:
    model = autotp.parallelize(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), tp_mesh(), example_inputs={"input": torch.ones(3, 4)})
    torch.manual_seed(dist.get_rank())
    return (model(torch.ones(3, 4)) == 0).flatten().tolist()


def test_dropout_masks_agree(pool: Pool) -> None:
    first, second = pool.run(dropout)
    assert first == second


class Recurrent(nn.Module):
    """Drops between the layers of an LSTM, which is no dropout module."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.up, self.down = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.5), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, _ = self.lstm(x)
        return h, self.down(self.up(h).relu())


def dropout_of_a_layer() -> list[float]:
    torch.manual_seed(0)
    x = torch.ones(2, 5, 8)
    model = autotp.parallelize(Recurrent(), tp_mesh(), example_inputs={"x": x}, check="graph")
    torch.manual_seed(dist.get_rank())
    return model.train()(x)[0].detach().flatten().tolist()


def test_masks_of_layers_with_a_probability_agree(pool: Pool) -> None:
    first, second = pool.run(dropout_of_a_layer)
    assert first == second
