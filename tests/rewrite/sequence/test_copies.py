"""Copies of a model share its group; what a call leaves to be done at its end is done at the end of that call."""

from __future__ import annotations

import copy

import torch

import autotp
from autotp.rewrite.entry import ENTRY
from tests.support.families import transformer
from tests.support.ranks import Pool, mesh

IDS = torch.arange(16).view(2, 8)


def left(_: object = None) -> tuple[list[int], float]:
    """How much each of a model and its copy has left to do after calls of the copy, and of the model; how far their gradients are apart."""
    torch.manual_seed(0)
    model = transformer("llama").double().train()
    autotp.parallelize(model, mesh(), sequence_parallel=True, check="graph")
    copied = copy.deepcopy(model)
    found = []
    for each in (copied, model):
        each(IDS, labels=IDS).loss.backward()
        found += [len(m.__dict__[ENTRY].running.at_end) + len(m.__dict__[ENTRY].comm.running.at_end) for m in (model, copied)]
    pairs = zip(autotp.full_grads(model).values(), autotp.full_grads(copied).values(), strict=True)
    return found, max(float((a - b).abs().max()) for a, b in pairs)


def test_calls_of_a_copy_leave_nothing_behind(pool: Pool) -> None:
    for found, apart in pool.run(left):
        assert found == [0, 0, 0, 0] and apart < 1e-9
