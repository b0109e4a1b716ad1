"""Fine-tune a checkpoint on several ranks: load a part on each, train, save, resume on another number of ranks, generate.

    torchrun --standalone --nproc-per-node 2 examples/finetune.py --model path/to/a/model/directory --out out --steps 20
    torchrun --standalone --nproc-per-node 3 examples/finetune.py --model path/to/a/model/directory --out out --steps 40 --resume
    accelerate launch --multi-gpu --num-processes 2 examples/finetune.py --accelerate     (without GPUs: ACCELERATE_USE_CPU=1 before it)

The text is made on the spot: sentences of a few words whose tokens in Llama's vocabulary are written below, so that no tokenizer is
needed. In another vocabulary they are other tokens, which does not matter. Put your own tokens into `batch`.
Without --model (or AUTOTP_MODEL) a tiny Llama with random weights is written to OUT/start and trained.

OUT/step-N is the state of the training after N steps, of no number of ranks in particular; OUT/progress.json names the last whole one.
OUT/model is the fine-tuned model: `AutoModelForCausalLM.from_pretrained` loads it, without autotp.
docs/accelerate.md says which parts of accelerate are left out here, and why.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, LlamaConfig

import autotp

ACCUMULATE, ROWS, LENGTH = 2, 4, 32  # batches a step, sequences a batch, tokens a sequence
WORDS = {"Once": 9038, "upon": 2501, "a": 263, "time": 931, "there": 727, "was": 471, "little": 2217, "girl": 7826, "L": 365, "ily": 2354}
WORDS |= {",": 29892, ".": 29889}
TEXT = ("L ily was a little girl .", "L ily was a girl .", "L ily was there .", "Once upon a time , L ily was little .")


def encode(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    words = {token: word for word, token in WORDS.items()}
    return re.sub(r" (ily|[.,])", r"\1", " ".join(words.get(i, f"<{i}>") for i in ids))


def batch(number: int, device: str) -> Tensor:
    """Batch `number` of the data, ids of shape (ROWS, LENGTH): a function of the number alone, so the same on every rank."""
    draw = random.Random(number)
    rows = [encode(" ".join(draw.choices(TEXT, k=LENGTH)))[:LENGTH] for _ in range(ROWS)]
    return torch.tensor(rows, device=device)


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """One step with accumulation over `batches`; (loss, gradient norm before clipping). The loop of one device."""
    losses = []
    for ids in batches:
        with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(losses).mean(), norm


def with_accelerate(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same; `accelerator` casts, scales the loss, and steps the optimizer at the last of the batches."""
    losses, norm = [], torch.tensor(0.0)
    for ids in batches:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), norm


def save(out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
    """The state after `step` steps. The small rest goes last: what it names is whole, whenever the program ends."""
    autotp.checkpoint.save(model, optimizer, out / f"step-{step}")
    if dist.get_rank() == 0:
        rest = {"state": f"step-{step}", "step": step, "schedule": schedule.state_dict()}
        (out / "progress.tmp").write_text(json.dumps(rest))
        (out / "progress.tmp").replace(out / "progress.json")


def resume(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> int:
    """Load what `save` wrote, on any number of ranks; the steps done."""
    if not (out / "progress.json").exists():
        raise SystemExit(f"--resume: no progress.json in {out}, so no whole state of a training is there")
    rest = json.loads((out / "progress.json").read_text())
    autotp.checkpoint.load(model, optimizer, out / rest["state"])
    schedule.load_state_dict(rest["schedule"])
    return int(rest["step"])


def start(out: Path) -> Path:
    """The directory of a tiny model with random weights, written by rank 0."""
    if dist.get_rank() == 0 and not (out / "start").exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=32000)).save_pretrained(out / "start")
    dist.barrier()
    return out / "start"


def run(options: argparse.Namespace, device: str) -> None:
    """Load, train, save, generate."""
    out, show = Path(options.out), dist.get_rank() == 0
    out.mkdir(parents=True, exist_ok=True)
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    model: Any = autotp.from_pretrained(options.model or start(out), mesh, dtype=torch.float32).train()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 5, (5 / (step + 1)) ** 0.5))
    done = resume(out, model, optimizer, schedule) if options.resume else 0
    precision = getattr(torch, options.precision)
    if options.accelerate:
        from accelerate import Accelerator

        mixed = "bf16" if precision == torch.bfloat16 else "no"
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed, gradient_accumulation_steps=ACCUMULATE)
        model = accelerator.prepare_model(model, evaluation_mode=True)  # parallel already: not to be wrapped for data parallelism
        optimizer = accelerator.prepare_optimizer(optimizer)
        # The data and the schedule stay as they are: prepared, each rank would get other batches, and the schedule too many steps.

    for step in range(done, options.steps):
        torch.manual_seed(step)  # dropout is a function of the step: no random state to save
        batches = [batch(step * ACCUMULATE + i, device) for i in range(ACCUMULATE)]
        rate = schedule.get_last_lr()[0]
        if options.accelerate:
            loss, norm = with_accelerate(accelerator, model, optimizer, batches)
        else:
            loss, norm = by_hand(model, optimizer, batches, precision)
        schedule.step()
        if show:
            print(f"step {step:3d}  loss {loss.item():.4f}  gradient norm {float(norm):.2f}  learning rate {rate:.1e}", flush=True)
        if step + 1 == options.steps or (step + 1) % options.save_every == 0:
            save(out, step + 1, model, optimizer, schedule)

    if options.accelerate:
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # without the casts
    autotp.save_pretrained(model, out / "model")
    prompt = torch.tensor([encode("Once upon a time ,")], device=device)
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": options.tokens, "do_sample": False, "pad_token_id": 0}
    ids = model.eval().generate(prompt, **arguments)[0].tolist()
    if show:
        print(f"tokens: {ids}\ntext: {decode(ids)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("AUTOTP_MODEL"), help="directory of a causal language model, safetensors")
    parser.add_argument("--out", default="finetuned", help="directory for states and the model")
    parser.add_argument("--steps", type=int, default=20, help="steps in all, those before a resume included")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS", help="and after the last step")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in OUT, on any number of ranks")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the products; weights are float32")
    parser.add_argument("--tokens", type=int, default=24, help="how many to generate at the end")
    parser.add_argument("--accelerate", action="store_true", help="let accelerate cast, accumulate, clip and step")
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
