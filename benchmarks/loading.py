"""What loading and saving cost over a bare loop: `python -m benchmarks.loading [--gigabytes 1.5] [--rounds 3] [--cold] [--json F]`.

A llama of that size in bfloat16 with random weights is written to a temporary directory, in files of half a gigabyte. Each way runs in
two fresh processes, all ways one after the other in each round; a figure is the median over rounds of the ratio to the ideal's in the
same round, the larger one of the two ranks.

The ideal of loading knows every rank's part beforehand: it reads it with `safe_open(...).get_slice` into tensors of its size, and makes
no model. The ideal of saving gathers one tensor after the other on the ranks in turn, which write them at their places in the files.

| column | what |
|---|---|
| seconds | wall time from a barrier to a barrier; modules are imported before, every page of a result is looked at |
| CPU | seconds of CPU of the busier rank, which other work on the machine changes less |
| bytes | what is taken out of `safe_open` ÷ the bytes of the rank's parts |
| memory | most anonymous memory (RssAnon, looked at every 3 ms from outside) over what there was at the start |
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autotp
from autotp.launch import run_ranks, values
from autotp.plan.layout import Layout

TP = 2
LOADS = ("ideal", "autotp", "plan given", "cut ahead", "transformers tp_plan", "all, then parallelize")
SAVES = ("ideal", "autotp", "full_state_dict, one rank writes")


def make(path: Path, gigabytes: float) -> None:
    """Write the checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}
    layer, rest = 2 * (2048 * 2048 * 2.5 + 3 * 2048 * 5632), 2 * 2 * 32000 * 2048
    config = LlamaConfig(**sizes, vocab_size=32000, num_hidden_layers=max(1, round((gigabytes * 1e9 - rest) / layer)))
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    model.save_pretrained(path, max_shard_size="500MB")


class Counted:
    """`safetensors.safe_open` that counts the bytes taken out of it."""

    taken = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = _safe_open(*args, **kwargs)

    def __enter__(self) -> Counted:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, key: str) -> torch.Tensor:
        return _count(self._file.get_tensor(key))

    def get_slice(self, key: str) -> Any:
        return _Slice(self._file.get_slice(key))


class _Slice:
    def __init__(self, entry: Any) -> None:
        self._entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return _count(self._entry[index])


def _count(tensor: torch.Tensor) -> torch.Tensor:
    Counted.taken += tensor.nbytes
    return tensor


_safe_open = safetensors.safe_open


def count() -> None:
    """Everybody's `safe_open` counts."""
    import transformers.modeling_utils

    safetensors.safe_open = transformers.modeling_utils.safe_open = Counted  # type: ignore[misc,assignment]


def layouts(plan: autotp.Plan) -> dict[str, Layout]:
    """Key of the checkpoint → layout."""
    return {name: p.layout for name, p in plan.params.items()}


def ideal_load(path: Path, plan: autotp.Plan, rank: int) -> dict[str, torch.Tensor]:
    """This rank's parts, and nothing else."""
    parts: dict[str, torch.Tensor] = {}
    where = layouts(plan)
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                layout, entry, at = where[key], opened.get_slice(key), 0
                out = torch.empty(layout.local_shape, dtype=torch.bfloat16)
                if layout.dim is None:
                    out.copy_(entry[...])
                for a, b in layout.intervals(rank) if layout.dim is not None else ():
                    out.narrow(layout.dim, at, b - a).copy_(entry[(slice(None),) * layout.dim + (slice(a, b),)])
                    at += b - a
                parts[key] = out
    return parts


