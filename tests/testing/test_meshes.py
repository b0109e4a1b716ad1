"""Any mesh with a dim "tp": the model is cut over that dim, and equal on every rank."""

from __future__ import annotations

import copy
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.numeric.exact import relative_error
from autotp.testing import strategies as tps
from autotp.testing.architectures.architecture import Architecture
from tests.support.ranks import Pool

MODEL = Architecture(kv=3, group=2)


def on_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[int, float]:
    """(ranks that the plan is for, relative error of the logits) on one rank."""
    plain = MODEL.build()
    parallel = autotp.parallelize(copy.deepcopy(plain), init_device_mesh("cpu", shape, mesh_dim_names=names), example_inputs=MODEL.inputs())
    with torch.no_grad():
        wanted, got = (model(**MODEL.inputs())["logits"] for model in (plain, parallel))
    return autotp.plan_of(parallel).tp, relative_error(got, wanted)


@pytest.mark.sweep
def test_every_mesh_of_four_ranks(pool: Pool) -> None:
    seen: set[tuple[int, ...]] = set()

    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(tps.meshes(ranks=4))
    def check(mesh: tuple[tuple[int, ...], tuple[str, ...]]) -> None:
        shape, names = mesh
        assume(prod(shape) == 4)
        found = pool.run(on_mesh, shape, names, world=4)
        assert {tp for tp, _ in found} == {shape[names.index("tp")]}
        assert max(error for _, error in found) < 1e-9
        seen.add(shape)

    check()
    assert len(seen) > 2
