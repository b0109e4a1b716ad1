"""Train on several ranks, with the usual loop: the optimizer, gradient clipping and the scheduler need no change.

    torchrun --standalone --nproc-per-node 2 examples/train.py
    accelerate launch --multi-gpu --num-processes 2 examples/train.py --accelerate     (without GPUs: ACCELERATE_USE_CPU=1 before it)

Every rank sees the same batch: tensor parallelism splits the model, not the data. Without --model (or AUTOTP_MODEL) a tiny Llama
with random weights learns to continue counting sequences.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import autotp


def load(path: str | None) -> PreTrainedModel:
    """The model in `path`, or a tiny one; the same on every rank."""
    if path:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=128))


def batch(step: int, device: str) -> Tensor:
    """Eight sequences that count upwards from random starts, the same on every rank."""
    starts = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(16)).to(device)


def train(
    model: PreTrainedModel, steps: int, device: str, show: bool, backward: Callable[[Tensor], None], optimizer: torch.optim.Optimizer
) -> float:
    """Run `steps` steps; the last loss."""
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        ids = batch(step, device)
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if show and (step % 10 == 0 or step == steps - 1):
            print(f"step {step:3d}  loss {loss.item():.4f}  gradient norm {float(norm):.4f}", flush=True)
    return loss.item()


def run(options: argparse.Namespace, device: str) -> None:
    """Parallelize and train."""
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = autotp.parallelize(load(options.model).to(device), mesh).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward: Callable[[Tensor], None] = Tensor.backward
    if options.accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device == "cpu")
        model = accelerator.prepare_model(model, evaluation_mode=True)  # parallel already: not to be wrapped for data parallelism
        optimizer = accelerator.prepare_optimizer(optimizer)
        backward = accelerator.backward
    train(model, options.steps, device, dist.get_rank() == 0, backward, optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("AUTOTP_MODEL"), help="directory of a causal language model")
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--accelerate", action="store_true", help="let accelerate drive the backward pass and the optimizer")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    run(options, "cuda" if cuda else "cpu")
    # A thread of gloo lets go of the last tensors a moment after the collective returns; should the interpreter be ending by then, it
    # aborts the process. What the model holds goes first, and gives it that moment.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
