"""What planning costs, with its numbers compared and without: `python -m benchmarks.planning`.

`--types canine zamba2` plans tiny models of these types of transformers instead, each once, and prints CPU seconds; `--kept` also those of
a plan that `AUTOTP_CACHE` keeps. `--published NAME …` plans models of `tools/known_models.yaml` at their published sizes (without names
all of them), `--layers 2 126` a llama of the widths of the 405B model with so many layers.

CPU seconds of this process, the least of several plans; the first one, which also imports and compiles what is used, is left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp


class Mlp(nn.Module):
    """Four blocks of norm, Linear, gelu, Linear."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"n": nn.LayerNorm(width), "a": nn.Linear(width, 4 * width), "b": nn.Linear(4 * width, width)}) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["b"](F.gelu(block["a"](block["n"](x))))
        return x


def llama(device: str, **sizes: int) -> nn.Module:
    """A llama; without sizes that of 7B parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes))


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor] | None]] = {
    "mlp": (Mlp, {"x": torch.zeros(2, 8, 128)}),
    "tiny llama": (lambda: llama("cpu", **TINY), None),
    "tiny llama, meta": (lambda: llama("meta", **TINY), None),
    "7B llama, meta": (lambda: llama("meta"), None),
}


def least(model: nn.Module, tp: int, check: str, inputs: dict[str, Tensor] | None, rounds: int) -> tuple[float, str]:
    """CPU seconds of the cheapest of `rounds` plans, and what they say was checked."""
    found: list[float] = []
    for _ in range(rounds + 1):
        started = time.process_time()
        plan = autotp.plan(model, tp=tp, example_inputs=inputs, check=check)
        found.append(time.process_time() - started)
    return min(found[1:]), plan.checked


def kept(model: nn.Module, tp: int) -> float:
    """CPU seconds of a plan that is kept: the least of three."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTOTP_CACHE"] = folder
        for _ in range(4):
            started = time.process_time()
            autotp.plan(model, tp=tp)
            found.append(time.process_time() - started)
        os.environ["AUTOTP_CACHE"] = "0"
    return min(found[1:])


def types(names: list[str], tp: int, also_kept: bool) -> None:
    """Print CPU seconds of the first plan of each tiny model, after one of a llama."""
    from autotp.testing.tiny.models import tiny_config, tiny_model

    for name in ("llama", *names):
        torch.manual_seed(0)
        model = tiny_model(tiny_config(name))
        started = time.process_time()
        plan = autotp.plan(model, tp=tp)
        seconds = time.process_time() - started
        again = f"  kept {kept(model, tp):.2f}s" if also_kept else ""
        print(f"{name:20s} {tp:3d} {seconds:6.2f}s{again}  {plan.checked}", flush=True)


def once(name: str, model: nn.Module, tp: int, rounds: int) -> None:
    """Print CPU seconds of the cheapest of `rounds` plans."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        plan = autotp.plan(model, tp=tp)
        found.append(time.process_time() - started)
    print(f"{name:30s} {tp:3d} {min(found):6.2f}s  {plan.checked}", flush=True)


def published(names: list[str], tp: int) -> None:
    """Print CPU seconds of the first plan of each well-known model, after one of a tiny llama."""
    from autotp import targets
    from tools.known_models import config_of, configs

    autotp.plan(llama("cpu", **TINY), tp=tp)
    for name, entry in configs().items():
        if not names or name in names:
            once(name, targets.build(config_of(entry), device="meta"), tp, 1)


def depths(layers: list[int], tp: int, rounds: int) -> None:
    """Print CPU seconds of plans of a llama with the widths of the 405B model, by its number of layers."""
    widths = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}
    once("the first", llama("meta", **widths, num_hidden_layers=2), tp, 1)
    for count in layers:
        once(f"{count} layers", llama("meta", **widths, num_hidden_layers=count), tp, rounds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--types", nargs="+", metavar="TYPE")
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--published", nargs="*", metavar="NAME")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N")
    options = parser.parse_args()
    if options.published is not None:
        published(options.published, options.tp[0])
        return
    if options.layers:
        depths(options.layers, options.tp[0], options.rounds)
        return
    if options.types:
        types(options.types, options.tp[0], options.kept)
        return
    print(f"{'model':20s} {'tp':>3s} {'graph':>7s} {'numbers':>8s}  checked")
    for name, (make, inputs) in SUBJECTS.items():
        model = make()
        for tp in options.tp:
            graph, _ = least(model, tp, "graph", inputs, options.rounds)
            numbers, checked = least(model, tp, "numbers", inputs, options.rounds)
            print(f"{name:20s} {tp:3d} {graph:6.2f}s {numbers:7.2f}s  {checked}", flush=True)
    print(f"largest resident size: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
