"""Predicted decode speeds beside published ones: `python -m benchmarks.published`.

gpt-fast, README, "Tensor Parallelism" and "Mixtral 8x7B": batch 1, prompts of 5 tokens, bfloat16, A100 80 GB, compiled.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

MODELS = {
    "Llama-2-7B": ("llama", {}),
    "Llama-2-70B": (
        "llama",
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    ),
    "Mixtral-8x7B": ("mixtral", {}),
}
PUBLISHED = {
    "Llama-2-7B": {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43},
    "Llama-2-70B": {2: 21.32, 4: 38.01, 8: 62.50},
    "Mixtral-8x7B": {2: 96.67, 4: 155.35, 8: 227.82},
}


def main() -> None:
    """Run and print."""
    from transformers import CONFIG_MAPPING

    import autotp
    from autotp.advise.option import Kind
    from autotp.advise.workload import Serve

    table = Table(title="tokens a second, one sequence")
    for column in ("model", "tp", "predicted", "published", "error"):
        table.add_column(column, justify="right")
    for name, speeds in PUBLISHED.items():
        kind, fields = MODELS[name]
        advice = autotp.advise(CONFIG_MAPPING[kind](**fields), Serve(1, 5, 200), gpus=8, gpu="a100")
        found = {o.tp: 1 / o.seconds for o in advice.options if o.kind is Kind.REPLICAS}
        for tp, speed in speeds.items():
            table.add_row(name, str(tp), f"{found[tp]:.1f}", f"{speed:.1f}", f"{found[tp] / speed - 1:+.0%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
