"""Training states that are saved at one tp and resumed at another give what was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

import autotp
from autotp.checkpoint.state import load, save
from benchmarks.optimizers import build
from tests.checkpoint.training import (
    OPTIMIZERS,
    apart,
    barrier,
    grouped,
    mesh_of,
    moments,
    parallel,
    plain_moments,
    train,
)
from tests.support.ranks import Pool

KINDS = ("even", "fused", "shared", "padded")
CHAIN = (2, 4, 3, 1)
STEPS = 2


def resumed(kind: str, optimizer: str, folder: str) -> list[dict[str, float]]:
    """Train at each tp of CHAIN after loading what the one before saved; errors against one uninterrupted device."""
    found = []
    reference = build(kind)
    whole = OPTIMIZERS[optimizer](grouped(reference))
    for i, tp in enumerate(CHAIN):
        mesh, steps = mesh_of(tp), range(i * STEPS, i * STEPS + STEPS)
        train(reference, whole, steps)
        if dist.get_rank() < tp:
            model = parallel(kind, tp, fresh=i > 0)
            mine = OPTIMIZERS[optimizer](grouped(model))
            group = mesh.get_group()
            if i:
                load(model, mine, f"{folder}/{i - 1}", group=group)
            train(model, mine, steps)
            save(model, mine, f"{folder}/{i}", group=group)
            full = {n: p.detach() for n, p in model.named_parameters()} if tp == 1 else autotp.full_state_dict(model)
            weights = {n: full[n] for n, _ in reference.named_parameters()}
            found.append(
                {
                    "weights": apart({n: p.detach() for n, p in reference.named_parameters()}, weights),
                    "moments": apart(plain_moments(reference, whole), moments(model, mine)),
                }
            )
        barrier()
    return found


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_other_tps(pool: Pool, tmp_path: Path, kind: str, optimizer: str) -> None:
    for rank in pool.run(resumed, kind, optimizer, str(tmp_path), world=4):
        assert all(error <= 1e-9 for errors in rank for error in errors.values()), rank
