"""What the tests of serving run on the ranks: models, and functions that `server.run` calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import autotp
from tests.integrations.subjects import gpt2, llama

PROMPTS = ([5, 6, 7], [9, 3, 2, 8, 1], [4], [11, 12, 13, 14, 15, 16, 17], [1, 1, 2, 3, 5], [63, 62], [30, 31, 32, 33], [7, 7, 7])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def models(name: str = "llama", *sizes: int) -> tuple[Any, Any]:
    """A model in eval mode, and the same one parallel over all ranks."""
    made = []
    for _ in range(2):
        model = (llama if name == "llama" else gpt2)(*sizes).eval()
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        made.append(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return made[0], autotp.parallelize(made[1], mesh, check="graph")


def ids(*prompt: int) -> Tensor:
    return torch.tensor([prompt or PROMPTS[0]])


def masked(prompt: Tensor) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones_like(prompt)}


def new_tokens(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """The tokens that one device adds to a prompt."""
    given = torch.tensor([prompt])
    return model.generate(given, **masked(given), **(GREEDY | options))[0, len(prompt) :].tolist()


@torch.no_grad()
def apart(found: Any, wanted: Any) -> float:
    return float((found.logits - wanted.logits).abs().max())


def caught(call: Callable[[], Any]) -> tuple[str, str]:
    """The name and the text of what a call raises."""
    try:
        call()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def fails(model: Any, prompt: Tensor, on: int, *, after: int = 0, error: type[BaseException] = ValueError) -> Tensor:
    """Calls the model, and raises on one rank after some calls."""
    for i in range(after + 1):
        if i == after and dist.get_rank() == on:
            raise error(f"on purpose on rank {on}")
        model(prompt)
    return model(prompt).logits


def ranks_value(model: Any) -> Tensor:
    """Another number on every rank."""
    return torch.tensor([float(dist.get_rank())])


def summed(model: Any, value: Tensor) -> Tensor:
    """The sum of the ranks' values."""
    total = value.clone()
    dist.all_reduce(total)
    return total


class OnlyOnRank0:
    """Can be sent, and not be received."""

    def __reduce__(self) -> Any:
        return _raise_elsewhere, ()


def _raise_elsewhere() -> None:
    raise ValueError("this process cannot make it")
