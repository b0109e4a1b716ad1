"""What people do with parameters that FSDP shards beside tp: gradients are means over the data-parallel ranks, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import autotp
from autotp.errors import AutoTPError
from autotp.rewrite.parameters.data_parallel import DataParallelDTensor
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from tests.composition.training import Data, adamw, loss_of, mesh_of
from tests.rewrite.parameters import uses
from tests.support.ranks import Pool
from tests.support.slow import swept

KINDS = ["even", "fused", "concatenated", "padded", "shared", "tied"]
#: Uses of `uses.USES`, of which the learned plain tensors' gradients are each rank's own.
EQUAL = ["rows by ids", "other rows", "mixture of rows", "embedding", "decay", "norms", "spectral", "from the start", "row", "initialised"]
REFUSED = {
    "matmul": "give the inner one to it as well",
    "fused": "give the inner one to it as well",
    "low-rank addition": "was replaced",
    "untied": "were one parameter in fully_shard",
    "replaced": "was replaced",
    "loaded by assignment": "were one parameter in fully_shard",
    "parametrized": "was replaced",
    "frozen rows": "register_post_accumulate_grad_hook",
    "grown": "FSDP has its parameters",
    "penalty of inputs": "not computed under FSDP",
}


def said_of(kind: str, names: list[str]) -> list[str]:
    """What is wrong with each use, of a batch of this rank's own beside one device with all batches."""
    mesh = mesh_of(2, 2)
    said = []
    for name in names:
        alone = uses.build(kind, eager=name in uses.SECOND)
        model = autotp.parallelize(copy.deepcopy(alone), mesh, check="graph")
        autotp.fully_shard(model, mesh)
        wanted = observed(name, alone, Data(2).ids(0))
        try:
            got = observed(name, model, Data.here(mesh).ids(0))
        except AutoTPError as error:
            said.append("" if name in REFUSED and REFUSED[name] in str(error) else f"{name}: {error}")
            continue
        except Exception as error:
            said.append(f"{name}: {type(error).__name__}: {error}")
            continue
        far = {n: by for n, by in uses.apart(wanted, got).items() if not by <= 1e-9}
        said.append(f"{name}: differs, {far}" if far else f"{name}: was not refused" if name in REFUSED else "")
    return [text for text in said if text]


def observed(name: str, model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The numbers of a use; losses, and gradients of plain tensors, as means over the data-parallel ranks."""
    found = uses.USES[name](model, ids)
    if not found:
        found = dict(uses.trained(model, loss_of(model, ids))) | {n: p.detach() for n, p in model.named_parameters()}
    plain = {n for n, x in found.items() if not n.endswith(".grad") and not isinstance(x, LayoutDTensor)}
    numbers = {n: uses.whole(x) for n, x in found.items()}
    if any(isinstance(p, DataParallelDTensor) for p in model.parameters()):
        for n in plain:
            dist.all_reduce(numbers[n], group=mesh_of(2, 2).get_group("dp"))
            numbers[n] /= 2
    return numbers


@pytest.mark.parametrize("kind", swept(KINDS, "padded"))
def test_uses_beside_fsdp(pool: Pool, kind: str) -> None:
    quick = kind == "padded"
    for said in pool.run(said_of, kind, EQUAL[:2] + EQUAL[5:6] if quick else EQUAL, world=4):
        assert not said, "\n".join(said)


@pytest.mark.parametrize("kind", swept(["padded", "fused"], "padded"))
def test_refused_beside_fsdp(pool: Pool, kind: str) -> None:
    names = ["matmul", "parametrized", "frozen rows"] if kind == "padded" else list(REFUSED)  # only a tied head can be untied
    for said in pool.run(said_of, kind, names, world=4):
        assert not said, "\n".join(said)


def rows_by_the_other_hook() -> float:
    """What the refusal of hooks names: rows stay as they are by a hook on the gradient that FSDP has reduced."""
    mesh, alone = mesh_of(2, 2), uses.build("padded", eager=False)
    model = autotp.parallelize(copy.deepcopy(alone), mesh, check="graph")
    autotp.fully_shard(model, mesh)
    for m, data in ((alone, Data(2)), (model, Data.here(mesh))):
        w = uses.table(m).weight
        mask = torch.ones_like(uses.whole(w))
        mask[:20] = 0
        w.register_post_accumulate_grad_hook(lambda p, mask=mask: (p.grad.mul_(mask), None)[1])
        optimizer = adamw(m)
        loss_of(m, data.ids(0)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return max(uses.apart(alone.state_dict(), autotp.full_state_dict(model)).values())


def test_rows_stay_by_the_other_hook(pool: Pool) -> None:
    assert max(pool.run(rows_by_the_other_hook, world=4)) <= 1e-9


def hooked_before() -> str:
    model = autotp.parallelize(uses.build("even", eager=False), mesh_of(2, 2), check="graph")
    uses.table(model).weight.register_hook(lambda g: g * 0)
    with pytest.raises(AutoTPError) as error:
        autotp.fully_shard(model, mesh_of(2, 2))
    return str(error.value)


@pytest.mark.sweep
def test_a_hook_before_fsdp_is_refused(pool: Pool) -> None:
    assert all("register_post_accumulate_grad_hook" in text for text in pool.run(hooked_before, world=4))
