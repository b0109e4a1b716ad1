"""Mixtures of experts as a user writes them: some that may be dealt whole, and some whose code rules it out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HIDDEN, WIDTH = 16, 24


class Experts(nn.Module):
    """Loops over its experts; `variant` spoils it in one way."""

    def __init__(self, number: int, variant: str = "") -> None:
        super().__init__()
        self.num_experts, self.variant, self.least = number, variant, 64
        self.up = nn.Parameter(torch.randn(number, WIDTH, HIDDEN) / 4)
        self.bias = nn.Parameter(torch.randn(number, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(number, HIDDEN, WIDTH) / 4)
        self.act = nn.SiLU()
        if variant == "counts":
            self.register_buffer("load", torch.zeros(number))
        if variant == "prepares":
            self.pre = nn.Tanh()
        if variant == "looks":
            self.look = nn.Identity()
        if variant == "dropout":
            self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if self.variant == "normalises":
            weights = weights / weights.sum(-1, keepdim=True)
        if self.variant == "prepares":
            x = self.pre(x)
        if self.variant == "looks":
            index = self.look(index)
        if self.variant == "mixes":
            x = x + x.mean(0)
        if self.variant == "remembers":
            self.last = index
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            if self.variant == "drops" or (self.variant == "drops in training" and self.training):
                most = max(self.least, len(x) * index.shape[1] // self.num_experts)
                token, slot = token[:most], slot[:most]
            h = self.act(x[token] @ self.up[expert].T + self.bias[expert])
            if self.variant == "dropout":
                h = self.drop(h)
            out = out.index_add(0, token, (h @ self.down[expert].T) * weights[token, slot, None])
        return out


class Batched(Experts):
    """Picks the weights of each pair; nothing in it says how many experts there are."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        h = self.act(torch.einsum("th,tkwh->tkw", x, self.up[index]) + self.bias[index])
        return (torch.einsum("tkw,tkhw->tkh", h, self.down[index]) * weights[..., None]).sum(1)


class Block(nn.Module):
    """Routes each token to k experts. `bias`: which experts are chosen whatever the token is."""

    def __init__(self, experts: nn.Module, number: int, bias: tuple[float, ...] = (), k: int = 2) -> None:
        super().__init__()
        self.experts, self.k = experts, k
        self.gate = nn.Linear(HIDDEN, number)
        if bias:
            with torch.no_grad():
                self.gate.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, index = self.gate(flat).softmax(-1).topk(self.k)
        return x + self.experts(flat, index, weights).view_as(x)


class Model(nn.Module):
    """Blocks between two linears."""

    def __init__(self, make: Any = Experts, number: int = 4, bias: tuple[float, ...] = (), k: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(5, HIDDEN)
        self.blocks = nn.ModuleList(Block(make(number), number, bias, k) for _ in range(2))
        self.leave = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)  # type: ignore[no-any-return]


class Checkpointed(Model):
    """Its blocks run again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.leave(x)  # type: ignore[no-any-return]


def spoilt(variant: str) -> Any:
    """Makes models whose experts have a variant."""
    return partial(Model, partial(Experts, variant=variant))


def inputs() -> dict[str, Tensor]:
    """A batch of 2 × 5 tokens."""
    return {"x": torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(2))}
