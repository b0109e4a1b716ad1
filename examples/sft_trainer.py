"""Fine-tune with trl's SFTTrainer over tensor parallelism and FSDP2: the model is loaded in parts, the rest is the trainer's.

With GPUs; on CPUs accelerate takes one process only (docs/accelerate.md), which is the same command with 1 and without --tp:

    torchrun --standalone --nproc-per-node 4 examples/sft_trainer.py --tp 2 --model path/to/a/model --out tuned --steps 20
    torchrun --standalone --nproc-per-node 8 examples/sft_trainer.py --tp 4 --model path/to/a/model --out tuned --steps 40 --resume

The ranks beside tp are data-parallel: they get other rows, and FSDP2 shards the model over them too. A step has 8 rows on any mesh.
OUT/checkpoint-N is what Trainer writes (OUT/checkpoint-N/training_state for any number of ranks); OUT/model is the tuned model, which
`AutoModelForCausalLM.from_pretrained` loads without autotp.

Without --model (or AUTOTP_MODEL) a tiny Llama with random weights is written to OUT/start. Where a model has no tokenizer beside it, the
words of the text below are taken for tokens of Llama's vocabulary.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import autotp
from autotp.integrations.trainer import ParallelTrainer

ROWS = 8  # sequences a step, on all data-parallel ranks together
WORDS = {"Once": 9038, "upon": 2501, "a": 263, "time": 931, "there": 727, "was": 471, "little": 2217, "girl": 7826, "L": 365, "ily": 2354}
WORDS |= {",": 29892, ".": 29889, "<unk>": 0, "</s>": 2}
TEXT = ("L ily was a little girl .", "L ily was a girl .", "L ily was there .", "Once upon a time , L ily was little .")


class Tuner(ParallelTrainer, SFTTrainer):
    """An SFTTrainer that resumes. Without checkpoints of the optimizer, SFTTrainer itself would do."""


def text() -> Dataset:
    """Rows of sentences, the same on every rank."""
    draw = random.Random(0)
    return Dataset.from_list([{"text": " ".join(draw.choices(TEXT, k=4))} for _ in range(64 * ROWS)])


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or one of the few words."""
    if (path / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(path)
    words = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="</s>")


def start(out: Path) -> Path:
    """The directory of a tiny model with random weights, written by rank 0."""
    if dist.get_rank() == 0 and not (out / "start").exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=32000)).save_pretrained(out / "start")
    dist.barrier()
    return out / "start"


def run(options: argparse.Namespace, device: str) -> None:
    """Load, train, save."""
    out = Path(options.out)
    data_parallel = dist.get_world_size() // options.tp
    mesh = init_device_mesh(device, (data_parallel, options.tp), mesh_dim_names=("dp", "tp"))
    path = Path(options.model) if options.model else start(out)
    model = autotp.from_pretrained(path, mesh, dtype=torch.float32)
    if data_parallel > 1:
        autotp.fully_shard(model, mesh)

    settings = SFTConfig(
        str(out),
        max_steps=options.steps,
        per_device_train_batch_size=ROWS // data_parallel // 2,
        gradient_accumulation_steps=2,
        learning_rate=options.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        save_steps=options.save_every,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Tuner(model, settings, train_dataset=text(), processing_class=tokenizer_of(path))
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(out / "model"))
    if dist.get_rank() == 0:
        for log in trainer.state.log_history:
            if "loss" in log:
                print(f"step {log['step'] - 1:3d}  loss {log['loss']:.4f}  gradient norm {log['grad_norm']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("AUTOTP_MODEL"), help="directory of a causal language model, safetensors")
    parser.add_argument("--out", default="tuned", help="directory for checkpoints and the model")
    parser.add_argument("--tp", type=int, default=1, help="ranks that are one copy of the model; the others are data-parallel")
    parser.add_argument("--steps", type=int, default=20, help="steps in all, those before a resume included")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT, on any mesh")
    parser.add_argument("--lr", type=float, default=5e-4)
    options = parser.parse_args()

    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and options.tp == 1:
        parser.error(f"{world} processes with --tp 1 are data parallelism alone, which Trainer does without autotp: give --tp")
    if world > 1 and not cuda and "ACCELERATE_TAKES_CPUS" not in os.environ:
        parser.error("accelerate takes tensor parallelism with GPUs only: start one process, or see examples/finetune.py")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    run(options, "cuda" if cuda else "cpu")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
