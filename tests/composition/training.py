"""Tiny models that a mesh of data-parallel × tp ranks trains as one device does with the batches of all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import autotp
from autotp.api import parallelize_as
from autotp.numeric.exact import DOUBLE
from autotp.plan.plan import Plan

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
#: layout → (config class of transformers, its arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("LlamaConfig", LLAMA),
    "fused": ("GPT2Config", {**GPT2, **NO_DROPOUT}),
    "concatenated": ("Phi3Config", {**LLAMA, "pad_token_id": 0}),
    "padded": ("LlamaConfig", {**LLAMA, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "vocab_size": 41}),
    "shared": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 1}),
    "tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "experts": ("MixtralConfig", {**LLAMA, "intermediate_size": 24, "num_local_experts": 4, "experts_implementation": "eager"}),
    "joint": ("GPTNeoXConfig", {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "use_parallel_residual": True}),
    "state space": ("MambaConfig", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 40, "time_step_rank": 4}),
}
_PLANS: dict[tuple[str, int], Plan] = {}
_MESHES: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(*shape: int) -> DeviceMesh:
    """The mesh over the first ranks of the pool: (dp, tp), or (replicate, dp, tp)."""
    if shape not in _MESHES:
        _MESHES[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp") if len(shape) == 2 else ("replicate", "dp", "tp"))
    return _MESHES[shape]


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """Its dims without tp."""
    return mesh["dp"] if mesh.ndim == 2 else mesh["replicate", "dp"]


def build(kind: str, seed: int = 0) -> nn.Module:
    """The model on one device, in float64 and training mode."""
    torch.manual_seed(seed)
    name, options = MODELS[kind]
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    return model.double().train()


def parallel(kind: str, mesh: DeviceMesh, seed: int = 0) -> nn.Module:
    """The model over the tp dim of `mesh`."""
    model, tp = build(kind, seed), mesh["tp"].size()
    if tp > 1 and (kind, tp) in _PLANS:
        return parallelize_as(model, mesh, _PLANS[kind, tp])
    made = autotp.parallelize(model, mesh, check="graph")
    _PLANS[kind, tp] = autotp.plan_of(made)
    return made


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def by_block(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Plain FSDP2, a unit a block."""
    for block in blocks(model):
        fully_shard(block, mesh=data_parallel(mesh), **options)
    return fully_shard(model, mesh=data_parallel(mesh), **options)  # type: ignore[return-value]


def sharded(kind: str, mesh: DeviceMesh, seed: int = 0, **options: Any) -> nn.Module:
    """The model over tp and FSDP."""
    return by_block(parallel(kind, mesh, seed), mesh, **options)


@dataclass(frozen=True)
class Data:
    """Which of the `of` equal batches of a step this rank has; None: all of them in one."""

    of: int
    rank: int | None = None

    @classmethod
    def here(cls, mesh: DeviceMesh) -> Data:
        """This rank's batches."""
        over = data_parallel(mesh)
        at = over.get_coordinate()
        assert at is not None
        return cls(over.size(), at[0] if over.ndim == 1 else at[0] * over.size(1) + at[1])

    def ids(self, step: int) -> Tensor:
        """Tokens of a step."""
        ids = torch.randint(0, 40, (self.of * 2, 7), generator=torch.Generator().manual_seed(step))
        return ids if self.rank is None else ids[self.rank * 2 : self.rank * 2 + 2]


def exact(model: nn.Module) -> AbstractContextManager[Any]:
    """Widens casts to float32 in models whose numbers depend on them."""
    return DOUBLE.mode() if model.config.model_type in ("mixtral", "mamba") else nullcontext()  # type: ignore[union-attr]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean cross entropy of the next token."""
    with exact(model):
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with an ε that does not make a step of rounding."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: range, backward: Callable[..., None] | None = None
) -> list[float]:
    """Clipped steps; the norms of their gradients."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        if backward is None:
            with exact(model):
                loss_of(model, data.ids(step)).backward()  # type: ignore[no-untyped-call]
        else:
            backward(model, data, step)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
    return norms


def apart(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """max|a − b| over the tensors of two dicts; inf where names differ."""
    if list(wanted) != list(got):
        return float("inf")
    return max(float((wanted[n].detach() - got[n].detach()).abs().max()) for n in wanted)


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model of one device."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_on_all_ranks(value: float) -> bool:
    """True where every rank has this number."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return len(set(everyone)) == 1
