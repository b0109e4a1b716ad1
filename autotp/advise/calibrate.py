"""Measures the machine that it runs on: the rates of its processors, and the latency and bandwidth of its ranks' all-reduce.

    products    of [64, 1024] and [1024, 2816], each time with another weight, as the layers of a model have
    bandwidth   an addition of two tensors of 64 MiB each into a third one
    rows        the bytes of weights that products of one row read, as where one token is decoded, over that bandwidth
    launch      the time of many small operators in modules, over their number
    all-reduce  t = α + 2(n−1)/n · S / B, fitted to sizes from 1 KiB to 16 MiB so that the relative errors are least. Operators run
                before each, as in a model: ranks that come straight from the last collective are awake and together

Each time is the first quartile of several. All ranks measure at the same time, as they share memory and cores. One number of ranks
says nothing of the steps of a ring, so `base` is all of α, and `step` is 0: the file holds for this number of ranks.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autotp.advise.meter import Meter
from autotp.advise.workload import DTYPES
from autotp.arguments import whole_number
from autotp.errors import InputError
from autotp.launch import run_ranks, values
from autotp.trace.memo import Memo

SIZES = tuple(2**n for n in range(10, 25, 2))
_ROUNDS = 12
#: Steps that are timed together, as a model makes them: one delay in a few then counts as it does there.
_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank measured: operations and bytes a second, the share of these at which a product of one row reads its weight, seconds
    an operator, seconds of an all-reduce by bytes, its memory.
    """

    device: str
    memory: float
    flops: float
    bandwidth: float
    rows: float
    launch: float
    sums: tuple[tuple[int, float], ...]


def calibrate(*, ranks: int = 2, backend: str = "gloo", dtype: str = "float32", timeout: float = 300.0) -> str:
    """Measures `ranks` processes of this machine, and returns a hardware table with one GPU, `here`, and one link, `backend`, as YAML.

    Raises:
        InputError: ranks below 2, a backend or a dtype that is not known or not there. RankError: a rank failed.
    """
    whole_number("ranks", ranks, least=2)
    if backend not in ("gloo", "nccl"):
        raise InputError(f"backend is {backend!r}, wanted 'gloo' (CPUs) or 'nccl' (GPUs)")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, wanted one of {', '.join(map(repr, DTYPES))}")
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        raise InputError(f"backend nccl needs a GPU for each of {ranks} ranks, and there are {torch.cuda.device_count()}")
    found: list[Rates] = values(run_ranks(_rank, ranks, backend, dtype, timeout=timeout, with_main=False))
    return written(found, backend, str(DTYPES[dtype]).removeprefix("torch."))


def written(found: list[Rates], backend: str, dtype: str) -> str:
    """Writes the table: medians over the ranks, the slowest rank's all-reduces."""
    ranks = len(found)
    base, bandwidth = fitted({n: max(dict(r.sums)[n] for r in found) for n, _ in found[0].sums}, ranks)
    source = f"autotp calibrate: {ranks} ranks, {backend}, {found[0].device}, torch {torch.__version__}"

    def median(name: str) -> float:
        return float(f"{statistics.median(getattr(r, name) for r in found):.4g}")

    here: dict[str, Any] = {"memory": min(r.memory for r in found), "bandwidth": median("bandwidth"), "flops": {dtype: median("flops")}}
    here |= {"compute": 1.0, "stream": 1.0, "rows": median("rows"), "launch": median("launch"), "serial": backend == "gloo"}
    here |= {"link": backend, "source": source}
    link = {"bandwidth": bandwidth, "efficiency": 1.0, "base": base, "step": 0.0, "buffers": 0, "most": ranks, "source": source}
    text: str = yaml.safe_dump({"gpus": {"here": here}, "links": {backend: link}}, sort_keys=False)
    return text


def fitted(sums: dict[int, float], ranks: int) -> tuple[float, float]:
    """Returns latency and bandwidth from seconds of all-reduces by bytes."""
    share = 2 * (ranks - 1) / ranks
    rows = np.array([[1 / t, share * n / t] for n, t in sums.items()])
    alpha, beta = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    alpha = alpha if alpha > 0 else min(sums.values())
    slowest = max(sums)
    beta = beta if beta > 0 else sums[slowest] / (share * slowest)
    return float(f"{alpha:.4g}"), float(f"{1 / beta:.4g}")


def _rank(emit: Callable[[Any], None], backend: str, dtype: str) -> Rates:
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    group = dist.new_group(backend="nccl") if backend == "nccl" else None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        name, memory = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    else:
        name, memory = "CPU", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / dist.get_world_size()
    kind = DTYPES[dtype]

    def clock(run: Callable[[], object], rounds: int = _ROUNDS) -> float:
        return statistics.quantiles(_seconds(run, device, rounds), n=4)[0]  # others on the machine disturb the slower ones

    with torch.no_grad():
        weights = [torch.randn(2816, 1024, device=device).to(kind) for _ in range(24)]
        flops = 2 * 64 * weights[0].numel() / _product(weights, 64, clock)
        x, y = (torch.randn(2**24, device=device).to(kind) for _ in range(2))
        bandwidth = 3 * x.nbytes / clock(partial(torch.add, x, y, out=torch.empty_like(x)))
        rows = min(weights[0].nbytes / _product(weights, 1, clock) / bandwidth, 1.0)
        run, operators = _small_operators(device, kind)
        launch = clock(run) / operators
    before = partial(_few_operators, torch.randn(64, 256, device=device), torch.randn(256, 256, device=device))
    alone, sums = clock(partial(_repeat, before)), []
    for nbytes in SIZES:
        after = partial(dist.all_reduce, torch.zeros(nbytes // 4, device=device), group=group)
        dist.barrier()
        sums.append((nbytes, max(clock(partial(_repeat, before, after)) - alone, 1e-6) / _IN_A_ROW))
    return Rates(name, memory, flops, bandwidth, rows, launch, tuple(sums))


def _product(weights: list[Tensor], rows: int, clock: Callable[..., float]) -> float:
    """Seconds of a product of `rows` rows with a weight that was not used lately."""
    x, turn = torch.randn(rows, weights[0].shape[1], device=weights[0].device).to(weights[0].dtype), itertools.cycle(weights)
    return clock(partial(_repeat, lambda: torch.nn.functional.linear(x, next(turn)))) / _IN_A_ROW


def _few_operators(x: Tensor, w: Tensor) -> None:
    for _ in range(6):
        x = (x @ w).tanh()


def _repeat(*steps: Callable[[], object]) -> None:
    for _ in range(_IN_A_ROW):
        for step in steps:
            step()


def _seconds(run: Callable[[], object], device: torch.device, rounds: int) -> Iterator[float]:
    for n in range(rounds + 3):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if n >= 3:  # the first ones are warming up
            yield time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Block(nn.Module):
    """Operators of a few elements each, in modules as models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 16] → the same."""
        h = self.norm(x).view(2, -1, 16).transpose(0, 1)
        h = self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        result: Tensor = x + h.transpose(0, 1).reshape(-1, 16)
        return result


def _small_operators(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Returns a function that runs many small operators, and how many run a kernel."""

    model = nn.Sequential(*(_Block() for _ in range(20))).to(device, dtype)
    fake = FakeTensorMode()
    with fake:
        twin = nn.Sequential(*(_Block() for _ in range(20)))
        meter, given = Meter(Memo(fake, {})), torch.empty(4, 16)
        with meter, torch.no_grad():
            twin(given)
    x = torch.randn(4, 16, device=device).to(dtype)
    return lambda: model(x), sum(meter.take_work().values())
