"""A zoo of hand-written models. Their names mean nothing on purpose: a plan for them can only come from what they compute."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.entry import Entry, built, floats, tokens

WIDTH, HEADS, SIZE, VOCAB, INNER = 32, 8, 4, 32, 48


class FusedSelf(nn.Module):
    """Attention from one fused projection, cut by a width attribute, as in small teaching codes."""

    def __init__(self, n_embd: int = WIDTH, n_head: int = HEADS) -> None:
        super().__init__()
        self.a = nn.Linear(n_embd, 3 * n_embd)
        self.b = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.a(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.b(y.transpose(1, 2).contiguous().view(B, T, C))


class Two(nn.Module):
    """Linear, gelu, Linear."""

    def __init__(self, width: int = WIDTH, inner: int = INNER) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


class Block(nn.Module):
    """Norm, mixer, norm, mlp, with a residual around each."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.p, self.q = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.r, self.s = mixer, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.r(self.p(x))
        return x + self.s(self.q(x))


class Language(nn.Module):
    """Embeddings, blocks, a head tied to the embedding; a loss where targets are given."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(VOCAB, WIDTH), nn.Embedding(16, WIDTH)
        self.c = nn.ModuleList(Block(FusedSelf(), Two()) for _ in range(layers))
        self.d = nn.LayerNorm(WIDTH)
        self.e = nn.Linear(WIDTH, VOCAB, bias=False)
        self.e.weight = self.a.weight

    def forward(self, i: Tensor, t: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(i) + self.b(torch.arange(i.shape[1], device=i.device))
        for block in self.c:
            x = block(x)
        z = self.e(self.d(x))
        return z if t is None else (z, F.cross_entropy(z.flatten(0, 1), t.flatten()))


class InlineHead(Language):
    """The same with the table multiplied in the model's own forward: no module returns the logits."""

    def forward(self, i: Tensor, t: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(i) + self.b(torch.arange(i.shape[1], device=i.device))
        for block in self.c:
            x = block(x)
        z = F.linear(self.d(x), self.a.weight)
        return z if t is None else (z, F.cross_entropy(z.flatten(0, 1), t.flatten()))


class Einsum(nn.Module):
    """Attention over parameters of three dims: heads, embedding, size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(HEADS, WIDTH, SIZE)) for _ in range(3))
        self.d = nn.Parameter(torch.randn(HEADS, SIZE, WIDTH))
        self.z3 = nn.Parameter(torch.zeros(HEADS, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bte,hed->bhtd", x, self.a) + self.z3[:, None, :]
        k = torch.einsum("bte,hed->bhtd", x, self.b)
        v = torch.einsum("bte,hed->bhtd", x, self.c)
        w = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(SIZE**-0.5).softmax(-1)
        return torch.einsum("bhqk,bhkd,hde->bqe", w, v, self.d)


class OneProjection(nn.Module):
    """Queries, keys, values and both halves of a gated mlp from one matrix; one matrix takes attention and mlp back."""

    def __init__(self, kv: int = HEADS) -> None:
        super().__init__()
        self.n, self.m, self.f = HEADS, kv, INNER
        self.sizes = (HEADS * SIZE, kv * SIZE, kv * SIZE, 2 * INNER)
        self.a = nn.Linear(WIDTH, sum(self.sizes), bias=False)
        self.b = nn.Linear(HEADS * SIZE + INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = self.a(x).split(self.sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, SIZE)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.m != self.n)
        u, w = g.chunk(2, dim=-1)
        return x + self.b(torch.cat([y.transpose(1, 2).flatten(2), F.silu(u) * w], dim=-1))


class PickedRows(nn.Module):
    """One matrix whose rows are, for each key-value head, its query heads, then its key and its value, picked by negative indices."""

    def __init__(self, kv: int, group: int) -> None:
        super().__init__()
        self.form = (kv, group + 2, SIZE)
        self.a = nn.Linear(WIDTH, kv * (group + 2) * SIZE)
        self.b = nn.Linear(kv * group * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).unflatten(-1, self.form)
        q = y[..., :-2, :].flatten(2, 3).transpose(1, 2)
        k, v = (y[..., i, :].transpose(1, 2) for i in (-2, -1))
        z = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.b(z.transpose(1, 2).flatten(2))


class PerHead(nn.Module):
    """A temperature for each head as a parameter, a slope for each head as a buffer, a norm on each head's queries."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.t = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.n = nn.LayerNorm(SIZE)
        self.register_buffer("s", torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)]))
        self.h = HEADS

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.h, SIZE).transpose(1, 2) for f in (self.a, self.b, self.c))
        far = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        w = self.n(q) @ k.transpose(-1, -2) * self.t + far * self.s.view(self.h, 1, 1)
        y = w.masked_fill(far > 0, float("-inf")).softmax(-1) @ v
        return self.d(y.transpose(1, 2).reshape(b, t, self.h * SIZE))


