"""The most memory that a loss over a large vocabulary needs: `python -m benchmarks.loss [--vocabulary 128000] [--tokens 64]`.

A llama with one narrow layer runs forward and backward in bfloat16, so nearly all memory is that of logits and of the loss. Bytes are
those that torch's allocator hands out beyond what is there before the forward, on one device and on each rank, with and without
`loss_parallel`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd.profiler import profile
from torch.distributed.device_mesh import init_device_mesh

from autotp.launch import run_ranks, values


def narrow(vocabulary: int) -> nn.Module:
    """A llama of which the vocabulary is nearly everything, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **options)).bfloat16()


def peak(model: Any, tokens: int = 64) -> int:
    """The most bytes that are there at a time in a forward and backward, beyond those of before."""
    ids = torch.arange(tokens).view(2, -1)
    for _ in range(2):  # the first one makes what stays
        model.zero_grad(set_to_none=True)
        with profile(profile_memory=True) as seen:
            model(input_ids=ids, labels=ids).loss.backward()
    changes = sorted((e.start_ns(), e.nbytes()) for e in seen.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _rank(emit: Callable[[Any], None], tp: int, vocabulary: int, tokens: int) -> list[int]:
    import autotp

    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    models = [autotp.parallelize(narrow(vocabulary), mesh, loss_parallel=wanted) for wanted in (False, True)]
    return [peak(model, tokens) for model in models]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    alone = peak(narrow(options.vocabulary), options.tokens)
    table = Table(title=f"most memory, MiB on the busiest rank (× one device), {options.tokens} tokens")
    for column in ("tp", "whole logits", "loss_parallel"):
        table.add_column(column, justify="right")
    table.add_row("1", f"{alone / 2**20:.0f}", "")
    for tp in (2, 4):
        found = values(run_ranks(_rank, tp, tp, options.vocabulary, options.tokens))
        table.add_row(str(tp), *(f"{max(each) / 2**20:.0f} ({max(each) / alone:.2f})" for each in zip(*found, strict=True)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
