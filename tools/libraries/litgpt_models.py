"""litgpt: published language models by their configs, made small."""

from __future__ import annotations

from typing import Any

from litgpt import GPT, Config

from tools.libraries import Built, Table, tokens


def small(name: str, **options: Any) -> Built:
    sizes = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "head_size": 16,
        "intermediate_size": 128,
        "block_size": 32,
        "vocab_size": 128,
        "padded_vocab_size": 128,
    }
    return GPT(Config.from_name(name, **{**sizes, **options})), tokens()


MODELS: Table = {
    "pythia": lambda: small("pythia-14m"),
    "llama3": lambda: small("Llama-3.2-1B", n_query_groups=2),
    "falcon": lambda: small("falcon-7b", n_query_groups=1),
    "phi": lambda: small("phi-2"),
    "gemma2": lambda: small("Gemma-2-2b", n_query_groups=2),
    "gemma3": lambda: small("Gemma-3-1b-it", n_query_groups=1, sliding_window_size=8),
    "mixtral": lambda: small("Mixtral-8x7B-v0.1", n_query_groups=2, n_expert=4, moe_intermediate_size=128),
    "qwen3": lambda: small("Qwen3-0.6B", n_query_groups=2),
}
