"""Small modules in idioms that a plan can get wrong without noticing, by kind.

Each must be equal to itself on one device or be refused; those with `sharded` are equal, and sharded too. Most are one function `f`
between two Linears, `b(f(a(x)))`; x is [2, 6, 8]. What the parent, the caller or autograd does around the module is a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import holes_calls as calls
from tests.models import holes_state as state
from tests.models.holes_parts import OUTER, Mid

X = torch.randn(2, 6, OUTER, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True, slots=True)
class Hole:
    """`more`: further calls after the traced one, by name: changes to the keyword arguments. `sharded`: must be, at 2 ranks and at 3.

    `alike`: others here nearly cover it.
    """

    name: str
    factory: Callable[[], nn.Module]
    sharded: bool = False
    inputs: Mapping[str, Any] = field(default_factory=lambda: {"x": X})
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alike: bool = False

    def build(self) -> nn.Module:
        """The model with weights drawn afresh, so that biases and norms show."""
        from autotp.testing.tiny.models import randomise

        torch.manual_seed(0)
        model = self.factory()
        randomise(model, seed=3)
        return model

    def __str__(self) -> str:
        return self.name


def grouped(statistic: Callable[[Tensor], Tensor], groups: int) -> Callable[[Tensor], Tensor]:
    """`statistic` over the last dim of `groups` groups: a number in the code, so no rank can have fewer."""
    return lambda h: statistic(h.view(*h.shape[:-1], groups, -1)).flatten(-2)


def sized(statistic: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """`statistic` over groups of `size`, as many as there are."""
    return lambda h: statistic(h.view(*h.shape[:-1], -1, size)).flatten(-2)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda y: F.rms_norm(y, (y.shape[-1],), eps=1e-3),
    "layer_norm": lambda y: F.layer_norm(y, y.shape[-1:], eps=1e-3),
    "rms_by_hand": lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3),
    "norm": lambda y: y / (1 + y.norm(dim=-1, keepdim=True)),
    "std": lambda y: y / (1 + y.std(-1, keepdim=True)),
    "var": lambda y: y * y.var(-1, keepdim=True, unbiased=False),
    "mean": lambda y: y - y.mean(-1, keepdim=True),
    "softmax": lambda y: y.softmax(-1),
    "max": lambda y: y - y.max(-1, keepdim=True).values,
    "normalize": lambda y: F.normalize(y, dim=-1),
    "std_mean": lambda y: (y - torch.std_mean(y, -1, keepdim=True)[1]) / (1 + torch.std_mean(y, -1, keepdim=True)[0]),
    "across": lambda y: y.softmax(-2),
}

#: groups × size: 2 or 3 ranks divide the groups, the size, both or neither.
GROUPS = [(3, 4), (2, 6), (4, 3), (5, 2)]

INDEX = torch.zeros(2, 1, 3, dtype=torch.long)
ORDER = torch.tensor([3, 1, 0, 2, 5, 4, 7, 6, 11, 10, 9, 8])
ROWS = torch.tensor([2, 0, 5])

COMPOSITES: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive_avg_pool1d": lambda h: h * F.adaptive_avg_pool1d(h, 1),
    "adaptive_avg_pool_module": lambda h: h + nn.AdaptiveAvgPool1d(1)(h),
    "adaptive_max_pool1d": lambda h: h - F.adaptive_max_pool1d(h, 1),
    "avg_pool1d": lambda h: h + F.avg_pool1d(h, 3, 1, 1),
    "matrix_norm": lambda h: h / torch.linalg.matrix_norm(h, keepdim=True),
    "cosine_similarity": lambda h: h * F.cosine_similarity(h, h.roll(1, 1), dim=-1)[..., None],
    "normalize_all": lambda h: F.normalize(h, dim=-1),
    "pairwise_distance": lambda h: h * F.pairwise_distance(h, h.roll(1, 1), keepdim=True),
    "cdist": lambda h: torch.cdist(h, h.roll(1, 1)) @ h,
    "kl_div": lambda h: h * F.kl_div(h.log_softmax(-1), h.roll(1, 1).softmax(-1), reduction="batchmean"),
    "cosine_embedding_loss": lambda h: h * F.cosine_embedding_loss(h.flatten(0, 1), h.roll(1, 1).flatten(0, 1), torch.ones(12)),
    "mse_loss": lambda h: h * F.mse_loss(h, h.roll(1, 1)),
    "mse_loss_of_halves": lambda h: h * F.mse_loss(h[..., :6], h[..., 6:]),
    "local_response_norm": lambda h: F.local_response_norm(h.transpose(1, 2), 3).transpose(1, 2),
    "group_norm": lambda h: F.group_norm(h.transpose(1, 2), 4).transpose(1, 2),
}

INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "scatter_short": lambda h: h.scatter(1, INDEX, 5.0),
    "scatter_add_short": lambda h: h.scatter_add(1, INDEX, torch.ones(2, 1, 12, dtype=h.dtype)),
    "scatter_on_it": lambda h: h.scatter(-1, ORDER[:5].expand(2, 6, 5), 0.5),
    "scatter_reduce_short": lambda h: h.scatter_reduce(1, INDEX, torch.ones(2, 1, 3, dtype=h.dtype), "sum"),
    "gather_short": lambda h: h + h.gather(1, INDEX).sum(-1, keepdim=True),
    "gather_on_it": lambda h: h.gather(-1, ORDER.expand(2, 6, 12)),
    "gather_beside_it": lambda h: h + h.gather(1, torch.zeros(2, 1, 12, dtype=torch.long)),
    "take_along_dim": lambda h: torch.take_along_dim(h, h.argsort(-1), -1),
    "index_add_on_it": lambda h: h.index_add(-1, ORDER[:3], h[..., :3]),
    "index_add_beside_it": lambda h: h.index_add(1, ROWS, h[:, :3]),
    "index_copy_on_it": lambda h: h.index_copy(-1, ORDER[:3], h[..., -3:]),
    "index_copy_beside_it": lambda h: h.index_copy(1, ROWS, h[:, :3] * 2),
    "index_fill_on_it": lambda h: h.index_fill(-1, ORDER[:3], 0.5),
    "index_select_on_it": lambda h: h.index_select(-1, ORDER),
    "index_put_on_it": lambda h: h.index_put((torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([3, 9])), h.new_ones(2)),
    "index_list": lambda h: h[..., ORDER.tolist()],
    "masked_fill": lambda h: h.masked_fill(torch.arange(12) % 5 == 0, 0.5),
    "narrow": lambda h: torch.cat([h.narrow(-1, 5, 7), h.narrow(-1, 0, 5)], -1),
    "roll": lambda h: h.roll(1, -1),
    "flip": lambda h: h.flip(-1),
    "topk": lambda h: h * h.topk(2, -1).values.sum(-1, keepdim=True),
    "sort": lambda h: h.sort(-1).values,
    "cumsum": lambda h: h.cumsum(-1),
    "diagonal": lambda h: h + h.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None],
}

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_in_place": lambda h: F.relu(h, inplace=True),
    "relu_module_in_place": nn.ReLU(inplace=True),
    "mul_in_place": lambda h: h.mul_(2),
    "add_in_place": lambda h: h.add_(h.tanh()),
    "clamp_of_a_view": lambda h: (h[..., 1:].clamp_(-0.1, 0.1), h)[1],
    "clamp_of_groups": lambda h: (h.view(2, 6, 3, 4).clamp_(-0.1, 0.1), h)[1],
    "set_first_row": lambda h: (h.__setitem__((slice(None), 0), 0.0), h)[1],
    "set_first_entry": lambda h: (h.__setitem__((..., 0), 0.0), h)[1],
    "masked_in_place": lambda h: h.masked_fill_(h < 0, 0.0),
    "softmax_into_itself": lambda h: h.copy_(h.softmax(-1)),
}


def heads_looped(h: Tensor) -> Tensor:
    return torch.cat([y * (i + 1) for i, y in enumerate(h.chunk(4, -1))], -1)


def heads_unbound(h: Tensor) -> Tensor:
    return torch.stack([y.softmax(-1) for y in h.view(2, 6, 6, 2).unbind(2)], 2).flatten(2)


def heads_by_len(h: Tensor) -> Tensor:
    many = len(h.view(2, 6, 6, 2).unbind(2))
    return h / many


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_looped": heads_looped,
    "heads_unbound": heads_unbound,
    "heads_by_len": heads_by_len,
    "size_over_heads": lambda h: h.view(2, 6, 4, h.size(-1) // 4).softmax(-1).flatten(2),
    "root_of_the_width": lambda h: h * h.shape[-1] ** -0.5,
    "mean_by_hand": lambda h: h - h.sum(-1, keepdim=True) / h.shape[-1],
    "count_of_entries": lambda h: h / h.numel(),
    "halves_swapped": lambda h: torch.cat(h.chunk(2, -1)[::-1], -1),
    "einsum_of_heads": lambda h: torch.einsum("bngd,bmgd->bnmg", h.view(2, 6, 3, 4), h.view(2, 6, 3, 4)).softmax(2).sum(2).repeat(1, 1, 4),
    "scaled_partial_sum": lambda h: h.cumsum(1) * 0.5,
    "expanded": lambda h: h[:, :1].expand(-1, 6, -1) * h,
    "repeated": lambda h: h.repeat(1, 1, 2)[..., 6:18],
    "first_head_for_all": lambda h: (h.view(2, 6, 3, 4)[:, :, :1] * h.view(2, 6, 3, 4)).flatten(2),
    "complex_pairs": lambda h: torch.view_as_real(torch.view_as_complex(h.view(2, 6, -1, 2)) * (0.6 + 0.8j)).flatten(2),
    "transposed_heads": lambda h: h.view(2, 6, 3, 4).transpose(2, 3).flatten(2),
    "pointwise": lambda h: F.gelu(h) * torch.sigmoid(h),
}

#: Of those above, what a plan shards at 2 ranks and at 3.
_SHARDED = frozenset(
    {"pointwise", "expanded", "scaled_partial_sum", "complex_pairs", *(f"{n}_in_groups_of_4" for n in STATISTICS if n != "across")}
)


def _mid(name: str, function: Callable[[Tensor], Tensor], alike: bool, width: int = 12) -> Hole:
    return Hole(name, partial(Mid, function, width), name in _SHARDED, alike=alike)


def _statistics() -> list[Hole]:
    found = []
    for i, (name, f) in enumerate(STATISTICS.items()):
        groups, size = GROUPS[i % 4]
        found.append(_mid(f"{name}_{groups}x{size}", grouped(f, groups), i % 2 == 1, groups * size))
        found.append(_mid(f"{name}_in_groups_of_4", sized(f, 4), i % 4 != 0, 24))
    return found


def _lines() -> list[Hole]:
    tables = (COMPOSITES, INDICES, IN_PLACE, FORMS)
    return [_mid(name, f, i % 3 != 0 and name not in _SHARDED) for table in tables for i, (name, f) in enumerate(table.items())]


HOLES: list[Hole] = [
    *_statistics(),
    *_lines(),
    *(
        Hole(name, factory, name in state.SHARDED, more=state.MORE.get(name, {}), alike=name in state.ALIKE)
        for name, factory in state.FACTORIES.items()
    ),
    *(Hole(name, factory, name in calls.SHARDED, alike=name in calls.ALIKE) for name, factory in calls.FACTORIES.items()),
    Hole("lookups", state.Lookups, True, {"ids": torch.tensor([[0, 5, 3], [12, 1, 5]])}),
]
