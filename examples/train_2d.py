"""Train a checkpoint over data-parallel × tensor-parallel ranks: FSDP2 shards each tp rank's part again. Resume on any other mesh.

    torchrun --standalone --nproc-per-node 4 examples/train_2d.py --tp 2 --model path/to/a/model/directory --out out --steps 20
    torchrun --standalone --nproc-per-node 4 examples/train_2d.py --tp 4 --out out --steps 40 --resume

The ranks of one tp group see the same rows of each batch, and data-parallel ranks see different ones. So the losses and the weights
do not depend on the mesh. Without --model (or AUTOTP_MODEL) a tiny Llama with random weights is written to OUT/start and trained.

OUT/step-N is the state of the training after N steps, OUT/model the trained model, which `from_pretrained` of transformers loads.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import autotp

ROWS, LENGTH = 8, 16  # sequences a step, over all data-parallel ranks; tokens a sequence


def batch(step: int, mesh: DeviceMesh, device: str) -> Tensor:
    """This rank's rows of the batch of `step`: sequences that count upwards from random starts."""
    starts = torch.randint(0, 64, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    rows = starts + torch.arange(LENGTH)
    return rows[mesh.get_local_rank("dp") :: mesh["dp"].size()].to(device)


def load(path: str, mesh: DeviceMesh) -> PreTrainedModel:
    """The model in `path`: each rank reads its tp part, of which FSDP keeps a shard."""
    model = autotp.from_pretrained(path, mesh, dtype=torch.float32).train()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])  # or, for a model of any class: autotp.fully_shard(model, mesh)


def run(options: argparse.Namespace, device: str) -> None:
    """Load, train, save."""
    out = Path(options.out)
    mesh = init_device_mesh(device, (dist.get_world_size() // options.tp, options.tp), mesh_dim_names=("dp", "tp"))
    model = load(options.model or start(out), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    if options.resume:
        first = max(int(folder.name.removeprefix("step-")) for folder in out.glob("step-*"))
        autotp.checkpoint.load(model, optimizer, out / f"step-{first}")
    for step in range(first, options.steps):
        ids = batch(step, mesh, device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / mesh["dp"].size()
        dist.all_reduce(mean, group=mesh.get_group("dp"))
        shown = float(norm)  # collective: every rank asks for it
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {mean.item():.4f}  gradient norm {shown:.4f}", flush=True)
    autotp.checkpoint.save(model, optimizer, out / f"step-{options.steps}")
    autotp.save_pretrained(model, out / "model")


def start(out: Path) -> str:
    """The directory of a tiny Llama with random weights."""
    path = out / "start"
    if dist.get_rank() == 0 and not path.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=128)).save_pretrained(path)
    dist.barrier()
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("AUTOTP_MODEL"), help="directory of a causal language model")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks; the others are data-parallel")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="out_2d", help="directory for the training's states and the trained model")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in OUT, on this mesh")
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
