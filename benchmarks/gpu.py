"""What autotp costs on one GPU: `python -m benchmarks.gpu [--json FILE]`. Without a GPU it says so and ends.

    speed      One rank of llama-8B and -70B geometry at tp 2 and 8, in bfloat16, over a process group that does nothing, so that the
               shards' kernels and the code around them are all that runs. Beside it, in the same process and in turn: the same shards by
               hand (`benchmarks/megatron.py`). Eager prefill and decode; decode compiled with a static cache; the same in CUDA graphs.
    equality   Two ranks on the one GPU over gloo, in bfloat16 and float32: logits and gradients beside one device, and beside float32.
    loading    Peak memory of `from_pretrained` on each of two ranks, over that of the shards.

`--device cpu --tiny` runs the same code on a CPU with small sizes: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autotp
from benchmarks.megatron import parallelize_by_hand

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
#: The published sizes of Llama 3, but for the number of layers: all layers are alike.
GEOMETRIES = {
    "8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256}
SIZES = (2, 8)
#: What is wanted of each: × by hand.
WANTED = {"prefill": 1.05, "decode": 1.05, "compiled decode": 1.02, "decode in CUDA graphs": 1.02}
Job = Callable[[], object]


def llama(geometry: dict[str, int], layers: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A random LlamaForCausalLM, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**geometry, num_hidden_layers=layers)).to(dtype).eval()
    return model


class Work:
    """The jobs of one model."""

    def __init__(self, model: nn.Module, tokens: int, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        vocab: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        self.ids = torch.arange(tokens, device=options.device).remainder(vocab).view(1, -1)
        self.last = self.ids[:, :1].clone()
        self.position = torch.full((1, 1), tokens, device=options.device)

    def prefill(self) -> Job:
        return self._quiet(lambda: self.model(self.ids, use_cache=False))

    def decode(self) -> Job:
        """A token behind a prompt; its place in the static cache stays the same from call to call."""
        return self._quiet(self._step(self.model))

    def compiled(self, mode: str | None) -> Job:
        torch._dynamo.reset()
        options: dict[str, Any] = {"backend": "aot_eager"} if self.options.device == "cpu" else {"mode": mode}
        return self._quiet(self._step(torch.compile(self.model, fullgraph=True, **options)))

    def _step(self, call: Any) -> Job:
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=self.ids.shape[1] + 8)
        with torch.no_grad():
            self.model(self.ids, past_key_values=cache, use_cache=True)
        lengths = [layer.__dict__.get("cumulative_length") for layer in cache.layers]

        def step() -> Tensor:
            for layer, length in zip(cache.layers, lengths, strict=True):
                if length is not None:  # the same place again
                    layer.cumulative_length = length.clone() if isinstance(length, Tensor) else length
            found: Tensor = call(self.last, past_key_values=cache, use_cache=True, position_ids=self.position).logits
            return found

        return step

    def _quiet(self, job: Job) -> Job:
        def run() -> object:
            with torch.no_grad():
                return job()

        return run


def seconds(job: Job, device: str, times: int) -> float:
    """Of one call, in a row of `times`."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            job()
        return (time.perf_counter() - start) / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        job()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def speed(rank: int, name: str, tp: int, out: str, options: argparse.Namespace) -> None:
    """One case, in a process of its own: {what: {"by hand": ms, "autotp": ms, "ratio": …}}."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(tp))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp)
    mesh = init_device_mesh(options.device, (tp,), mesh_dim_names=("tp",))
    geometry = TINY if options.tiny else GEOMETRIES[name]
    dtype = torch.bfloat16
    works: dict[str, Work] = {}
    for way in ("by hand", "autotp"):
        model = llama(geometry, options.layers, options.device, dtype)
        made = parallelize_by_hand(model, mesh.get_group()) if way == "by hand" else autotp.parallelize(model, mesh, check="graph")
        works[way] = Work(made, options.tokens, options)
    kinds: dict[str, Callable[[Work], Job]] = {
        "prefill": Work.prefill,
        "decode": Work.decode,
        "compiled decode": lambda work: work.compiled("default"),
        "decode in CUDA graphs": lambda work: work.compiled("reduce-overhead"),
    }
    found: dict[str, Any] = {}
    for kind, make in kinds.items():
        try:
            jobs = {way: make(work) for way, work in works.items()}
            for job in jobs.values():
                for _ in range(3):
                    job()
        except Exception as error:  # one kind that does not run must not hide the others
            found[kind] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            continue
        times: dict[str, list[float]] = {way: [] for way in jobs}
        for i in range(options.rounds):
            for way in list(jobs) if i % 2 else reversed(jobs):
                times[way].append(seconds(jobs[way], options.device, 1 if kind == "prefill" else 8))
        ratio = median(a / b for a, b in zip(times["autotp"], times["by hand"], strict=True))
        found[kind] = {way: median(t) * 1e3 for way, t in times.items()} | {"ratio": ratio, "wanted": WANTED[kind]}
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def _grouped(rank: int, world: int, store: str, options: argparse.Namespace) -> DeviceMesh:
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    return init_device_mesh(options.device, (world,), mesh_dim_names=("tp",))


def equality(rank: int, world: int, store: str, out: str, options: argparse.Namespace) -> None:
    """{dtype: {"autotp", "one device": distance from float32 on one device}} of logits and of the gradients' norm."""
    mesh = _grouped(rank, world, store, options)
    geometry = TINY if options.tiny else {**GEOMETRIES["8B"], "vocab_size": 32000}
    exact = llama(geometry, 2, options.device, torch.float32)
    ids = torch.arange(64, device=options.device).remainder(geometry["vocab_size"]).view(1, -1)

    def observed(model: nn.Module) -> tuple[Tensor, Tensor]:
        result = model(ids, labels=ids, use_cache=False)
        result.loss.backward()
        whole = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        return result.logits.detach().float(), norm.detach().float()

    logits, norm = observed(exact)
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        one = copy.deepcopy(exact).to(dtype)
        one.zero_grad(set_to_none=True)
        both = autotp.parallelize(copy.deepcopy(one), mesh, check="graph")
        apart = {}
        for way, model in (("one device", one), ("autotp", both)):
            own, own_norm = observed(model)
            apart[way] = {
                "logits": float((own - logits).norm() / logits.norm()),
                "norm of gradients": float((own_norm - norm).abs() / norm),
            }
        found[str(dtype).removeprefix("torch.")] = apart
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def loading(rank: int, world: int, store: str, out: str, options: argparse.Namespace) -> None:
    """{"peak": bytes, "shards": bytes} of the rank that needs most."""
    mesh = _grouped(rank, world, store, options)
    folder = Path(out).with_name("checkpoint")
    if rank == 0:
        llama(TINY if options.tiny else GEOMETRIES["8B"], 4, "cpu", torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    gpu = options.device != "cpu"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    model = autotp.from_pretrained(folder, mesh)
    own = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[operator]
    each: list[Any] = [None] * world
    dist.all_gather_object(each, (torch.cuda.max_memory_allocated() - before if gpu else own, own))
    if rank == 0:
        peak, shards = max(each)
        Path(out).write_text(json.dumps({"peak": peak, "shards": shards, "ratio": peak / shards}))
    dist.barrier()
    dist.destroy_process_group()


def _run(function: Callable[..., None], *args: Any, ranks: int) -> Any:
    """What `function` writes, run on each of `ranks` processes; an error as a text."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        more = (ranks, os.path.join(folder, "store")) if ranks > 1 else ()
        try:
            mp.spawn(function, (*args[:-1], *more, out, args[-1]), nprocs=ranks)
        except Exception as error:  # the other parts have their turn
            return {"error": " ".join(str(error).split())[-600:]}
        return json.loads(Path(out).read_text())


def table(results: dict[str, Any], device: str) -> Table:
    """The speeds as one table."""
    made = Table(title=f"one rank on {device}, bfloat16, no-op collectives")
    for column in ("llama", "tp", "what", "by hand ms", "autotp ms", "× by hand", "wanted ≤"):
        made.add_column(column, justify="left" if column in ("llama", "what") else "right")
    for case, kinds in results.items():
        name, tp = case.split(" tp ")
        for kind, r in kinds.items():
            if "error" in r:
                made.add_row(name, tp, kind, r["error"])
            else:
                made.add_row(name, tp, kind, f"{r['by hand']:.3f}", f"{r['autotp']:.3f}", f"{r['ratio']:.3f}", f"{r['wanted']:.2f}")
    return made


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the program")
    parser.add_argument("--parts", nargs="+", default=["speed", "equality", "loading"], choices=["speed", "equality", "loading"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: this machine has no GPU that torch can use", file=sys.stderr)
        return
    card = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    found: dict[str, Any] = {"card": card, "torch": torch.__version__}
    if "speed" in options.parts:
        cases = [(name, tp) for name in (["tiny"] if options.tiny else GEOMETRIES) for tp in SIZES]
        found["speed"] = {f"{name} tp {tp}": _run(speed, name, tp, options, ranks=1) for name, tp in cases}
        wrong = {case: r for case, r in found["speed"].items() if "error" in r}
        Console(width=140).print(table({case: r for case, r in found["speed"].items() if case not in wrong}, card), wrong or "")
    for part, function in (("equality", equality), ("loading", loading)):
        if part in options.parts:
            found[part] = _run(function, options, ranks=2)
            Console(width=140).print(part, found[part])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
