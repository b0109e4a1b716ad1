"""Generate text on several ranks.

    torchrun --standalone --nproc-per-node 2 examples/generate.py
    torchrun --standalone --nproc-per-node 2 examples/generate.py --model path/to/a/model/directory --ids 1 9038 2501 263 931

Without --model (or AUTOTP_MODEL) a tiny Llama with random weights is used, so the tokens mean nothing; what matters is that every
rank gives the tokens that one process gives.
"""

from __future__ import annotations

import argparse
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import autotp


def load(path: str | None) -> PreTrainedModel:
    """The model in `path`, or a tiny one; the same on every rank."""
    if path:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config)


def compare(options: argparse.Namespace, device: str) -> bool:
    """Generate before and after `parallelize` and print both; True where every rank got the same tokens twice."""
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = load(options.model).eval().to(device)
    prompt = torch.tensor([options.ids], device=device)
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": options.tokens, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(prompt, **arguments)

    model = autotp.parallelize(model, mesh)
    parallel = model.generate(prompt, **arguments)

    if dist.get_rank() == 0:
        print(f"one rank:  {whole[0, prompt.shape[1] :].tolist()}")
        print(f"{dist.get_world_size()} ranks:   {parallel[0, prompt.shape[1] :].tolist()}")
    equal = torch.tensor(int(torch.equal(whole, parallel)), device=device)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("AUTOTP_MODEL"), help="directory of a causal language model")
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 15, 27, 8], help="token ids to continue")
    parser.add_argument("--tokens", type=int, default=16, help="how many to generate")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    equal = compare(options, "cuda" if cuda else "cpu")
    # A thread of gloo lets go of the last tensors a moment after the collective returns; should the interpreter be ending by then, it
    # aborts the process. What the model holds goes first, and gives it that moment.
    gc.collect()
    dist.destroy_process_group()
    if not equal:
        raise SystemExit("the ranks' tokens differ from those of one rank")


if __name__ == "__main__":
    main()
