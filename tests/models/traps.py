"""Models that a careless plan shards wrongly: most run on a shard without an error and give other numbers.

Most traps are one operation between two Linears, `b(operation(relu(a(x))))`, on the width of 16 that joins them. The
outer widths 5 and 7 are odd, so that this width is the only one to shard. Traps with `kept` have no exact sharding (short
of gathering in the middle); those without may be sharded if the answer stays exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.entry import Entry, built, floats

OUTER, WIDTH, LAST = 5, 16, 7
Operation = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """An operation on the activations between two Linears."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        width = OPERATIONS[operation][0](torch.zeros(2, 3, WIDTH)).shape[-1]
        self.operation = operation
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(width, LAST)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(OPERATIONS[self.operation][0](F.relu(self.a(x)) + 0.1))


def branch(h: Tensor) -> Tensor:
    return h * 2 if h.shape[-1] > 10 else h - 1


def set_first(h: Tensor) -> Tensor:
    h = h.clone()
    h[..., 0] = 0
    return h


def set_half(h: Tensor) -> Tensor:
    h = h.clone()
    h[..., :5] += 1
    return h


def even_mask(h: Tensor) -> Tensor:
    return h.masked_fill(torch.arange(h.shape[-1]) % 3 == 0, 0.0)


def first_heads(h: Tensor) -> Tensor:
    return h.unflatten(-1, (4, 4))[..., :3, :].flatten(-2)


def cross_heads(h: Tensor) -> Tensor:
    return h[..., 6:14]


def swap_halves(h: Tensor) -> Tensor:
    left, right = h.chunk(2, -1)
    return torch.cat([right, left], -1)


def literal_groups(h: Tensor) -> Tensor:
    return h.view(*h.shape[:-1], 4, -1).softmax(-1).flatten(-2)


def inferred_groups(h: Tensor) -> Tensor:
    return h.view(*h.shape[:-1], -1, 4).softmax(-1).flatten(-2)


def transposed_groups(h: Tensor) -> Tensor:
    return h.view(*h.shape[:-1], 4, 4).transpose(-1, -2).flatten(-2)


def outer_product(h: Tensor) -> Tensor:
    return (h[..., :, None] * h[..., None, :]).sum(-1)


