"""The work of one rank with the width of experts cut, and with whole experts: `python -m benchmarks.experts [--ranks 8] [--tokens 256]`.

A mixture of experts of transformers runs forward and backward in float32 on one thread, as the part of one rank: all experts with a
`ranks`-th of their width, or a `ranks`-th of the experts with the pairs that are routed to them. Both move the same bytes, so only CPU
time is measured. Pairs are routed evenly, or half of the tokens' first slots go to one expert, and the rank is the one that has it.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autotp.rewrite.modules.pairs import pick, put_back

HIDDEN, EXPERTS, SLOTS = 256, 16, 2
WIDTHS = (128, 256, 512, 1024, 2048, 4096)


def experts(number: int, width: int, how: str) -> Any:
    """A mixture of experts with random weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=width, num_local_experts=number)
    config._experts_implementation = how
    made = MixtralExperts(config)
    for p in made.parameters():
        nn.init.normal_(p, std=0.02)
    return made


def of_its_experts(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Runs the pairs of a rank's whole experts."""
    picked = pick(index, 0, module.num_experts)
    rows = module(x[picked.token], picked.local[:, None], weights[picked.token, picked.slot][:, None])
    return put_back(rows, picked, len(x))


def milliseconds(run: Any, x: Tensor, index: Tensor, weights: Tensor) -> float:
    """CPU time of a forward and backward, the least of several."""
    found = []
    for _ in range(7):
        started = time.process_time()
        run(x, index, weights).sum().backward()
        found.append(time.process_time() - started)
    return 1000 * min(found)


def routed(tokens: int, skewed: bool) -> Tensor:
    """The experts of each token."""
    index = torch.stack([torch.randperm(EXPERTS)[:SLOTS] for _ in range(tokens)])
    if skewed:
        index[: tokens // 2, 0] = 0
    return index


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table("computed by", "width of a rank's products", "cut, ms", "whole, ms", "whole and skewed, ms")
    x, weights = torch.randn(given.tokens, HIDDEN, requires_grad=True), torch.rand(given.tokens, SLOTS)
    even, skewed = routed(given.tokens, False), routed(given.tokens, True)
    for how in ("eager", "grouped_mm"):
        for width in WIDTHS:
            cut, whole = experts(EXPERTS, width // given.ranks, how), experts(EXPERTS // given.ranks, width, how)
            times = [milliseconds(cut, x, even, weights)]
            times += [milliseconds(lambda *a, m=whole: of_its_experts(m, *a), x, index, weights) for index in (even, skewed)]
            table.add_row(how, f"{width // given.ranks} or {width}", *(f"{t:.1f}" for t in times))
    Console().print(table)


if __name__ == "__main__":
    main()
