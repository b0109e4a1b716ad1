"""A model's way through files, on the ranks of a pool: written by transformers, loaded by autotp, saved, cut ahead, turned back.

Everything is compared with what transformers does on one rank, bit by bit; each finding is a line of text, none is a pass.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

import autotp
from autotp.checkpoint import shard, unshard
from tests.support.families import transformer
from tests.support.ranks import mesh


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names under which two state dicts differ, dtypes and NaN too."""
    names = [n for n in {**a, **b} if n not in a or n not in b]
    for n in [n for n in a if n in b]:
        x, y = a[n], b[n]
        same = x.dtype == y.dtype and x.shape == y.shape
        if not same or not torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)):
            names.append(n)
    return names


def files_differing(a: Path, b: Path) -> list[str]:
    """Files of two directories that are not the same bytes."""
    names = sorted({p.name for p in (*a.iterdir(), *b.iterdir())})
    return [n for n in names if not ((a / n).is_file() and (b / n).is_file() and (a / n).read_bytes() == (b / n).read_bytes())]


def checkpoints_differing(a: Path, b: Path) -> list[str]:
    """Where two checkpoints differ: in keys, bits, metadata or other files. How tensors are spread over files may differ."""
    names = sorted({p.name for p in (*a.iterdir(), *b.iterdir()) if not p.name.startswith("model")})
    found = [n for n in names if not ((a / n).is_file() and (b / n).is_file() and (a / n).read_bytes() == (b / n).read_bytes())]
    tensors, metadata = zip(*map(_contents, (a, b)), strict=True)
    if metadata[0] != metadata[1]:
        found.append(f"metadata {metadata[0]} and {metadata[1]}")
    return found + differing(*tensors)


def _contents(directory: Path) -> tuple[dict[str, Any], Any]:
    tensors: dict[str, Any] = {}
    metadata: list[Any] = []
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata.append(opened.metadata())
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        assert sorted(content["weight_map"]) == sorted(tensors)
        metadata.append(content["metadata"])
    return tensors, [m for i, m in enumerate(metadata) if m not in metadata[:i]]


def write(model: nn.Module, directory: Path, size: str) -> None:
    """The model as transformers writes it, on rank 0; all wait."""
    if dist.get_rank() == 0:
        model.save_pretrained(directory, max_shard_size=size)  # type: ignore[operator]
    dist.barrier()


def life(model_type: str, folder: str, dtype: torch.dtype | None = None, **overrides: Any) -> list[str]:
    """On every rank: the whole life of the tiny model of a type. Returns what was not as with transformers."""
    model = transformer(model_type, **overrides)
    return life_of(model if dtype is None else model.to(dtype), Path(folder))


def life_of(model: nn.Module, root: Path, size: str = "200KB") -> list[str]:
    """The same for a model that is there, equal on all ranks; `size`: of the files."""
    was, again, saved, cut, back = (root / name for name in ("was", "again", "saved", "cut", "back"))
    cls: Any = type(model)
    write(model, was, size)
    plain = cls.from_pretrained(was)
    found: list[str] = []

    def check(text: str, names: list[str]) -> None:
        if names:
            found.append(f"{text}: {', '.join(names[:5])}")

    def same_model(text: str, made: nn.Module) -> None:
        check(f"{text}: state", differing(autotp.full_state_dict(made), plain.state_dict()))
        buffers = ({n: b.cpu() for n, b in m.named_buffers()} for m in (made, plain))
        check(f"{text}: buffers", differing(*buffers))
        check(f"{text}: ties", sorted(_ties(made) ^ _ties(plain)))
        generation = [m.generation_config.to_dict() if m.can_generate() else {} for m in (made, plain)]
        check(f"{text}: generation", [k for k in {**generation[0], **generation[1]} if generation[0].get(k) != generation[1].get(k)])
        check(f"{text}: training", ["training"] if made.training else [])

    loaded = autotp.from_pretrained(was, mesh(), model_class=cls)
    same_model("loaded", loaded)
    autotp.save_pretrained(loaded, saved, max_shard_size=size)
    write(plain, again, size)
    check("saved", checkpoints_differing(saved, again))
    if dist.get_rank() == 0:
        shard(was, cut, tp=dist.get_world_size(), model_class=cls)
    dist.barrier()
    plain = cls.from_pretrained(was)
    from_cut = autotp.from_pretrained(cut, mesh(), model_class=cls)
    same_model("from cut", from_cut)
    if dist.get_rank() == 0:
        shutil.rmtree(saved)
        unshard(cut, back)
        check("unshard", files_differing(back, was))
    dist.barrier()
    autotp.save_pretrained(from_cut, saved, max_shard_size=size)
    check("saved from cut", checkpoints_differing(saved, again))
    return found


def _ties(model: nn.Module) -> set[str]:
    first: dict[int, str] = {}
    return {f"{n} = {first[id(p)]}" for n, p in model.named_parameters(remove_duplicate=False) if first.setdefault(id(p), n) != n}
