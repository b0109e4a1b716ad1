"""FSDP2, HSDP and replicate() over a parallel model train what one device trains with all batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import autotp
from autotp.data_parallel import units
from autotp.errors import AutoTPError, InputError, MeshError, PlanError
from autotp.rewrite.modules import batched_reads
from autotp.rewrite.parameters.fsdp import LayoutFSDPParam
from tests.composition import training
from tests.composition.training import Data, adamw, apart, blocks, build, by_block, grads_of, loss_of, mesh_of, parallel, train
from tests.support.ranks import Pool
from tests.support.slow import few, halved, thinned

SHAPES = [(2, 2), (2, 1, 2), (1, 2, 2)]


def trained(kind: str, shape: tuple[int, ...], how: str = "by block") -> dict[str, float]:
    """Three clipped steps of AdamW beside one device."""
    mesh = mesh_of(*shape)
    model, alone = parallel(kind, mesh), build(kind)
    if how == "autotp":
        autotp.fully_shard(model, mesh)
    else:
        by_block(model, mesh)
    found = {"before": apart(dict(alone.named_parameters()), {n: p.full_tensor() for n, p in model.named_parameters()})}  # type: ignore[operator]
    optimizer, other = adamw(model), adamw(alone)
    norms, wanted = train(model, optimizer, Data.here(mesh), range(3)), train(alone, other, Data(Data.here(mesh).of), range(3))
    found["norms"] = max(abs(a - b) for a, b in zip(norms, wanted, strict=True))
    found["gradients"] = apart(grads_of(alone), autotp.full_grads(model))
    found["weights"] = apart(alone.state_dict(), autotp.full_state_dict(model))
    found["full_tensor"] = apart(dict(alone.named_parameters()), {n: p.full_tensor() for n, p in model.named_parameters()})  # type: ignore[operator]
    model.eval(), alone.eval()
    with torch.no_grad(), training.exact(model):
        ids = Data(1).ids(9)
        found["eval"] = float((model(input_ids=ids).logits - alone(input_ids=ids).logits).abs().max())
    return found


@pytest.mark.parametrize("kind", thinned(training.MODELS, ["fused", "shared", "tied", "state space"], "padded", "experts", "joint"))
def test_trains_as_one_device(pool: Pool, kind: str) -> None:
    for found in pool.run(trained, kind, (2, 2), world=4):
        assert found["before"] == 0.0
        assert max(found.values()) <= 1e-9, found


HYBRID = [(kind, shape) for kind in ("fused", "padded", "shared") for shape in SHAPES[1:]]


@pytest.mark.parametrize(("kind", "shape"), thinned(HYBRID, [("fused", (1, 2, 2))], ("padded", (2, 1, 2))))
def test_hybrid(pool: Pool, kind: str, shape: tuple[int, ...]) -> None:
    for found in pool.run(trained, kind, shape, world=4):
        assert max(found.values()) <= 1e-9, found


@pytest.mark.parametrize("kind", thinned(training.MODELS, ["tied"], "concatenated"))
def test_units_are_picked(pool: Pool, kind: str) -> None:
    for found in pool.run(trained, kind, (2, 2), "autotp", world=4):
        assert max(found.values()) <= 1e-9, found


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["fused", "shared", "padded"])
def test_on_eight_ranks(pool: Pool, kind: str) -> None:
    for found in pool.run(trained, kind, (4, 2), world=8):
        assert max(found.values()) <= 1e-9, found


def without_layouts() -> dict[str, float]:
    """The control: FSDP makes ordinary DTensors of the parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayoutFSDPParam, "to_sharded_dtensor", LayoutFSDPParam.__base__.to_sharded_dtensor)  # type: ignore[union-attr]
        model = by_block(parallel("fused", mesh_of(2, 2)), mesh_of(2, 2))
        return {"weights": apart(dict(build("fused").named_parameters()), {n: p.full_tensor() for n, p in model.named_parameters()})}  # type: ignore[operator]


def test_without_its_layouts_it_would_be_another_order(pool: Pool) -> None:
    assert all(found["weights"] > 1e-3 for found in pool.run(without_layouts, world=4))


