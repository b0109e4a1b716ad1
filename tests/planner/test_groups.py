"""Statistics inside the groups of a cut: right, or the axis is cut otherwise, for every number of groups × ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.side_by_side import Between, equal
from tests.support.slow import halved

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda y: F.rms_norm(y, y.shape[-1:]),
    "layer_norm": lambda y: F.layer_norm(y, y.shape[-1:]),
    "var": lambda y: y * y.var(-1, keepdim=True),
    "std": lambda y: y / (1 + y.std(dim=-1, keepdim=True)),
    "norm": lambda y: y / (1 + y.norm(dim=-1, keepdim=True)),
    "vector_norm": lambda y: y * torch.linalg.vector_norm(y, dim=-1, keepdim=True),
    "by hand": lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 0.1),
    "over the groups": lambda y: y * y.var(-2, keepdim=True),
    "over both": lambda y: y * y.var((-2, -1), keepdim=True),
    "softmax": lambda y: y.softmax(-1),
    "largest": lambda y: y - y.amax(-1, keepdim=True),
}
#: (groups, ranks, width of a group)
SHAPES = [(3, 2, 4), (4, 3, 6), (6, 4, 6), (2, 3, 6), (2, 4, 2), (5, 2, 2)]


@pytest.mark.parametrize(("groups", "tp", "width"), SHAPES)
@pytest.mark.parametrize("name", halved(STATISTICS))
def test_a_statistic_inside_groups(name: str, groups: int, tp: int, width: int) -> None:
    def inside(h: Tensor) -> Tensor:
        return STATISTICS[name](h.view(*h.shape[:-1], groups, -1)).flatten(-2)

    sharded = equal(lambda: Between(inside, groups * width), {"x": torch.randn(2, 3, 16, dtype=torch.float64)}, tp)
    assert sharded or name in ("softmax", "largest")


def test_statistics_of_zeros_have_the_gradient_of_one_device() -> None:
    for function in (lambda h: h + (h * 0).norm(dim=-1, keepdim=True), lambda h: h + (h * 0).std(-1, keepdim=True)):
        assert equal(lambda f=function: Between(f), {"x": torch.randn(2, 3, 16, dtype=torch.float64)})  # type: ignore[misc]
