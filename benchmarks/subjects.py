"""The four ways to run a llama on several ranks that are compared."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks.megatron import parallelize_by_hand
from benchmarks.megatron_sequence import SequenceParallel

SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
              "vocab_size": 2048, "max_position_embeddings": 2048},
    "medium": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
               "vocab_size": 8192, "max_position_embeddings": 2048},
}  # fmt: skip


def llama(size: str) -> nn.Module:
    """A random LlamaForCausalLM in float32, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES[size], use_cache=True)).eval()


def by_hand(size: str, mesh: DeviceMesh) -> nn.Module:
    """(A) Megatron's way, written for this architecture, on plain tensors."""
    return parallelize_by_hand(llama(size), mesh.get_group())


def autotp(size: str, mesh: DeviceMesh) -> nn.Module:
    """autotp, without a plan."""
    import autotp as library

    if hasattr(library, "parallelize"):
        return library.parallelize(llama(size), mesh)  # type: ignore[no-any-return]
    from autotp.rewrite.apply import apply
    from autotp.rewrite.collectives.comm import GroupComm
    from autotp.rewrite.parameters.make import shard_onto
    from tests.rewrite.plans import llama_plan

    model = llama(size)
    params, modules = llama_plan(model, mesh.size())
    apply(model, params, modules, comm=GroupComm(mesh.get_group()), make_param=shard_onto(mesh)).release()
    return model


def torch_styles(size: str, mesh: DeviceMesh) -> nn.Module:
    """(B) torch's parallelize_module, with the plan of its tutorial."""
    model = llama(size)
    layer = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {f"mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")}
    layer |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}  # type: ignore[dict-item]
    plan: dict[str, Any] = {f"model.layers.{i}.{k}": v for i in range(len(model.model.layers)) for k, v in layer.items()}  # type: ignore[union-attr, arg-type]
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def transformers_plan(size: str, mesh: DeviceMesh) -> nn.Module:
    """(C) transformers' tp_plan="auto"."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    folder = os.path.join(tempfile.gettempdir(), f"autotp_bench_{size}_{os.getppid()}")
    if dist.get_rank() == 0:
        llama(size).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_plan="auto", tp_size=mesh.size())
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    dist.barrier()
    shutil.rmtree(folder, ignore_errors=True)
    return model.eval()  # type: ignore[no-any-return]


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model under FSDP2 over the data-parallel `mesh`, a unit a layer; in training mode."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model.train(), mesh=mesh)  # type: ignore[return-value]


def by_hand_loss_parallel(size: str, mesh: DeviceMesh) -> nn.Module:
    """(A) with a loss of local logits."""
    return parallelize_by_hand(llama(size), mesh.get_group(), loss_parallel=True)


def autotp_loss_parallel(size: str, mesh: DeviceMesh) -> nn.Module:
    """autotp, without a plan, with logits in parts."""
    import autotp as library

    return library.parallelize(llama(size), mesh, loss_parallel=True)


def by_hand_sequence_parallel(size: str, mesh: DeviceMesh) -> nn.Module:
    """(A) with hidden states between regions in token parts."""
    return SequenceParallel(llama(size), mesh.get_group())


def autotp_sequence_parallel(size: str, mesh: DeviceMesh) -> nn.Module:
    """autotp, without a plan, with hidden states in token parts."""
    import autotp as library

    return library.parallelize(llama(size), mesh, sequence_parallel=True)


LOSS_PARALLEL = {"by hand": by_hand_loss_parallel, "autotp": autotp_loss_parallel}
SEQUENCE_PARALLEL = {"by hand": by_hand_sequence_parallel, "autotp": autotp_sequence_parallel}
SUBJECTS: dict[str, Callable[[str, DeviceMesh], nn.Module]] = {
    "by hand": by_hand,
    "autotp": autotp,
    "torch": torch_styles,
    "transformers": transformers_plan,
}
