"""What the run-time guards take of a decode step: `python -m benchmarks.guards [--size small]`.

One step of llama on a process group that does nothing is run with every guard watched; each of their calls is then repeated by itself,
and the least times are added up. Not in it: the Python calls of the wrappers that ask the guards, about half a microsecond for each
module that calls others.
"""

from __future__ import annotations

import argparse
import os
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from autotp.rewrite import entry
from autotp.rewrite.collectives import comm
from autotp.rewrite.guards.called import Called
from autotp.rewrite.guards.hooks import Watch
from autotp.rewrite.guards.structure import Structure
from autotp.rewrite.guards.tables import Tensors
from autotp.rewrite.guards.values import Values
from benchmarks.subjects import autotp

Call = Callable[[], Any]
GUARDS: tuple[tuple[Any, str, str], ...] = (
    (Structure, "differs", "structure"),
    (Values, "check", "values"),
    (Tensors, "check", "tensors that are there"),
    (Values, "again", "values, after the call"),
    (Called, "check", "forms of calls"),
    (Watch, "check", "hooks"),
    (entry, "refuse_transforms", "transforms"),
    (comm, "refuse_transforms", "transforms"),
)


@contextmanager
def watched(seen: list[tuple[str, Call]]) -> Iterator[None]:
    """Note each call of a guard."""

    def spy(own: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, partial(own, *args, **kwargs)))
            return own(*args, **kwargs)

        return call

    before = [(where, what, getattr(where, what)) for where, what, _ in GUARDS]
    for (where, what, own), (_, _, name) in zip(before, GUARDS, strict=True):
        setattr(where, what, spy(own, name))
    try:
        yield
    finally:
        for where, what, own in before:
            setattr(where, what, own)


def least(call: Call, number: int, repeat: int) -> float:
    """Microseconds of a call."""
    return min(timeit.repeat(call, number=number, repeat=repeat)) / number * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["small", "medium"], default="small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # type: ignore[no-untyped-call]
    model: Any = autotp(options.size, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    ids, seen = torch.arange(8)[None], []
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

        def step() -> None:
            model(ids[:, :1], past_key_values=cache, use_cache=True)

        step()
        with watched(seen):
            step()
        whole = least(step, 5, 20)
    times: Counter[str] = Counter()
    for name, call in seen:
        times[name] += least(call, 200, 5)  # type: ignore[assignment]
    table = Table("guard", "calls", "µs", "% of a step", title=f"{options.size}: a step of {whole:.0f} µs")
    for name, spent in times.items():
        table.add_row(name, str(sum(n == name for n, _ in seen)), f"{spent:.1f}", f"{100 * spent / whole:.2f}")
    total = sum(times.values())
    table.add_row("all", str(len(seen)), f"{total:.1f}", f"{100 * total / whole:.2f}")
    Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