def ideal_save(parts: dict[str, torch.Tensor], plan: autotp.Plan, path: Path, like: Path, rank: int) -> None:
    """Gather on the ranks in turn, and write."""
    where = layouts(plan)
    path.mkdir(exist_ok=True)
    dist.barrier()
    turn = 0
    for file in sorted(like.glob("*.safetensors")):
        with file.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            header = source.read(length)
        fd = os.open(path / file.name, os.O_WRONLY | os.O_CREAT)
        if rank == 0:
            os.posix_fallocate(fd, 0, file.stat().st_size)
            os.pwrite(fd, length.to_bytes(8, "little") + header, 0)
        for key, entry in json.loads(header).items():
            if key == "__metadata__":
                continue
            layout, local = where[key], parts[key]
            turn = 1 - turn
            if layout.dim is None:
                full = local
            else:
                got = [torch.empty_like(local) for _ in range(TP)] if rank == turn else None
                dist.gather(local, got, dst=turn)
                full = layout.unshard(got) if got is not None else local
                del got
            if rank == turn:
                os.pwrite(fd, full.view(torch.uint8).numpy().data, 8 + length + entry["data_offsets"][0])
            del full
        os.close(fd)
    dist.barrier()


def load_ways(path: Path, cut: Path, plan: autotp.Plan, mesh: DeviceMesh, rank: int) -> dict[str, Callable[[], Any]]:
    """Way → what is timed."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return {
        "ideal": lambda: ideal_load(path, plan, rank),
        "autotp": lambda: autotp.from_pretrained(path, mesh),
        "plan given": lambda: autotp.from_pretrained(path, mesh, plan=plan),
        "cut ahead": lambda: autotp.from_pretrained(cut, mesh),
        "transformers tp_plan": lambda: AutoModelForCausalLM.from_pretrained(
            path, distributed_config=DistributedConfig(tp_plan="auto", tp_size=TP)
        ),
        "all, then parallelize": lambda: autotp.parallelize(AutoModelForCausalLM.from_pretrained(path), mesh),
    }


def one(emit: Callable[[Any], None], kind: str, way: str, folder: str, saved: str) -> dict[str, float]:
    """One way on one rank."""
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401  (imported before the clock runs)

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(TP))
    count()
    rank, path, cut = dist.get_rank(), Path(folder) / "model", Path(folder) / "cut"
    mesh = init_device_mesh("cpu", (TP,), mesh_dim_names=("tp",))
    plan = autotp.plan(path, tp=TP)
    work: Callable[[], Any]
    if kind == "load":
        work = load_ways(path, cut, plan, mesh, rank)[way]
    elif way == "ideal":
        parts = ideal_load(path, plan, rank)
        work = lambda: ideal_save(parts, plan, Path(saved), path, rank)  # noqa: E731
    else:
        model = autotp.from_pretrained(path, mesh, plan=plan)
        work = lambda: save(model, way, Path(saved), rank)  # noqa: E731
    wanted = sum(torch.empty(p.layout.local_shape, device="meta").numel() for p in plan.params.values()) * 2
    dist.all_reduce(torch.zeros(1))  # connections are made
    gc.collect()
    Counted.taken = 0
    emit(("start", os.getpid()))
    time.sleep(0.05)
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    kept = work()
    if kind == "load":
        touch(kept)
    cpu = time.process_time() - cpu
    dist.barrier()
    seconds = time.perf_counter() - start
    emit(("stop", os.getpid()))
    del kept
    return {"wall": seconds, "cpu": cpu, "bytes": Counted.taken / wanted}


def touch(kept: Any) -> None:
    """Look at every page: a parameter that is a view of a file's pages has not been read before that."""
    tensors = kept.values() if isinstance(kept, dict) else kept.parameters()
    with torch.no_grad():
        for t in tensors:
            local = t.detach()
            local = getattr(local, "_local_tensor", local)
            local[..., ::2048].sum()


def save(model: Any, way: str, path: Path, rank: int) -> None:
    """Not the ideal ways of saving."""
    if way == "autotp":
        autotp.save_pretrained(model, path, max_shard_size="500MB")
        return
    state = autotp.full_state_dict(model)
    if rank == 0:
        path.mkdir(exist_ok=True)
        from safetensors.torch import save_file

        save_file(state, path / "model.safetensors", {"format": "pt"})
    dist.barrier()


