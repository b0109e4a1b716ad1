"""Predicted and measured times on this machine: `python -m benchmarks.advise [--sizes small medium] [--rounds 15]`.

The machine is calibrated first (`autotp calibrate`). Then llamas run over gloo ranks: a prefill, a token decoded when the cache is at its
longest, a training step with fused AdamW. Times are first quartiles, of the
slowest rank. The last column is predicted over measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

from autotp.launch import run_ranks, values
from benchmarks.subjects import llama

BATCH, PROMPT, NEW, SEQ = 1, 64, 8, 128


def _rank(emit: Callable[[Any], None], size: str, tp: int, rounds: int) -> dict[str, float]:
    import autotp

    model: Any = llama(size)
    if tp > 1:
        autotp.parallelize(model, init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)), check="graph")
    ids = torch.zeros(BATCH, PROMPT + NEW, dtype=torch.long)
    found: dict[str, list[float]] = {"prefill": [], "token": [], "step": []}

    def clock(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = run()
        found[name].append(time.perf_counter() - start)
        return out

    with torch.no_grad():
        for _ in range(rounds + 2):
            clock("prefill", lambda: model(input_ids=ids[:, :PROMPT], use_cache=True, logits_to_keep=1))
            cache = model(input_ids=ids[:, : PROMPT + NEW - 2], use_cache=True, logits_to_keep=1).past_key_values
            clock("token", lambda cache=cache: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.zeros(1, SEQ, dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    for _ in range(rounds + 2):
        clock("step", step)
    return {name: statistics.quantiles(times[2:], n=4)[0] for name, times in found.items()}


def main() -> None:
    """Run and print."""
    import autotp
    from autotp.advise.calibrate import calibrate
    from autotp.advise.option import Kind
    from autotp.advise.workload import Serve, Train

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["small", "medium"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    table = Table(title=f"milliseconds; prefill of {BATCH} × {PROMPT} tokens, training on 1 × {SEQ}")
    for column in ("llama", "tp", "", "predicted", "measured", "ratio"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "here.yaml"
        file.write_text(calibrate())
        for size in options.sizes:
            for tp in (1, 2):
                serving = autotp.advise(llama(size), Serve(BATCH, PROMPT, NEW, dtype="float32"), gpus=tp, gpu=str(file))
                training = autotp.advise(llama(size), Train(SEQ, SEQ, dtype="float32"), gpus=tp, gpu=str(file))
                steps = [s for a in (serving, training) for o in a.options if (o.tp, o.kind) == (tp, Kind.REPLICAS) for s in o.steps]
                ranks = values(run_ranks(_rank, tp, size, tp, options.rounds))
                for s in steps:
                    real = max(r[s.name] for r in ranks)
                    table.add_row(size, str(tp), s.name, f"{s.seconds * 1e3:.1f}", f"{real * 1e3:.1f}", f"{s.seconds / real:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
