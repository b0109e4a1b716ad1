"""Hand-written models: equal, and really sharded."""

from __future__ import annotations

import copy

import pytest
import torch

import autotp
from autotp.testing.equivalence.compare import error_of
from tests.models.custom import CUSTOM, VOCAB, InlineHead, Language
from tests.models.entry import Entry
from tests.support.pooled import PLAIN, equivalent
from tests.support.ranks import Pool, mesh

#: Each has one number of ranks in turn, every second of them in `make sweeps`; the other numbers are slow.
CASES = [
    pytest.param(
        entry,
        world,
        id=f"{entry}-{world}",
        marks=pytest.mark.slow if world != entry.worlds[number % len(entry.worlds)] else pytest.mark.sweep if number // 2 % 2 else (),
    )
    for number, entry in enumerate(CUSTOM)
    for world in entry.worlds
]


@pytest.mark.parametrize(("entry", "world"), CASES)
def test_custom(pool: Pool, entry: Entry, world: int) -> None:
    found = equivalent(pool, entry.factory, entry.inputs, tp=world, needs=PLAIN)
    assert not set(entry.kept) & found.sharded
    assert set(entry.shards) <= found.sharded


def untraced_loss(model: type[Language], sharded: bool) -> None:
    """On one rank: a loss that `example_inputs` did not ask for, and its gradients; every target is in each rank's part."""
    torch.manual_seed(0)
    plain = model().double()
    parallel = copy.deepcopy(plain)
    ids, targets = torch.randint(VOCAB, (2, 6)), torch.randint(VOCAB // 4, (2, 6))
    autotp.parallelize(parallel, mesh(), example_inputs={"i": ids}, check="graph")
    assert (autotp.plan_of(parallel).params["a.weight"].layout.dim is not None) == sharded
    (wanted, loss), (got, same) = plain(ids, targets), parallel(ids, targets)
    assert error_of(wanted.detach(), got.detach()) < 1e-9 and error_of(loss.detach(), same.detach()) < 1e-9
    loss.backward()
    same.backward()
    grads = autotp.full_grads(parallel)
    unused = {name for name, p in plain.named_parameters() if p.grad is None}
    assert all(error_of(p.grad, grads[name]) < 1e-9 for name, p in plain.named_parameters() if name not in unused)
    assert unused.isdisjoint(grads)


@pytest.mark.parametrize(("model", "sharded"), [(Language, True), (InlineHead, False)])
@pytest.mark.parametrize("world", [2, 3])
def test_a_loss_that_no_traced_call_computed(pool: Pool, world: int, model: type[Language], sharded: bool) -> None:
    pool.run(untraced_loss, model, sharded, world=world)
