"""A small model, its data, and what a training says of itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import autotp


def llama(heads: int = 6, kv: int = 3) -> Any:
    """A Llama in float64; 3 key-value heads over 2 ranks are padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv)).double()


def gpt2() -> Any:
    """A GPT-2 in float64, whose query, key and value projections are one parameter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 64, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).double()


SUBJECTS = {"llama": llama, "gpt2": gpt2}


def lora() -> Any:
    """The settings of an adapter on all Linears."""
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def subject(name: str, tp: int | None, *, shard: bool = True, adapters: bool = False) -> tuple[Any, int]:
    """The model, parallel over `tp` ranks (None: whole), and sharded over the others; and how many these are."""
    model = SUBJECTS[name]()
    if adapters:
        from peft import get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, lora(), autocast_adapter_dtype=False)
    if tp is None:
        return model, 1
    dp = dist.get_world_size() // tp
    mesh = (
        init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp")) if dp > 1 else init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    )
    autotp.parallelize(model, mesh, check="graph")
    if dp > 1 and shard:
        autotp.fully_shard(model, mesh)
    return model, dp


def whole(model: Any, tp: int | None) -> dict[str, Tensor]:
    state = model.state_dict() if tp is None else autotp.full_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sequences of 12 tokens; of each another number counts for the loss, unless `full`."""

    def __init__(self, length: int = 24, *, full: bool = False) -> None:
        self._length, self._full = length, full

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        if not self._full:
            labels[6 + i % 5 :] = -100
        return {"input_ids": ids, "labels": labels}


class Recording:
    """A collator that keeps, for each batch, its rows by their first three tokens."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, ...]]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.seen.append([tuple(row["input_ids"][:3].tolist()) for row in rows])
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of a weight."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
