"""What a parallel model holds and sends on real ranks, counted on each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from autotp.rewrite.collectives.comm import GroupComm
from tests.support.collectives import noted
from tests.support.families import transformer
from tests.support.ranks import mesh

BATCH, PROMPT, NEW = 2, 24, 5
SEQUENCES, LENGTH = 3, 40


@dataclass(frozen=True)
class Counted:
    """Bytes of weights, of what autograd saves for the backward, of the cache at its longest; collectives by (kind, bytes)."""

    weights: int
    saved: int
    cache: int
    prefill: dict[tuple[str, int], int]
    decode: dict[tuple[str, int], int]
    forward: dict[tuple[str, int], int]
    backward: dict[tuple[str, int], int]


def build(kind: str) -> nn.Module:
    return transformer(kind, **({"experts": "grouped_mm"} if kind == "mixtral" else {}))


def count(kind: str, ranks: int, sequence_parallel: bool = False, recipe: Any = None) -> Counted:
    """Runs the model of a kind; collective where there are several ranks."""
    model: Any = build(kind)
    if ranks > 1:
        autotp.parallelize(model, mesh(), check="graph", sequence_parallel=sequence_parallel, recipe=recipe)
    own = {_local(p).untyped_storage().data_ptr(): _local(p).nbytes for p in model.parameters()}
    weights = sum(own.values())
    ids = torch.zeros(BATCH, PROMPT, dtype=torch.long)
    with _messages() as sent, torch.no_grad():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = _taken(sent)
        for _ in range(NEW - 1):
            sent.clear()
            out = model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        decode = _taken(sent)
    cache = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)
    own[ids.untyped_storage().data_ptr()] = 0
    model.train()
    with _messages() as sent:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = _taken(sent)
        loss.backward()
        backward = _taken(sent)
    return Counted(weights, sum(saved.values()), cache, prefill, decode, forward, backward)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _taken(sent: Counter[tuple[str, int]]) -> dict[tuple[str, int], int]:
    done = dict(sent)
    sent.clear()
    return done


@contextmanager
def _messages() -> Iterator[Counter[tuple[str, int]]]:
    """Collectives of activations and gradients that run inside; those that compare inputs are left out."""
    sent: Counter[tuple[str, int]] = Counter()

    def note(comm: GroupComm, kind: str, given: Tensor, nbytes: int) -> None:
        if kind != "all_gather" or given.is_floating_point():
            sent[kind, nbytes] += 1

    with noted(note):
        yield sent
