"""Hand-written models: equal, and really sharded."""

from __future__ import annotations

import copy

import pytest
import torch

import autotp
from tests.models.custom import CUSTOM, VOCAB, Language
from tests.models.entry import Entry
from tests.support.equivalence import check, error_of
from tests.support.ranks import Pool, mesh

CASES = [pytest.param(entry, world, id=f"{entry}-{world}") for entry in CUSTOM for world in entry.worlds]


@pytest.mark.parametrize(("entry", "world"), CASES)
def test_custom(pool: Pool, entry: Entry, world: int) -> None:
    aspects = ("forward", "grad", "state_dict", "step")
    report = check(pool, entry.factory, entry.inputs, world=world, aspects=aspects)
    report.require(*aspects)
    assert not set(entry.kept) & report.sharded
    assert set(entry.shards) <= report.sharded


def untraced_loss() -> None:
    """On one rank: a loss that `example_inputs` did not ask for, and its gradients."""
    torch.manual_seed(0)
    plain = Language().double()
    parallel = copy.deepcopy(plain)
    ids, targets = (torch.randint(VOCAB, (2, 6)) for _ in range(2))
    autotp.parallelize(parallel, mesh(), example_inputs={"i": ids})
    assert autotp.plan_of(parallel).params["a.weight"].layout.dim is not None
    (wanted, loss), (got, same) = plain(ids, targets), parallel(ids, targets)
    assert error_of(wanted, got) < 1e-9 and error_of(loss, same) < 1e-9
    loss.backward()
    same.backward()
    grads = autotp.full_grads(parallel)
    assert all(error_of(p.grad, grads[name]) < 1e-9 for name, p in plain.named_parameters())


@pytest.mark.parametrize("world", [2, 3])
def test_a_loss_that_no_traced_call_computed(pool: Pool, world: int) -> None:
    pool.run(untraced_loss, world=world)
