"""Partial sums that are held back: equal, with fewer collectives, and right whatever part of the block runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import autotp
from autotp.errors import AutoTPError, PlanError
from autotp.plan.conversions import Conversion, Op
from autotp.plan.spec import ModulePlan, Slot
from autotp.rewrite.collectives.comm import DryComm
from autotp.rewrite.modules.joint import HeldSum, install_joints
from autotp.rewrite.observer import Observer
from autotp.rewrite.undo import Undo
from tests.models.custom import WIDTH
from tests.models.parallel import APART, JOINT, OneTwice, ParallelBlock, Residual, Returned, SharedExit, Stack, ThreeBlock, Twins
from tests.rewrite.plans import error, rewrite, worst_grad
from tests.support.families import transformer
from tests.support.pooled import PLAIN, equivalent
from tests.support.ranks import Pool, mesh
from tests.support.slow import few, halved


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(2, 5, WIDTH, generator=generator)}


def x64() -> Tensor:
    return inputs()["x"].double()


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    **{kind: partial(Stack, partial(ParallelBlock, kind)) for kind in (*JOINT, *APART)},
    "two_norms": partial(Stack, partial(ParallelBlock, norms=2)),
    "three": partial(Stack, ThreeBlock),
    "shared_exit": partial(Stack, SharedExit),
    "residual": partial(Stack, Residual),
    "twins": partial(Stack, Twins),
    "one_twice": partial(Stack, OneTwice),
    "returned": Returned,
    "root": partial(Returned, returns=False),
}


@pytest.mark.parametrize("name", halved(BLOCKS))
def test_equal(pool: Pool, name: str) -> None:
    equivalent(pool, BLOCKS[name], inputs(), needs=PLAIN)


@pytest.mark.parametrize("name", ["plain", "three", "root"])
def test_equal_on_four_ranks(pool: Pool, name: str) -> None:
    equivalent(pool, BLOCKS[name], inputs(), tp=4, needs=PLAIN)


def pair(factory: Callable[[], nn.Module] = Stack) -> tuple[nn.Module, nn.Module]:
    """A model and its parallel self, in float64."""
    torch.manual_seed(1)
    reference = factory().double()
    parallel = copy.deepcopy(reference)
    return reference, autotp.parallelize(parallel, mesh(), example_inputs={"x": x64()})


def worst(reference: nn.Module, parallel: nn.Module) -> float:
    """The largest relative error of a gradient."""
    grads = autotp.full_grads(parallel)
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    return max(error(g, grads[n]) for n, g in wanted.items())


def open_calls(model: nn.Module) -> int:
    found = [m.__dict__["_autotp_calls"] for m in model.modules() if "_autotp_calls" in m.__dict__]
    assert found
    return sum(len(held.calls) for calls in found for held in calls.sums)


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    count, original = 0, dist.all_reduce

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        result = run()
    finally:
        dist.all_reduce = original
    return count, result


def collectives(name: str) -> list[int]:
    """All-reduces of a forward without gradients, of one with, and of its backward."""
    _, model = pair(BLOCKS[name])
    with torch.no_grad():
        inference, _ = counted(lambda: model(x64()))
    forward, y = counted(lambda: model(x64()))
    backward, _ = counted(lambda: (y["y"] if isinstance(y, dict) else y).sum().backward())
    return [inference, forward, backward]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("plain", [2, 2, 2]),
        ("two_norms", [2, 2, 4]),
        ("three", [2, 2, 2]),
        ("shared_exit", [2, 2, 2]),
        ("root", [1, 1, 1]),
        ("scaled", [4, 4, 2]),
    ],
)
def test_collectives_of_two_blocks(pool: Pool, name: str, wanted: list[int]) -> None:
    assert pool.run(collectives, name)[0] == wanted


def transformer_collectives(model_type: str, fields: dict[str, Any]) -> list[int]:
    model = autotp.parallelize(transformer(model_type, **fields), mesh())
    ids = torch.tensor([[1, 5, 9, 7, 4], [2, 3, 4, 8, 6]])
    with torch.no_grad():
        prefill, result = counted(lambda: model(ids, use_cache=True))
        decode, _ = counted(lambda: model(ids[:, :1], past_key_values=result.past_key_values))
    return [prefill, decode]


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *few([("gptj", {}), ("cohere", {}), ("phi", {}), ("stablelm", {"use_parallel_residual": True}), ("codegen", {})]),
        ("gpt_neox", {}),
        ("falcon", {"parallel_attn": True, "new_decoder_architecture": False, "alibi": False}),
    ],
)
def test_collectives_of_transformers(pool: Pool, model_type: str, fields: dict[str, Any]) -> None:
    """One a block (there are two), one for the embedding."""
    assert pool.run(transformer_collectives, model_type, fields)[0] == [3, 3]


def hooked() -> list[float]:
    reference, parallel = pair(partial(Stack, ParallelBlock, 1))
    seen: dict[str, Tensor] = {}
    for name in ("a", "m"):
        for kind, model in (("wanted", reference), ("got", parallel)):
            look = Observer(lambda m, a, y, key=kind + name: seen.__setitem__(key, y))
            model.get_submodule(f"blocks.0.{name}").register_forward_hook(look)
    reference(x64())
    parallel(x64())
    return [float(seen["gota"].abs().max()), error(seen["wanteda"] + seen["wantedm"], seen["gotm"])]


def test_what_hooks_see(pool: Pool) -> None:
    for zeros, total in pool.run(hooked):
        assert zeros == 0
        assert total <= 1e-9


def alone() -> float:
    """Members that run outside of their parent reduce for themselves."""
    reference, parallel = pair()
    found = []
    for name in ("a", "m"):
        left, right = (m.get_submodule(f"blocks.0.{name}")(x64()) for m in (reference, parallel))
        found.append(error(left, right))
        left.square().sum().backward()
        right.square().sum().backward()
    found.append(error(reference(x64()), parallel(x64())))
    return max(*found, worst(reference, parallel))


def test_members_run_alone(pool: Pool) -> None:
    assert max(pool.run(alone)) <= 1e-9


def wrapped(inner: nn.Module, reentrant: bool) -> nn.Module:
    """`inner` under activation checkpointing."""
    return checkpoint_wrapper(inner, CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT)


def checkpointed(what: str, reentrant: bool) -> float:
    reference, parallel = pair()
    for block in parallel.blocks:
        if what:
            setattr(block, what, wrapped(getattr(block, what), reentrant))
    if not what:
        parallel.blocks = nn.ModuleList(wrapped(b, reentrant) for b in parallel.blocks)
    x = x64().requires_grad_()
    y = parallel(x)
    y.square().sum().backward()
    wanted = reference(x64())
    wanted.square().sum().backward()
    grads = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in parallel.named_parameters()}
    plan = autotp.plan_of(parallel)
    errors = [error(wanted, y)]
    for name, p in reference.named_parameters():
        grad = grads[name]
        local = grad.to_local() if hasattr(grad, "to_local") else grad
        errors.append(error(plan.params[name].layout.shard(p.grad, dist.get_rank()), local))
    return max(errors)


@pytest.mark.parametrize(("what", "reentrant"), [("", False), ("", True), ("a", False), ("a", True), ("m", False)])
def test_checkpointing(pool: Pool, what: str, reentrant: bool) -> None:
    assert max(pool.run(checkpointed, what, reentrant)) <= 1e-9


def lost() -> str:
    with pytest.raises(AutoTPError) as caught:
        checkpointed("m", True)
    return str(caught.value)


def test_gradients_that_would_be_lost_are_refused(pool: Pool) -> None:
    assert "Checkpoint the whole block" in pool.run(lost)[0]


def interrupted() -> list[float]:
    """An error between the two members leaves nothing behind."""
    reference, parallel = pair()

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("between")

    handle = parallel.get_submodule("blocks.1.m").register_forward_pre_hook(fail)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="between"):
            parallel(x64())
    handle.remove()
    left = open_calls(parallel)
    member = error(reference.get_submodule("blocks.1.m")(x64()), parallel.get_submodule("blocks.1.m")(x64()))
    return [left, member, error(reference(x64()), parallel(x64()))]


def test_an_error_between_the_members(pool: Pool) -> None:
    for left, *errors in pool.run(interrupted):
        assert left == 0
        assert max(errors) <= 1e-9


def skipped() -> str:
    _, parallel = pair()
    parallel.get_submodule("blocks.0").skips.on = True
    with pytest.raises(AutoTPError) as caught:
        parallel(x64())
    assert open_calls(parallel) == 0
    return str(caught.value)


def test_a_call_without_the_last_member_is_an_error(pool: Pool) -> None:
    assert pool.run(skipped)[0].startswith("blocks.0.a.b, blocks.0.m.b: a partial sum was held back")


@pytest.mark.filterwarnings("ignore")
def compiled(name: str, train: bool) -> float:
    torch._dynamo.reset()
    reference, parallel = pair(BLOCKS[name])
    run = torch.compile(parallel, backend="aot_eager", fullgraph=True)

    def only(y: Any) -> Tensor:
        return y["y"] if isinstance(y, dict) else y

    with torch.set_grad_enabled(train):
        worst_of = 0.0
        for _ in range(2):  # the second call finds what the first has left
            wanted, got = only(reference(x64())), only(run(x64()))
            worst_of = max(worst_of, error(wanted, got))
    if train:
        wanted.square().sum().backward()
        got.square().sum().backward()
        worst_of = max(worst_of, worst(reference, parallel))
    if name != "root":
        assert open_calls(parallel) == 0
    return worst_of


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", few(("plain", "shared_exit", "three", "root"), "three"))
def test_compile_makes_one_graph(pool: Pool, name: str, train: bool) -> None:
    assert max(pool.run(compiled, name, train, timeout=120.0)) <= 1e-9


def autocast() -> float:
    reference, parallel = pair()
    found = []
    for model in (reference.float(), parallel.float()):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(inputs()["x"])
        y.square().sum().backward()
        found.append(y.detach())
    return max(error(*found), worst(reference, parallel))


def test_autocast(pool: Pool) -> None:
    assert max(pool.run(autocast)) <= 0.1


def restored() -> float:
    """The rewrite is undone; a copy of the parallel model is a model of its own."""
    torch.manual_seed(1)
    reference = Stack().double()
    model = copy.deepcopy(reference)
    plan = autotp.plan(model, tp=2, example_inputs={"x": x64()})
    classes = [type(m) for m in model.modules()]
    comm, undo = rewrite(model, dict(plan.params), list(plan.modules))
    twin = copy.deepcopy(model)
    wanted = reference(x64())
    errors = [error(wanted, model(x64())), error(wanted, twin(x64()))]
    twin(x64()).sum().backward()
    reference(x64()).sum().backward()
    errors.append(worst_grad(reference, twin, dict(plan.params), comm))
    undo.undo()
    assert [type(m) for m in model.modules()] == classes
    assert not any(key.startswith("_autotp") for m in model.modules() for key in m.__dict__)
    return max(*errors, error(wanted, model(x64())))


def test_copies_and_undo(pool: Pool) -> None:
    assert max(pool.run(restored)) <= 1e-9


def test_a_plan_must_name_both_sides() -> None:
    model = ParallelBlock()
    hold = ModulePlan("a.b", outputs=(Slot((), (Conversion(Op.HOLD),)),))
    with pytest.raises(PlanError, match=r"no module of the plan says with what these are summed: \['a.b'\]"):
        install_joints(model, [hold], DryComm(2), Undo())
    with pytest.raises(PlanError, match=r"not all of a\.b, m\.b hold or join"):
        install_joints(model, [hold, ModulePlan("", joint=(("a.b", "m.b"),))], DryComm(2), Undo())


def test_held_sums_by_hand() -> None:
    held = HeldSum("a, b", DryComm(2), None)
    one, two = torch.ones(2, 3, dtype=torch.float64, requires_grad=True), torch.full((6,), 2.0, dtype=torch.float64, requires_grad=True)
    assert torch.equal(held.hold(one), one)  # no call is open
    held.open()
    assert not held.hold(one).any()
    total = held.join(two)
    held.check()
    held.close()
    assert torch.equal(total, torch.full((6,), 3.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: _joined(held, a, b), (one, two))
    assert torch.autograd.gradgradcheck(lambda a, b: _joined(held, a, b).square(), (one, two))


def _joined(held: HeldSum, a: Tensor, b: Tensor) -> Tensor:
    held.open()
    zeros = held.hold(a).flatten()
    total = held.join(b)
    held.close()
    return zeros + total