def _accumulated(model: nn.Module, data: Data, step: int) -> None:
    for half in range(2):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(half == 1)
        with training.exact(model):
            (loss_of(model, data.ids(10 * step + half)) / 2).backward()  # type: ignore[no-untyped-call]


def _gathered(model: nn.Module, data: Data, step: int) -> None:
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
    loss_of(model, data.ids(step)).backward()  # type: ignore[no-untyped-call]


def _compiled(model: nn.Module) -> None:
    layers: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for i, block in enumerate(blocks(model)):
        layers[i] = torch.compile(block, backend="eager")


def _frozen(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" not in name and "embed" not in name)


def _wrapped(model: nn.Module, saves: bool) -> None:
    kinds = {type(block) for block in blocks(model)}
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    wrap = partial(checkpoint_wrapper, context_fn=contexts) if saves else checkpoint_wrapper
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda m: type(m) in kinds)


def _replicated(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in blocks(model):
        replicate(block, mesh=mesh["dp"])
    replicate(model, mesh=mesh["dp"])


#: option → (before parallelize, for the model of one device too; after it and before FSDP; how FSDP is applied; after it; backward)
Change = Callable[[nn.Module], Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"backward": _accumulated},
    "reshard": {"shard": {"reshard_after_forward": True}},
    "no reshard": {"shard": {"reshard_after_forward": False}},
    "no reshard, accumulation": {"shard": {"reshard_after_forward": False}, "backward": _accumulated},
    "offload": {"shard": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}},
    "mixed": {"shard": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)}},
    "frozen": {"first": _frozen},
    "checkpointed": {"after": partial(_wrapped, saves=False)},
    "selectively checkpointed": {"after": partial(_wrapped, saves=True)},
    "gathered before": {"backward": _gathered},
    "compiled": {"last": lambda model: [block.compile(backend="aot_eager") for block in blocks(model)]},
    "wrapped by compile": {"last": _compiled},
    "replicated": {"by": _replicated},
}  # fmt: skip


def with_option(kind: str, option: str) -> dict[str, float]:
    """As `trained`, with an option."""
    mesh, given = mesh_of(2, 2), OPTIONS[option]
    model, alone = build(kind), build(kind)
    for m in (model, alone):
        given.get("first", lambda _: None)(m)
    autotp.parallelize(model, mesh, check="graph")
    given.get("after", lambda _: None)(model)
    given["by"](model, mesh) if "by" in given else by_block(model, mesh, **given.get("shard", {}))
    given.get("last", lambda _: None)(model)
    data = Data.here(mesh)
    norms = train(model, adamw(model), data, range(3), given.get("backward"))
    wanted = train(alone, adamw(alone), Data(data.of), range(3), given.get("backward"))
    return {
        "norms": max(abs(a - b) for a, b in zip(norms, wanted, strict=True)),
        "gradients": apart(grads_of(alone), autotp.full_grads(model)),
        "weights": apart(alone.state_dict(), autotp.full_state_dict(model)),
    }


@pytest.mark.parametrize("option", halved(OPTIONS))
def test_options(pool: Pool, option: str) -> None:
    for found in pool.run(with_option, "padded" if "accumulation" in option or "compile" in option else "even", option, world=4):
        assert max(found.values()) <= 1e-9, found


def in_one_graph(kind: str) -> float:
    """A whole compiled model, whose ranks differ in what they do to gradients: padding is the last rank's."""
    torch._dynamo.reset()
    model, alone = parallel(kind, mesh_of(2, 2)), build(kind)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(alone, Data(1).ids(0)).backward()  # type: ignore[no-untyped-call]
    logits = run(input_ids=Data(1).ids(0), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), Data(1).ids(0)[:, 1:].flatten()).backward()
    return apart(grads_of(alone), autotp.full_grads(model))


@pytest.mark.parametrize("kind", few(["padded", "shared"], "padded"))
def test_padding_breaks_no_graph(pool: Pool, kind: str) -> None:
    assert max(pool.run(in_one_graph, kind, world=4)) <= 1e-9


def inside_of_a_joint_sum(model: nn.Module) -> None:
    """Units that are members of a joint sum, and Linears inside of them."""
    for block in blocks(model):
        inner: Any = block
        fully_shard(inner.attention, mesh=mesh_of(2, 2)["dp"])
        fully_shard(inner.mlp.dense_4h_to_h, mesh=mesh_of(2, 2)["dp"])


