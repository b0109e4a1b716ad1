"""What autotp costs over hand-written tensor parallelism: `python -m benchmarks.overhead [--fake] [--fsdp] [--size small medium]`.

Every way runs the same llama in the same processes, one after the other in each round, so that a busy machine hits all of
them; the figure is the median over rounds of the ratio to the hand-written one. `--fake` replaces gloo by a process group
that does nothing: the ratio of CPU times, which is what a GPU has to hide. `--fsdp` trains each of them under FSDP2 too, on a mesh of
2 data-parallel × tp ranks: a forward and backward, and clipping with a step of AdamW. `--loss-parallel` and `--sequence-parallel` give both
that choice of placement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.megatron_sequence import SequenceParallel
from benchmarks.subjects import LOSS_PARALLEL, SEQUENCE_PARALLEL, SUBJECTS, sharded

Job = Callable[[], None]


#: What both are made with → how.
PLACED = {"loss-parallel": LOSS_PARALLEL, "sequence-parallel": SEQUENCE_PARALLEL}


def sharded_jobs(model: nn.Module, prompt: int) -> dict[str, Job]:
    """The two things that are timed under FSDP2."""
    ids = torch.arange(prompt).remainder(model.config.vocab_size).view(1, -1)  # type: ignore[union-attr, arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"train": train, "step": step}


def jobs(model: nn.Module, prompt: int, placed: str) -> dict[str, Job]:
    """The three things that are timed; training alone where a choice of placement is about that."""
    vocab = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.arange(prompt).remainder(vocab).view(1, -1)
    token = ids[:, :1]
    cache: Any = None

    def prefill() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def decode() -> None:
        nonlocal cache
        with torch.no_grad():
            if cache is None or cache.get_seq_length() > prompt + 64:
                cache = model(ids, use_cache=True).past_key_values
            for _ in range(8):
                model(token, past_key_values=cache, use_cache=True)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        if isinstance(model, SequenceParallel):
            model.finish()

    return {"prefill": prefill, "decode": decode, "train": train} if not placed else {"train": train}


class Count(TorchDispatchMode):
    """Collectives and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "c10d" in name and "wait" not in name and "barrier" not in name:
            self.calls += 1
            result = func(*args, **(kwargs or {}))
            self.bytes += max(sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in (*args, result))
            return result
        return func(*args, **(kwargs or {}))


def measure(size: str, names: list[str], rounds: int, prompt: int, fake: bool, fsdp: bool, placed: str) -> dict[str, Any]:
    """On one rank: {job: {name: {"ms", "ratio", "collectives", "bytes"}}}."""
    subjects = PLACED.get(placed, SUBJECTS)
    dp = 2 if fsdp else 1
    mesh = init_device_mesh("cpu", (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "tp"))
    work: dict[str, dict[str, Job]] = {}
    for name in names:
        try:
            model = subjects[name](size, mesh["tp"])
            work[name] = sharded_jobs(sharded(model, mesh["dp"]), prompt) if fsdp else jobs(model, prompt, placed)
            for job in work[name].values():
                job()
        except Exception as error:
            work.pop(name, None)
            if not fake:
                raise
            print(f"{name}: not measured: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    clock = time.process_time if fake else time.perf_counter
    result: dict[str, Any] = {}
    for kind in ("train", "step") if fsdp else ("train",) if placed else ("prefill", "decode", "train"):
        times: dict[str, list[float]] = {name: [] for name in work}
        for i in range(rounds):
            order = list(work) if i % 2 else list(reversed(work))
            for name in order:
                if not fake:
                    dist.barrier()
                start = clock()
                work[name][kind]()
                times[name].append(clock() - start)
        result[kind] = {}
        for name in work:
            with Count() as count:
                work[name][kind]()
            calls = 8 if kind == "decode" else 1
            result[kind][name] = {
                "ms": median(times[name]) * 1e3 / calls,
                "ratio": median(a / b for a, b in zip(times[name], times["by hand"], strict=True)),
                "collectives": count.calls // calls,
                "bytes": count.bytes // calls,
            }
    return result


def _rank(rank: int, world: int, store: str, out: str, options: argparse.Namespace) -> None:
    import transformers

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # transformers reads them

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = {
        s: measure(s, options.only, options.rounds, options.prompt, options.fake, options.fsdp, options.placed) for s in options.size
    }
    if rank == 0:
        with open(out, "w") as f:
            json.dump(results, f)
    if not options.fake:
        dist.barrier()
    dist.destroy_process_group()


def show(results: dict[str, Any], title: str) -> Table:
    """The results as one table."""
    table = Table(title=title)
    for column in ("model", "what", "way", "ms", "× by hand", "collectives", "KiB"):
        table.add_column(column, justify="left" if column in ("model", "what", "way") else "right")
    for size, kinds in results.items():
        for kind, ways in kinds.items():
            for name, r in ways.items():
                table.add_row(size, kind, name, f"{r['ms']:.2f}", f"{r['ratio']:.2f}", str(r["collectives"]), f"{r['bytes'] / 1024:.0f}")
    return table


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fake", action="store_true", help="CPU time with collectives that do nothing")
    parser.add_argument("--fsdp", action="store_true", help="a training step under FSDP2 over 2 data-parallel ranks as well")
    for name in PLACED:
        parser.add_argument(f"--{name}", dest="placed", action="store_const", const=name, default="", help="by hand and autotp alone")
    parser.add_argument("--size", nargs="+", default=["small"], choices=["small", "medium"])
    parser.add_argument("--only", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    options.only = list(PLACED.get(options.placed, options.only))
    options.world *= 2 if options.fsdp else 1
    if "by hand" not in options.only:
        options.only.insert(0, "by hand")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        processes = 1 if options.fake else options.world
        mp.spawn(_rank, (options.world, os.path.join(folder, "store"), out, options), nprocs=processes)
        with open(out) as f:
            results = json.load(f)
    Console(width=120).print(show(results, "CPU time, no-op collectives" if options.fake else f"wall time, {options.world} gloo ranks"))
    if options.json:
        with open(options.json, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
