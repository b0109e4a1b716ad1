"""What planning costs, with the trace as the only proof and with numbers: CPU seconds, the least of three in one process.

python -m benchmarks.planning [--tp 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import nn

import autotp


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def _llama(device: str, **sizes: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    return model


_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}
_SUBJECTS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor] | None]] = {
    "mlp, 4 blocks": (_Mlp, {"x": torch.randn(2, 8, 64)}),
    "tiny llama": (lambda: _llama("cpu", **_TINY), None),
    "llama 7B, meta device": (lambda: _llama("meta"), None),
}


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'':24}{'graph':>8}{'numbers':>9}   checked")
    for name, (make, inputs) in _SUBJECTS.items():
        model = make()
        seconds: dict[str, float] = {}
        for check in ("graph", "numbers"):
            for _ in range(options.rounds):
                started = time.process_time()
                plan = autotp.plan(model, tp=options.tp, example_inputs=inputs, check=check)
                seconds[check] = min(seconds.get(check, float("inf")), time.process_time() - started)
        print(f"{name:24}{seconds['graph']:8.2f}{seconds['numbers']:9.2f}   {plan.checked}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