def of_each_linear(model: nn.Module) -> None:
    """A unit for each Linear."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh_of(2, 2)["dp"])


def of_several(model: nn.Module) -> None:
    """The embedding, and the last norm with the head, as torchtitan has them."""
    inner: Any = model
    fully_shard(inner.model.embed_tokens, mesh=mesh_of(2, 2)["dp"])
    fully_shard([inner.model.norm, inner.lm_head], mesh=mesh_of(2, 2)["dp"], reshard_after_forward=False)


def between_backward_and_step() -> tuple[float, float]:
    """An evaluation after the backward: the norm and the step are of all gradients. Then values that are put in place of others."""
    mesh, data = mesh_of(2, 2), Data.here(mesh_of(2, 2))
    model, alone = by_block(parallel("padded", mesh), mesh), build("padded")
    norms = []
    for which, part in ((model, data), (alone, Data(2))):
        optimizer = adamw(which)
        loss_of(which, part.ids(0)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            which.eval()(input_ids=Data(1).ids(5))
            which.train()
        norms.append(float(nn.utils.clip_grad_norm_(which.parameters(), 0.1)))
        optimizer.step()
        for p in which.parameters():
            p.data.mul_(0.9)
            p.data = p.data * 1.1
        optimizer.zero_grad()
        loss_of(which, part.ids(1)).backward()  # type: ignore[no-untyped-call]
    return abs(norms[0] - norms[1]), apart(grads_of(alone), autotp.full_grads(model))


def test_an_evaluation_between_backward_and_step(pool: Pool) -> None:
    for found in pool.run(between_backward_and_step, world=4):
        assert max(found) <= 1e-9, found


UNITS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "inside of a joint sum": ("joint", inside_of_a_joint_sum),
    "each Linear": ("padded", of_each_linear),
    "several modules": ("shared", of_several),
}


def in_units(name: str) -> float:
    """As `trained`, with other units inside of the blocks, or beside them."""
    kind, apply = UNITS[name]
    model, alone = parallel(kind, mesh_of(2, 2)), build(kind)
    apply(model)
    by_block(model, mesh_of(2, 2))
    train(model, adamw(model), Data.here(mesh_of(2, 2)), range(2))
    train(alone, adamw(alone), Data(2), range(2))
    return apart(alone.state_dict(), autotp.full_state_dict(model))


@pytest.mark.parametrize("name", UNITS)
def test_other_units(pool: Pool, name: str) -> None:
    assert max(pool.run(in_units, name, world=4)) <= 1e-9


def without_units() -> dict[str, float]:
    """The control: the root reads for all modules, whose units were gathered before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_reads, "is_managed", lambda p: False)
        return with_option("even", "gathered before")


def test_a_batch_over_units_would_lose_gradients(pool: Pool) -> None:
    assert all(max(found.values()) > 1e-6 for found in pool.run(without_units, world=4))


class Reader(nn.Module):
    """A block that multiplies by the weight of another one."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.of = (of,)  # no child

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu()) @ self.of[0].weight


class Reading(nn.Module):
    """Blocks of which two read a parameter of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.readers = nn.ModuleList([Reader(self.blocks[1]) for _ in range(2)])  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(x))
        for reader in self.readers:
            x = reader(x)
        return self.head(x)


def reading(how: str) -> Any:
    """Readers of a parameter in another unit."""
    mesh, data = mesh_of(2, 2), Data.here(mesh_of(2, 2))
    torch.manual_seed(1)
    alone = Reading().double()
    model = Reading().double()
    model.load_state_dict(alone.state_dict())
    x = torch.randn(4, 8, dtype=torch.float64)
    autotp.parallelize(model, mesh, example_inputs={"x": x[:2]}, check="graph")
    if how == "autotp":
        picked = units(model, autotp.plan_of(model))
        autotp.fully_shard(model, mesh)
    else:
        picked = []
        for unit in (*model.blocks, *model.readers):
            fully_shard(unit, mesh=mesh["dp"], reshard_after_forward=how != "stays")
        fully_shard(model, mesh=mesh["dp"])
    rank = data.rank or 0
    try:
        model(x[rank * 2 : rank * 2 + 2]).pow(2).mean().backward()
    except AutoTPError as error:
        return str(error)
    alone(x).pow(2).mean().backward()
    return picked, apart(grads_of(alone), autotp.full_grads(model))