#: name → (operation, is there no exact sharding of the width?)
OPERATIONS: dict[str, tuple[Operation, bool]] = {
    "softmax": (lambda h: h.softmax(-1), True),
    "log_softmax": (lambda h: h.log_softmax(-1), True),
    "layer_norm": (lambda h: F.layer_norm(h, h.shape[-1:]), False),
    "rms_norm": (lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6), False),
    "normalise": (lambda h: F.normalize(h, dim=-1), False),
    "subtract_mean": (lambda h: h - h.mean(-1, keepdim=True), False),
    "divide_by_std": (lambda h: h / h.std(-1, keepdim=True), False),
    "divide_by_max": (lambda h: h / h.amax(-1, keepdim=True), False),
    "flip": (lambda h: h.flip(-1), True),
    "roll": (lambda h: h.roll(1, -1), True),
    "sort": (lambda h: h.sort(-1).values, True),
    "cumsum": (lambda h: h.cumsum(-1), True),
    "cumprod": (lambda h: h.cumprod(-1), True),
    "topk": (lambda h: h.topk(4, -1).values, True),
    "argmax_one_hot": (lambda h: F.one_hot(h.argmax(-1), WIDTH).to(h.dtype) * h, True),
    "strided_slice": (lambda h: h[..., ::2], False),
    "strided_slice_odd": (lambda h: h[..., 1::3], True),
    "prefix": (lambda h: h[..., :10], False),
    "first_heads": (first_heads, False),
    "cross_heads": (cross_heads, False),
    "select_first": (lambda h: h[..., 0:1] * h, True),
    "gather_columns": (lambda h: h[..., torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])], True),
    "index_select": (lambda h: h.index_select(-1, torch.arange(15, -1, -1)), True),
    "set_first": (set_first, True),
    "set_part": (set_half, False),
    "pad_circular": (lambda h: F.pad(h, (2, 2), mode="circular"), True),
    "pad_zero": (lambda h: F.pad(h, (1, 1)), False),
    "swap_halves": (swap_halves, False),
    "literal_groups": (literal_groups, False),
    "inferred_groups": (inferred_groups, False),
    "transposed_groups": (transposed_groups, False),
    "difference": (lambda h: h.diff(dim=-1), True),
    "unfold": (lambda h: h.unfold(-1, 4, 2).mean(-1), True),
    "fft": (lambda h: torch.fft.rfft(h, dim=-1).abs(), True),
    "outer_product": (outer_product, False),
    "width_as_number": (lambda h: h / h.shape[-1], True),
    "width_under_root": (lambda h: h * math.sqrt(h.size(-1)), True),
    "numel": (lambda h: h / h.numel(), True),
    "arange": (lambda h: h * torch.arange(h.shape[-1]), True),
    "linspace": (lambda h: h * torch.linspace(0, 1, h.shape[-1], dtype=h.dtype), True),
    "eye": (lambda h: h @ (torch.eye(h.shape[-1], dtype=h.dtype) + 0.1), True),
    "triangle": (lambda h: h @ torch.ones(h.shape[-1], h.shape[-1], dtype=h.dtype).tril(), False),
    "ones": (lambda h: h + torch.ones(h.shape[-1], dtype=h.dtype), False),
    "position_mask": (even_mask, True),
    "branch_on_width": (branch, True),
    "len_of_last": (lambda h: h * len(h[0, 0]), True),
    "nbytes": (lambda h: h * (h.nbytes / 1000), True),
    "fixed_table": (lambda h: h * torch.tensor([float(i % 3) for i in range(h.shape[-1])], dtype=h.dtype), True),
    "flatten_all": (lambda h: h.flatten(1).softmax(-1).view_as(h), True),
    "var_mean_all": (lambda h: (h - h.mean()) / h.var(), False),
    "cosine_with_self_rolled": (lambda h: h * F.cosine_similarity(h, h.roll(1, -1), dim=-1)[..., None], True),
}


class TwoSums(nn.Module):
    """Two results of row-wise sums that meet in something not linear: each must be reduced before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        p, q = self.b(h), self.c(h)
        match self.kind:
            case "product":
                return p * q
            case "square":
                return (p - q) ** 2
            case "relu_of_sum":
                return F.relu(p + q)
            case "where":
                return torch.where(p > 0, p, q)
            case _:
                return torch.maximum(p, q)


class BiasTwice(nn.Module):
    """A bias that is added by hand after a product whose sum crosses ranks, and then once more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)
        self.c = nn.Parameter(torch.randn(LAST))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) + self.b.bias + F.linear(h, self.b.weight) + self.c + self.c


class SharedBias(nn.Module):
    """One Linear used on two sharded activations: its bias counts twice, not twice the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) + self.b(torch.tanh(self.c(x)))


class MixedHeads(nn.Module):
    """Attention whose heads are mixed by a matrix before the softmax: no head stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, 3 * WIDTH), nn.Linear(WIDTH, LAST)
        self.c = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        w = torch.einsum("bhqk,hg->bgqk", q @ k.mT, self.c).softmax(-1)
        return self.b((w @ v).transpose(1, 2).flatten(2))


