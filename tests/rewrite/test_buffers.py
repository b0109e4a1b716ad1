"""Buffers that a sharded region writes are whole on every rank afterwards, or the region is not sharded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.errors import PlanError
from tests.support.ranks import Pool, mesh
from tests.support.side_by_side import equal

X = torch.randn(4, 16, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Convolved(nn.Module):
    """A norm of channels between two convolutions."""

    def __init__(self, norm: Callable[[int], nn.Module], channels: int = 24) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv1d(16, channels, 1), norm(channels), nn.Conv1d(channels, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))  # type: ignore[no-any-return]


NORMS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "batch": (nn.BatchNorm1d, True),
    "cumulative": (functools.partial(nn.BatchNorm1d, momentum=None), True),
    "without weights": (functools.partial(nn.BatchNorm1d, affine=False), True),
    "without statistics": (functools.partial(nn.BatchNorm1d, track_running_stats=False), True),
    "instance": (functools.partial(nn.InstanceNorm1d, affine=True, track_running_stats=True), True),
    "group": (functools.partial(nn.GroupNorm, 12), True),
}


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_channels(name: str, tp: int) -> None:
    norm, sharded = NORMS[name]
    assert equal(lambda: Convolved(norm), {"x": X}, tp, train=True) == sharded


@pytest.mark.parametrize("world", [2, 3])
def test_running_statistics_in_processes(pool: Pool, world: int) -> None:
    assert equal(functools.partial(Convolved, nn.BatchNorm1d), {"x": X}, world, train=True, pool=pool)


class OwnStatistics(nn.Module):
    """The root holds the statistics, and updates them in training mode or always."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("var", torch.ones(24))
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(self.a(x), self.mean, self.var, None, None, self.always or self.training)
        return self.b(h.relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("always", [False, True])
def test_statistics_of_the_root(always: bool) -> None:
    assert equal(lambda: OwnStatistics(always), {"x": ROWS}, train=True)


class Follows(nn.Module):
    """`follow(buffer, activations)` writes the buffer, and the model reads it."""

    def __init__(self, follow: Callable[[Tensor, Tensor], object], shape: tuple[int, ...] = (24,)) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.register_buffer("kept", torch.zeros(shape))
        self.follow = follow

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x))
        with torch.no_grad():
            self.follow(self.kept, h)
        return self.b(h / (1 + self.kept.abs().mean()))  # type: ignore[no-any-return]


def some(kept: Tensor, h: Tensor) -> None:
    kept[:3] = h.mean(0)[:3]


#: name → (function, shape of the buffer, whether the region stays sharded)
FOLLOWERS: dict[str, tuple[Callable[[Tensor, Tensor], object], tuple[int, ...], bool]] = {
    "a mean of all": (lambda kept, h: kept.mul_(0.9).add_(0.1 * h.abs().mean()), (), True),
    "a norm of all": (lambda kept, h: kept.copy_(h.norm()), (), True),
    "a sum into zeros": (lambda kept, h: kept.zero_().add_(h.sum()), (), True),
    "rows": (lambda kept, h: kept.copy_(h.sum(-1)), (6,), True),
    "a quantile": (lambda kept, h: kept.copy_(torch.quantile(h, 0.9)), (), False),
    "columns": (lambda kept, h: kept.mul_(0.9).add_(0.1 * h.mean(0)), (24,), False),
    "copied columns": (lambda kept, h: kept.copy_(h.mean(0)), (24,), False),
    "columns of a view": (lambda kept, h: kept.view(4, 6).add_(h.mean(0).view(4, 6)), (24,), False),
    "columns as an output": (lambda kept, h: torch.add(kept, h.mean(0), out=kept), (24,), False),
    "some columns": (some, (24,), False),
    "activations": (lambda kept, h: kept.copy_(h), (6, 24), False),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_buffer_follows_activations(name: str) -> None:
    follow, shape, sharded = FOLLOWERS[name]
    assert equal(lambda: Follows(follow, shape), {"x": ROWS}, 3, train=True) == sharded


@pytest.mark.parametrize("normed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_vectors_of_a_spectral_norm(normed: Callable[[nn.Module], nn.Module]) -> None:
    equal(lambda: nn.Sequential(normed(nn.Linear(16, 24)), nn.ReLU(), normed(nn.Linear(24, 16))), {"input": ROWS}, train=True)


@pytest.mark.parametrize("alone", [False, True])
def test_statistics_over_tensor_parallel_ranks_are_refused(pool: Pool, alone: bool) -> None:
    pool.run(synchronised, alone, world=2)


def synchronised(alone: bool) -> None:
    """On one rank: a SyncBatchNorm over all ranks, or over this one."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    model = Convolved(lambda n: nn.SyncBatchNorm(n, process_group=groups[dist.get_rank()] if alone else None)).double().eval()
    if alone:
        autotp.parallelize(model, mesh(), example_inputs={"x": X})
    else:
        with pytest.raises(PlanError, match=r"n is a SyncBatchNorm over ranks \[0, 1\]"):
            autotp.parallelize(model, mesh(), example_inputs={"x": X})


def compiled() -> None:
    """On one rank: statistics of a compiled model, in both modes."""
    plain = Convolved(nn.BatchNorm1d).double()
    parallel = copy.deepcopy(plain)
    autotp.parallelize(parallel, mesh(), example_inputs={"x": X})
    run = torch.compile(parallel, backend="eager")
    for mode in (True, False):
        plain.train(mode)
        parallel.train(mode)
        assert torch.allclose(run(X), plain(X), rtol=0, atol=1e-12)
    state = autotp.full_state_dict(parallel)
    assert all(torch.allclose(state[name], t) for name, t in plain.state_dict().items())


def test_statistics_of_a_compiled_model(pool: Pool) -> None:
    pool.run(compiled, world=2)