class Memory:
    """Most anonymous memory of processes between their events."""

    def __init__(self) -> None:
        self.first: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self.ranks: dict[int, int] = {}
        self._on: set[int] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()

    def event(self, rank: int, value: Any) -> None:
        kind, pid = value
        self.ranks[rank] = pid
        if kind == "start":
            self.first[pid] = self.most[pid] = self._now(pid)
            self._on.add(pid)
        else:
            self.most[pid] = max(self.most[pid], self._now(pid))
            self._on.discard(pid)

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            for pid in list(self._on):
                self.most[pid] = max(self.most[pid], self._now(pid))

    @staticmethod
    def _now(pid: int) -> int:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return 0
        return int(text.partition("RssAnon:")[2].split()[0]) << 10


def forget(folder: Path) -> None:
    """Let the system drop what it holds of the files in memory."""
    for file in folder.glob("*/*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(kind: str, way: str, folder: str, cold: bool) -> dict[str, float]:
    """One way on fresh ranks: the slower, the larger."""
    if cold:
        forget(Path(folder))
    with tempfile.TemporaryDirectory(dir=folder) as scratch, Memory() as memory:
        results = values(run_ranks(one, TP, kind, way, folder, f"{scratch}/saved", timeout=600, on_event=memory.event))
    most = [(memory.most[pid] - memory.first[pid]) / 1e6 for pid in memory.ranks.values()]
    return {
        "wall": max(r["wall"] for r in results),
        "cpu": max(r["cpu"] for r in results),
        "bytes": max(r["bytes"] for r in results),
        "memory": max(most),
    }


def rounds(count_: int, kind: str, ways: tuple[str, ...], folder: str, cold: bool) -> Iterator[dict[str, dict[str, float]]]:
    """Round → way → figures."""
    for i in range(count_):
        order = ways[i % len(ways) :] + ways[: i % len(ways)]
        found: dict[str, dict[str, float]] = {}
        for way in order:
            found[way] = measure(kind, way, folder, cold)
            print(f"{kind} {i + 1}/{count_} {way}: {found[way]}", file=sys.stderr, flush=True)
        yield found


def summary(found: list[dict[str, dict[str, float]]], ways: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Way → medians, and medians of the ratios to the ideal."""
    return {
        way: {
            "wall": median(r[way]["wall"] for r in found),
            "wall ratio": median(r[way]["wall"] / r["ideal"]["wall"] for r in found),
            "cpu": median(r[way]["cpu"] for r in found),
            "cpu ratio": median(r[way]["cpu"] / r["ideal"]["cpu"] for r in found),
            "bytes": median(r[way]["bytes"] for r in found),
            "memory": median(r[way]["memory"] for r in found),
            "memory ratio": median(r[way]["memory"] / r["ideal"]["memory"] for r in found),
        }
        for way in ways
    }


def show(kind: str, figures: dict[str, dict[str, float]]) -> Table:
    """The figures as a table."""
    table = Table(title=f"{kind}, {TP} ranks")
    for column in ("way", "seconds", "× ideal", "CPU", "× ideal", "bytes ÷ parts", "memory MB", "× ideal"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, f in figures.items():
        taken = f"{f['bytes']:.3f}" if kind == "load" else ""
        cpu = f"{f['cpu']:.2f}", f"{f['cpu ratio']:.2f}"
        table.add_row(way, f"{f['wall']:.2f}", f"{f['wall ratio']:.2f}", *cpu, taken, f"{f['memory']:.0f}", f"{f['memory ratio']:.2f}")
    return table


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", nargs="+", default=["load", "save"], choices=["load", "save"])
    parser.add_argument("--only", nargs="+", help="ways, beside the ideal")
    parser.add_argument("--cold", action="store_true", help="load files that are not in the system's memory")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    folder = tempfile.mkdtemp(prefix="autotp-loading-")
    try:
        make(Path(folder) / "model", options.gigabytes)
        autotp.checkpoint.shard(Path(folder) / "model", Path(folder) / "cut", tp=TP)
        for kind in options.kind:
            ways = tuple(w for w in (LOADS if kind == "load" else SAVES) if not options.only or w == "ideal" or w in options.only)
            results[kind] = summary(list(rounds(options.rounds, kind, ways, folder, options.cold and kind == "load")), ways)
    finally:
        shutil.rmtree(folder)
    for kind, figures in results.items():
        Console(width=110).print(show(kind, figures))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