class LiteralHeads(nn.Module):
    """The head count is a number in the code and the size is inferred: left alone, smaller heads would come out on a shard."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(OUTER, WIDTH), nn.Linear(OUTER, WIDTH), nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 4, -1).transpose(1, 2) for f in (self.a, self.b, self.c))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class ScaleOfWidth(nn.Module):
    """Attention scaled by the whole width, which is not the width on a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, 3 * WIDTH), nn.Linear(WIDTH, LAST)
        self.h = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x).chunk(3, -1)
        scale = q.shape[-1] ** -0.5
        q, k, v = (z.unflatten(-1, (self.h, -1)).transpose(1, 2) for z in (q, k, v))
        return self.b(((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


class DoubleUse(nn.Module):
    """One attribute that means a head count here and a plain factor there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, 3 * WIDTH), nn.Linear(WIDTH, LAST)
        self.h = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (self.h, 4)).transpose(1, 2) for z in self.a(x).chunk(3, -1))
        return self.b(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)) * self.h


class ReadsWeight(nn.Module):
    """The forward reads a weight itself: its norm, its largest entry, its shape or its rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        match self.kind:
            case "norm":
                return y * self.a.weight.norm()
            case "max":
                return y * self.a.weight.abs().max()
            case "shape":
                return y * self.a.weight.shape[0]
            case "out_features":
                return y * self.a.out_features
            case "normed_weight":
                return self.b(F.linear(x, F.normalize(self.a.weight, dim=0), self.a.bias))
            case _:
                return y + F.linear(x, self.a.weight[:LAST], self.a.bias[:LAST])


class Item(nn.Module):
    """A Python number made from the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) * h.max().item()


class Square(nn.Module):
    """A Linear whose result is added to its own input: one width on both sides of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.c(h + F.relu(self.b(h)))


class ReplicatedInside(nn.Module):
    """Whole parameters used inside a sharded region: their gradients are partial sums and must be added up once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)
        self.c, self.d = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(4))
        self.g = 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.c
        h = (h.unflatten(-1, (-1, 4)) * self.d).flatten(-2)
        return self.b(F.relu(h)) * self.c


class CatOutside(nn.Module):
    """Sharded activations beside whole ones in front of one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH + OUTER, LAST)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([F.relu(self.a(x)), x], -1))


class Gram(nn.Module):
    """Activations multiplied with themselves over the sharded width, then a softmax: a sum in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b((h @ h.mT).softmax(-1) @ h)


class ReturnsInside(nn.Module):
    """The caller sees the activations between the Linears, and their width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.a(x))
        return self.b(h), h, h.argmax(-1)


class GroupNormed(nn.Module):
    """Group norm between two Linears: exact if whole groups stay together."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(OUTER, WIDTH), nn.GroupNorm(groups, WIDTH), nn.Linear(WIDTH, LAST)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x).mT).mT))


class Frozen(nn.Module):
    """Part of the activations carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST), nn.Linear(WIDTH, LAST)
        self.c.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        with torch.no_grad():
            g = self.b(h)
        return self.c(h.detach()) * g + self.c(h) + self.b(h)


_X = floats((2, 3, OUTER))
_INSIDE = ("a.weight", "b.weight")

TRAPS: tuple[Entry, ...] = (
    *(Entry(name, built(Between, name), _X, kept=_INSIDE if fixed else ()) for name, (_, fixed) in OPERATIONS.items()),
    *(Entry(f"two_sums_{kind}", built(TwoSums, kind), _X) for kind in ("product", "square", "relu_of_sum", "where", "maximum")),
    Entry("bias_twice", built(BiasTwice), _X, kept=("c", "b.bias")),
    Entry("shared_bias", built(SharedBias), _X, kept=("b.bias",)),
    Entry("mixed_heads", built(MixedHeads), _X, kept=("a.weight", "b.weight", "c")),
    Entry("literal_heads", built(LiteralHeads), _X, shards=("a.weight", "b.weight", "c.weight", "d.weight")),
    Entry("scale_of_width", built(ScaleOfWidth), _X, kept=_INSIDE),
    Entry("double_use", built(DoubleUse), _X, shards=("a.weight", "b.weight")),
    *(
        Entry(f"reads_weight_{kind}", built(ReadsWeight, kind), _X, kept=("a.weight",) if kind in ("shape", "max", "rows") else ())
        for kind in ("norm", "max", "shape", "out_features", "normed_weight", "rows")
    ),
    Entry("item", built(Item), _X, refusable=True),
    Entry("square", built(Square), _X),
    Entry("replicated_inside", built(ReplicatedInside), _X, kept=("c",)),
    Entry("cat_outside", built(CatOutside), _X),
    Entry("gram", built(Gram), _X),
    Entry("returns_inside", built(ReturnsInside), _X),
    Entry("group_norm_4", built(GroupNormed, 4), _X),
    Entry("group_norm_1", built(GroupNormed, 1), _X),
    Entry("frozen", built(Frozen), _X),
)