class Again(nn.Module):
    """One block applied three times: its gradients add up."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Block(FusedSelf(), Two())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.a(x)
        return x


class TiedLinears(nn.Module):
    """Two Linears with one weight and different biases, in two mlps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Two(), Two()
        self.b.a.weight = self.a.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class TiedTranspose(nn.Module):
    """A weight that widens and, transposed, narrows again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.a)), self.a.t())


class Cross(nn.Module):
    """Attention of one sequence over another."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.heads = heads

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.a(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.b(y).chunk(2, -1))
        return self.c(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Translator(nn.Module):
    """Encoder and decoder with cross attention; source and target share the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(VOCAB, WIDTH)
        self.b, self.c = Block(Bidirectional(), Two()), Block(FusedSelf(), Two())
        self.d = Cross()
        self.e = nn.Linear(WIDTH, VOCAB)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        m = self.b(self.a(s))
        x = self.c(self.a(t))
        return self.e(x + self.d(x, m))


class Bidirectional(nn.Module):
    """Attention without a causal mask, written with baddbmm and heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.k = HEADS

    def forward(self, x: Tensor) -> Tensor:
        n, t, w = x.shape
        q, k, v = (
            f(x).view(n, t, self.k, w // self.k).transpose(1, 2).reshape(n * self.k, t, w // self.k) for f in (self.a, self.b, self.c)
        )
        s = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(w // self.k)
        y = torch.bmm(s.softmax(dim=-1), v)
        return self.d(y.view(n, self.k, t, w // self.k).transpose(1, 2).reshape(n, t, w))


class Gated(nn.Module):
    """A gated mlp: separate matrices, one matrix cut in halves, or one with gate and value interleaved."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Linear(WIDTH, INNER if kind == "separate" else 2 * INNER)
        self.b = nn.Linear(WIDTH, INNER) if kind == "separate" else nn.Identity()
        self.c = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "separate":
            return self.c(F.silu(self.a(x)) * self.b(x))
        h = self.a(x)
        g, u = h.chunk(2, dim=-1) if self.kind == "halves" else (h[..., ::2], h[..., 1::2])
        return self.c(F.silu(g) * u)


class Deep(nn.Module):
    """Five Linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(
            nn.Linear(10, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.GELU(),
            nn.Linear(64, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Grouped(nn.Module):
    """Fewer key-value heads than query heads, widened by repeat_interleave, by expand, or left to matmul (one head)."""

    def __init__(self, kind: str, kv: int) -> None:
        super().__init__()
        self.kind, self.n, self.m = kind, HEADS, kv
        self.a = nn.Linear(WIDTH, HEADS * SIZE)
        self.b, self.c = nn.Linear(WIDTH, kv * SIZE), nn.Linear(WIDTH, kv * SIZE)
        self.d = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.a(x).view(b, t, self.n, SIZE).transpose(1, 2)
        k, v = (f(x).view(b, t, self.m, SIZE).transpose(1, 2) for f in (self.b, self.c))
        if self.kind == "interleave":
            k, v = (z.repeat_interleave(self.n // self.m, dim=1) for z in (k, v))
        elif self.kind == "expand":
            k, v = (z[:, :, None].expand(b, self.m, self.n // self.m, t, SIZE).reshape(b, self.n, t, SIZE) for z in (k, v))
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.d(y.transpose(1, 2).reshape(b, t, -1))


class ConvStem(nn.Module):
    """Pictures cut to patches by a convolution, a class token, learned positions, a block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, WIDTH, 4, 4)
        self.b = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.c = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.d = Block(Bidirectional(), Two())
        self.e = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.b.expand(x.shape[0], -1, -1), x], dim=1) + self.c
        return self.e(self.d(x)[:, 0])


class Experts(nn.Module):
    """A router chooses two of four mlps for each token; results are added where they belong."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, 4, bias=False)
        self.b = nn.ModuleList(Gated("separate") for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weight, chosen = self.a(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.b):
            row, slot = torch.where(chosen == number)
            out.index_add_(0, row, expert(flat[row]) * weight[row, slot, None])
        return out.view_as(x)


class DenseExperts(nn.Module):
    """All experts on all tokens by batched products over parameters of three dims, weighted by a softmax router."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, 4)
        self.b = nn.Parameter(torch.randn(4, WIDTH, 2 * INNER))
        self.c = nn.Parameter(torch.randn(4, INNER, WIDTH))
        self.d = nn.Parameter(torch.zeros(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        g, u = torch.bmm(flat.expand(4, -1, -1), self.b).chunk(2, dim=-1)
        y = torch.bmm(F.silu(g) * u, self.c) + self.d[:, None]
        return (y * self.a(flat).softmax(-1).t()[..., None]).sum(0).view_as(x)


class ParallelResidual(nn.Module):
    """Attention and mlp read one norm and are added together: one sum can do for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.LayerNorm(WIDTH), FusedSelf(), Two()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return x + self.b(h) + self.c(h)


class Rotary(nn.Module):
    """Rotary positions by rotating halves or by complex numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.h = kind, HEADS
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 10.0 ** -torch.arange(SIZE // 2, dtype=x.dtype)
        if self.kind == "complex":
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
            return torch.view_as_real(z).flatten(-2)
        both = torch.cat([angle, angle], -1)
        left, right = x.chunk(2, -1)
        return x * both.cos() + torch.cat([-right, left], -1) * both.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.h, SIZE).transpose(1, 2) for f in (self.a, self.b, self.c))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.d(y.transpose(1, 2).reshape(b, t, self.h * SIZE))


class WideNorm(nn.Module):
    """Queries and keys normed over all heads together: the statistic crosses ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.p, self.q = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.h = HEADS

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f.view(b, t, self.h, SIZE).transpose(1, 2) for f in (self.p(self.a(x)), self.q(self.b(x)), self.c(x)))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, self.h * SIZE))


class RelativeBias(nn.Module):
    """A table of biases by distance and head, added to the attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(11, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = self.a(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        bias = self.c(torch.arange(t)[:, None] - torch.arange(t)[None, :] + 5).permute(2, 0, 1)
        return self.b(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


class GatedConv(nn.Module):
    """A causal convolution of each channel by itself between two projections, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)
        self.c = nn.Conv1d(INNER, INNER, 3, groups=INNER, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.a(x).chunk(2, -1)
        y = self.c(u.mT)[..., : x.shape[1]].mT
        return self.b(F.silu(y) * torch.sigmoid(g))


class State(nn.Module):
    """A linear recurrence over time with one state matrix a head, as a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.e = nn.Parameter(torch.zeros(HEADS))
        self.n = HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.n, SIZE)) for f in (self.a, self.b, self.c))
        decay = torch.sigmoid(self.e)[None, :, None, None]
        state = torch.zeros(x.shape[0], self.n, SIZE, SIZE, dtype=x.dtype)
        out = []
        for t in range(x.shape[1]):
            state = state * decay + k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((q[:, t, :, None, :] @ state).squeeze(-2))
        return self.d(torch.stack(out, 1).flatten(2))


class TorchEncoder(nn.Module):
    """torch's own encoder layers, with their packed projection."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, batch_first=True)
        self.a = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Recurrent(nn.Module):
    """A GRU between two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))[0])


class Structured(nn.Module):
    """Outputs in a dict with a tuple and a non-tensor; a keyword with a default; inner activations returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor, *, scale: float = 2.0) -> dict[str, object]:
        h = F.relu(self.a(x))
        return {"y": self.b(h) * scale, "inner": (h, h.sum()), "width": h.shape[-1], "none": None}


_X = floats((2, 6, WIDTH))

CUSTOM: tuple[Entry, ...] = (
    Entry("fused_qkv", built(FusedSelf), _X, shards=("a.weight", "a.bias", "b.weight")),
    Entry("two_linears", built(Two), _X, shards=("a.weight", "a.bias", "b.weight"), kept=("b.bias",)),
    Entry("language_model", built(Language), tokens((2, 6)), shards=("c.0.r.a.weight", "c.1.r.b.weight", "c.0.s.a.weight", "a.weight")),
    Entry("language_model_with_loss", built(Language), tokens((2, 6), (2, 6)), shards=("c.0.r.a.weight", "c.1.s.b.weight")),
    Entry("language_model_inline_head", built(InlineHead), tokens((2, 6)), shards=("c.0.r.a.weight",), kept=("a.weight",)),
    Entry("einsum_attention", built(Einsum), _X, shards=("a", "b", "c", "d", "z3")),
    Entry("one_projection", built(OneProjection), _X, shards=("a.weight", "b.weight")),
    Entry("one_projection_grouped", built(OneProjection, kv=4), _X, shards=("a.weight", "b.weight")),
    Entry("one_projection_one_kv", built(OneProjection, kv=1), _X, shards=("a.weight", "b.weight")),
    Entry("picked_rows", built(PickedRows, 2, 3), _X, shards=("a.weight", "b.weight")),
    Entry("picked_rows_one_kv", built(PickedRows, 1, 5), _X, shards=("a.weight", "a.bias", "b.weight")),
    Entry("per_head", built(PerHead), _X, shards=("a.weight", "t", "d.weight"), kept=("n.weight",)),
    Entry("block_used_three_times", built(Again), _X, shards=("a.r.a.weight", "a.s.b.weight")),
    Entry("tied_linears", built(TiedLinears), _X, shards=("a.a.weight", "b.b.weight")),
    Entry("tied_transpose", built(TiedTranspose), _X, shards=("a",)),
    Entry("translator", built(Translator), tokens((2, 6), (2, 5)), shards=("d.a.weight", "d.b.weight", "b.r.a.weight")),
    Entry("bidirectional", built(Bidirectional), _X, shards=("a.weight", "d.weight")),
    Entry("gated_separate", built(Gated, "separate"), _X, shards=("a.weight", "b.weight", "c.weight")),
    Entry("gated_halves", built(Gated, "halves"), _X, shards=("a.weight", "c.weight")),
    Entry("gated_interleaved", built(Gated, "interleaved"), _X, shards=("a.weight", "c.weight")),
    Entry("deep_mlp", built(Deep), floats((4, 10)), shards=("a.2.weight", "a.6.weight")),
    Entry("gqa_interleave", built(Grouped, "interleave", 4), _X, shards=("a.weight", "b.weight", "d.weight")),
    Entry("gqa_expand", built(Grouped, "expand", 4), _X, shards=("a.weight", "b.weight", "d.weight")),
    Entry("gqa_two_kv", built(Grouped, "interleave", 2), _X, shards=("a.weight", "d.weight")),
    Entry("mqa", built(Grouped, "broadcast", 1), _X, shards=("a.weight", "d.weight"), kept=("b.weight", "c.weight")),
    Entry("conv_stem", built(ConvStem), floats((2, 3, 8, 8)), shards=("d.r.a.weight", "d.s.b.weight")),
    Entry("experts_index_add", built(Experts), _X, shards=("b.0.a.weight", "b.3.c.weight")),
    Entry("experts_dense", built(DenseExperts), _X, shards=("b", "c")),
    Entry("parallel_residual", built(ParallelResidual), _X, shards=("b.a.weight", "c.b.weight")),
    Entry("rotary_halves", built(Rotary, "halves"), _X, shards=("a.weight", "d.weight")),
    Entry("rotary_complex", built(Rotary, "complex"), _X, shards=("a.weight", "d.weight")),
    Entry("wide_norm", built(WideNorm), _X),
    Entry("relative_bias", built(RelativeBias), _X),
    Entry("gated_conv", built(GatedConv), _X, shards=("a.weight", "b.weight")),
    Entry("state_loop", built(State), _X, shards=("a.weight", "d.weight")),
    Entry("torch_encoder", built(TorchEncoder), _X),
    Entry("recurrent", built(Recurrent), floats((2, 6, 10))),
    Entry("structured_output", built(Structured), _X, kept=("a.weight", "b.weight")),
)
