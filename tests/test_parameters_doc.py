"""docs/parameters.md is true: each of its blocks runs on ranks and on one device, and the loss, gradients and parameters are the same."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch

import autotp
from tests.composition.training import Data
from tests.rewrite.parameters import uses
from tests.support.ranks import Pool, mesh

PAGE = Path(__file__).parent.parent / "docs" / "parameters.md"


def run(block: str, kind: str) -> dict[str, float]:
    """How far apart the numbers are."""
    alone = uses.build(kind, eager=True)
    models = [alone, autotp.parallelize(copy.deepcopy(alone), mesh(), check="graph")]
    found: list[dict[str, Any]] = []
    for model in models:
        torch.manual_seed(3)
        names: dict[str, Any] = {"model": model, "ids": Data(1).ids(0), "torch": torch}
        exec(block, names)
        numbers = dict(model.named_parameters()) | {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({n: uses.whole(x) for n, x in (numbers | {"loss": names.get("loss", 0.0)}).items()})
    return uses.apart(*found)


def test_page(pool: Pool) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        for far in pool.run(run, block, "tied"):
            assert max(far.values()) <= 1e-9, (block, far)