def test_readers_of_other_units(pool: Pool) -> None:
    for picked, error in pool.run(reading, "autotp", world=4):
        assert picked == ["blocks.0"] and error <= 1e-9
    for how in ("reshard", "stays"):
        for text in pool.run(reading, how, world=4):
            assert "readers.0 reads weight of blocks.1" in text and "fully_shard([a, b], mesh=…)" in text


def _stepped(model: nn.Module, gathered: bool) -> None:
    """Steps an optimizer that was made before FSDP, or after a forward whose backward has not come: the root's parameters are gathered."""
    early = adamw(model)
    by_block(model, mesh_of(2, 2))
    model(input_ids=Data(1).ids(0))
    late = adamw(model)
    for p in model.parameters():
        p.grad = None
    (late if gathered else early).step()


def _resharded(model: nn.Module) -> None:
    """The control."""
    by_block(model, mesh_of(2, 2))
    model(input_ids=Data(1).ids(0))
    model.reshard()  # type: ignore[operator]
    adamw(model).step()


def refused() -> dict[str, str]:
    """What each wrong use is told."""
    mesh = mesh_of(2, 2)
    ids = Data(1).ids(0)
    uses: dict[str, Callable[[nn.Module], Any]] = {
        "all ranks": lambda m: fully_shard(m),
        "tp ranks": lambda m: fully_shard(m, mesh=mesh["tp"]),
        "ddp": lambda m: DistributedDataParallel(m, process_group=mesh.get_group("dp")),
        "ddp of the mesh": lambda m: DistributedDataParallel(m, device_mesh=mesh["dp"])(input_ids=ids),
        "no mesh": lambda m: autotp.fully_shard(m, 2),  # type: ignore[arg-type]
        "no dim": lambda m: autotp.fully_shard(m, mesh["tp"]),
        "early optimizer": lambda m: _stepped(m, False),
        "late optimizer": lambda m: _stepped(m, True),
        "optimizer in time": _resharded,
        "part of the ranks": lambda m: autotp.fully_shard(m, mesh, reshard_after_forward=2),
        "inner model": lambda m: by_block(m, mesh).model(input_ids=ids),  # type: ignore[operator]
        "twice": lambda m: autotp.fully_shard(autotp.fully_shard(m, mesh), mesh),
        "keyword": lambda m: autotp.fully_shard(m, mesh, reshard=True),
        "not parallel": lambda m: autotp.fully_shard(build("even"), mesh),
    }
    found = {}
    for name, use in uses.items():
        try:
            use(parallel("even", mesh))
            found[name] = "fine"
        except AutoTPError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_wrong_uses_are_told(pool: Pool) -> None:
    wanted = {
        "all ranks": (MeshError, 'fully_shard(model, mesh=mesh["dp"])'),
        "tp ranks": (MeshError, 'fully_shard(model, mesh=mesh["dp"])'),
        "ddp": (AutoTPError, 'use replicate(model, mesh=mesh["dp"])'),
        "ddp of the mesh": (AutoTPError, 'use replicate(model, mesh=mesh["dp"])'),
        "no mesh": (MeshError, "got int"),
        "no dim": (MeshError, "got dims ('tp',)"),
        "early optimizer": (AutoTPError, "the optimizer was made before fully_shard"),
        "late optimizer": (AutoTPError, "while FSDP held gathered parameters"),
        "part of the ranks": (InputError, "True or False"),
        "inner model": (AutoTPError, "give the inner one to it as well"),
        "twice": (PlanError, "sharded by FSDP already"),
        "keyword": (InputError, "reshard"),
        "not parallel": (PlanError, "call autotp.parallelize"),
    }
    for found in pool.run(refused, world=4):
        assert found["optimizer in time"] == "fine"
        for name, (kind, text) in wanted.items():
            assert found[name].startswith(kind.__name__ + ":") and text in found[name], found[name]
