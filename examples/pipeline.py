"""Train over data-parallel × pipeline × tensor-parallel ranks: each stage of torch's pipeline is a parallel model of its own.

    torchrun --standalone --nproc-per-node 4 examples/pipeline.py                                  (1 × 2 × 2)
    torchrun --standalone --nproc-per-node 8 examples/pipeline.py --dp 2                           (2 × 2 × 2)
    torchrun --standalone --nproc-per-node 4 examples/pipeline.py --pp 1 --tp 1 --dp 4             (the same losses)

A tiny Llama with random weights learns to continue counting sequences. Its blocks are dealt to the stages, each stage is made
parallel over its tp ranks, and FSDP2 shards it over the data-parallel ones.
"""

from __future__ import annotations

import argparse
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import LlamaConfig, LlamaForCausalLM

import autotp

LAYERS, ROWS, LENGTH, MICROBATCHES = 4, 16, 16, 4


class Stage(nn.Module):
    """A run of a Llama's blocks: ids or hidden states → hidden states or logits."""

    def __init__(self, model: LlamaForCausalLM, number: int, stages: int) -> None:
        super().__init__()
        size = LAYERS // stages
        self.embed = model.model.embed_tokens if number == 0 else None
        self.layers = nn.ModuleList(model.model.layers[number * size : (number + 1) * size])
        self.rotary = model.model.rotary_emb
        self.norm = model.model.norm if number == stages - 1 else None
        self.head = model.lm_head if number == stages - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.embed is None else self.embed(x)
        positions = self.rotary(h, torch.arange(h.shape[1], device=h.device).unsqueeze(0))
        for layer in self.layers:
            h = layer(h, position_embeddings=positions)
        return h if self.norm is None else self.head(self.norm(h))


def batch(step: int, mesh: DeviceMesh, device: str) -> Tensor:
    """This data-parallel rank's rows of the batch of `step`."""
    starts = torch.randint(0, 64, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    rows = starts + torch.arange(LENGTH)
    return rows[mesh.get_local_rank("dp") :: mesh["dp"].size()].to(device)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def run(options: argparse.Namespace, device: str) -> None:
    """Split, parallelize, shard, train."""
    mesh = init_device_mesh(device, (options.dp, options.pp, options.tp), mesh_dim_names=("dp", "pp", "tp"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=128)).to(device).train()

    number = mesh.get_local_rank("pp")
    stage = Stage(model, number, options.pp)
    example = batch(0, mesh, device)[:1]
    autotp.parallelize(stage, mesh, example_inputs={"x": example if number == 0 else torch.zeros(1, LENGTH, 64, device=device)})
    for layer in stage.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(stage, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)

    group = mesh.get_group("pp")
    schedule = Schedule1F1B(PipelineStage(stage, number, options.pp, torch.device(device), group=group), MICROBATCHES, loss_fn=loss_of)
    for step in range(options.steps):
        ids = batch(step, mesh, device)
        losses: list[Tensor] = []
        inputs = (ids,) if number == 0 else ()
        schedule.step(*inputs, target=ids if number == options.pp - 1 else None, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        if number == options.pp - 1:
            mean = torch.stack(losses).mean() / options.dp
            dist.all_reduce(mean, group=mesh.get_group("dp"))
            if dist.get_rank() == dist.get_world_size() - 1:
                print(f"step {step:3d}  loss {mean.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    run(options, "cuda" if cuda else "cpu")
    gc.collect()  # what the model holds goes before the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
