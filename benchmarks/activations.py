"""What autograd keeps of a forward with hidden states in token parts: `python -m benchmarks.activations [--tokens 256] [--layers 4]`.

Bytes are those of the tensors that saved-tensor hooks see, each storage once, without parameters, on the busiest rank: of the blocks of
a llama, with and without `sequence_parallel`.
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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from autotp.launch import run_ranks, values

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def blocks(dtype: torch.dtype, layers: int = 4) -> nn.Module:
    """A llama whose width over intermediate width is that of llama-2-7b, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, attn_implementation="sdpa", **options)).to(dtype)


def kept(model: Any, tokens: int) -> int:
    """Bytes that are kept of a forward of the model without its head, over 1 × `tokens`."""
    own = {getattr(p, "_local_tensor", p).untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model(input_ids=torch.arange(tokens).remainder(60).view(1, -1), use_cache=False)
    return sum(found.values())


def _rank(emit: Callable[[Any], None], tp: int, dtype: str, tokens: int, layers: int) -> list[int]:
    import autotp

    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    models = (autotp.parallelize(blocks(DTYPES[dtype], layers), mesh, check="graph", sequence_parallel=s) for s in (False, True))
    return [kept(model, tokens) for model in models]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    table = Table(title=f"kept for the backward, KiB (× whole hidden states), 1 × {options.tokens} tokens, {options.layers} layers")
    for column in ("dtype", "tp", "one device", "whole", "sequence_parallel"):
        table.add_column(column, justify="right")
    for name, dtype in DTYPES.items():
        alone = kept(blocks(dtype, options.layers), options.tokens)
        for tp in (2, 4):
            found = values(run_ranks(_rank, tp, tp, name, options.tokens, options.layers))
            whole, parts = (max(each) for each in zip(*found, strict=True))
            cells = (f"{alone / 1024:.0f}", f"{whole / 1024:.0f}", f"{parts / 1024:.0f} ({parts / whole:.2f})")
            table.add_row(name, str(tp), *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
