"""A small decoder of any geometry: heads, key/value heads, widths and vocabulary need no common divisor with anything."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.testing.tiny.models import randomise


class Projection(Enum):
    """How queries, keys and values are made."""

    SEPARATE = "separate"
    CONCAT = "concat"  # one weight, rows (heads d | kv d | kv d)
    GROUPED = "grouped"  # one weight, rows kv (group d | d | d)


class QKNorm(Enum):
    """What queries and keys are normalised over."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


class Product(Enum):
    """How attention is computed, and what becomes of grouped heads."""

    REPEATED = "repeated"  # the fused operator on repeated keys and values
    GROUPED = "grouped"  # the fused operator told to group
    WRITTEN = "written"  # products and a softmax


class Mlp(Enum):
    """The first part of the mlp."""

    PLAIN = "plain"
    GATED = "gated"
    FUSED = "fused"  # one weight, rows (width | width)


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes and variants of one decoder. `hidden` 0 stands for heads · size."""

    kv: int
    group: int
    size: int = 2
    width: int = 12
    vocab: int = 16
    hidden: int = 0
    layers: int = 1
    projection: Projection = Projection.SEPARATE
    norm: QKNorm = QKNorm.NONE
    mlp: Mlp = Mlp.GATED
    activation: str = "gelu"
    bias: bool = False
    tied: bool = False
    rotary: bool = True
    product: Product = Product.REPEATED

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv * self.group

    @property
    def embedding(self) -> int:
        """Width of the residual stream."""
        return self.hidden or self.heads * self.size


class Norm(nn.Module):
    """Root mean square norm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor) -> Tensor:
    """`x` [batch, heads, length, size] turned by its position."""
    half = x.shape[-1] // 2
    at = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)
    angles = torch.outer(at, 10.0 ** -torch.arange(half, dtype=x.dtype, device=x.device))
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    """Causal attention with grouped key/value heads."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g, self.heads, self.kv, self.size = g, g.heads, g.kv, g.size
        if g.projection is Projection.SEPARATE:
            self.q = nn.Linear(g.embedding, g.heads * g.size, bias=g.bias)
            self.k = nn.Linear(g.embedding, g.kv * g.size, bias=g.bias)
            self.v = nn.Linear(g.embedding, g.kv * g.size, bias=g.bias)
        else:
            self.qkv = nn.Linear(g.embedding, (g.heads + 2 * g.kv) * g.size, bias=g.bias)
        self.o = nn.Linear(g.heads * g.size, g.embedding, bias=g.bias)
        if g.norm is QKNorm.HEAD:
            self.q_norm, self.k_norm = Norm(g.size), Norm(g.size)
        elif g.norm is QKNorm.FULL:
            self.q_norm, self.k_norm = Norm(g.heads * g.size), Norm(g.kv * g.size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [.., heads · size], keys and values [.., kv · size]."""
        if self.g.projection is Projection.SEPARATE:
            return self.q(x), self.k(x), self.v(x)
        if self.g.projection is Projection.CONCAT:
            own = self.kv * self.size
            return self.qkv(x).split([self.heads * self.size, own, own], -1)
        mixed = self.qkv(x).view(*x.shape[:-1], self.kv, self.heads // self.kv + 2, self.size)
        q, k, v = mixed.split([self.heads // self.kv, 1, 1], -2)
        return q.flatten(-3), k.flatten(-3), v.flatten(-3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x)
        if self.g.norm is QKNorm.FULL:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (z.view(b, t, -1, self.size) for z in (q, k, v))
        if self.g.norm is QKNorm.HEAD:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if self.g.rotary:
            q, k = rotate(q), rotate(k)
        group = self.heads // self.kv
        if group > 1 and self.g.product is Product.GROUPED:
            return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        if group > 1:
            k, v = (z[:, :, None].expand(b, self.kv, group, t, self.size).reshape(b, self.heads, t, self.size) for z in (k, v))
        if self.g.product is not Product.WRITTEN:
            return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(2, 3) * self.size**-0.5).masked_fill(hidden, float("-inf"))
        return self.join(scores.softmax(-1) @ v)

    def join(self, y: Tensor) -> Tensor:
        """[batch, heads, length, size] of all heads → [batch, length, width]."""
        return self.o(y.transpose(1, 2).contiguous().flatten(2))


class Feed(nn.Module):
    """The mlp."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.up = nn.Linear(g.embedding, g.width * (2 if g.mlp is Mlp.FUSED else 1), bias=g.bias)
        if g.mlp is Mlp.GATED:
            self.gate = nn.Linear(g.embedding, g.width, bias=g.bias)
        self.down = nn.Linear(g.width, g.embedding, bias=g.bias)

    def forward(self, x: Tensor) -> Tensor:
        act, h = ACTIVATIONS[self.g.activation], self.up(x)
        if self.g.mlp is Mlp.PLAIN:
            return self.down(act(h))
        gate, h = h.chunk(2, -1) if self.g.mlp is Mlp.FUSED else (self.gate(x), h)
        return self.down(act(gate) * h)


class Block(nn.Module):
    """Attention and mlp, each with its norm before and the residual around."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.before, self.attention = Norm(g.embedding), Attention(g)
        self.between, self.feed = Norm(g.embedding), Feed(g)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.feed(self.between(x))


class Decoder(nn.Module):
    """ids, targets [batch, length] → logits [batch, length, vocab] and the loss."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.embed = nn.Embedding(g.vocab, g.embedding)
        self.blocks = nn.ModuleList(Block(g) for _ in range(g.layers))
        self.norm = Norm(g.embedding)
        self.head = nn.Linear(g.embedding, g.vocab, bias=False)
        if g.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def decoder(g: Geometry) -> Decoder:
    """The decoder in float64, its weights drawn from a fixed seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Decoder(g)
    randomise(model, seed=3)
    return model.double()


def batch(g: Geometry, step: int = 0) -> dict[str, Tensor]:
    """Inputs of `Decoder.forward`."""
    made = torch.Generator().manual_seed(step)
    return {name: torch.randint(g.vocab, (2, 5), generator=made) for name in ("ids", "targets")}
