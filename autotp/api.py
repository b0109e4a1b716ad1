"""The public functions plan a model, make it parallel and read its tensors back whole."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autotp import targets
from autotp.adapters import base_of
from autotp.agree import agree
from autotp.already_quantized import plain_weights, refuse_codes
from autotp.arguments import truth, truth_or_auto
from autotp.errors import InputError, PlanError
from autotp.examine import Check
from autotp.install import Answer, install, planned_by_one
from autotp.parallel_state import ParallelState, Request, params_of, state_of
from autotp.plan.layout import replicated
from autotp.plan.placements import Experts, Placements
from autotp.plan.plan import Plan
from autotp.planner.make_plan import whole_plan
from autotp.planning import RecipeLike, planned, recipe_plan
from autotp.preflight import STATE as _STATE
from autotp.preflight import refuse_parallel, refuse_synchronised, same_model, tp_mesh
from autotp.recipe.recipe import Recipe
from autotp.replan import Again, plan_adapters
from autotp.rewrite.collectives.comm import DryComm, GroupComm
from autotp.rewrite.parameters import full
from autotp.rewrite.parameters.make import MakeParam
from autotp.trace.example import Given

ANSWERS: list[Answer] = []
"""Called with each model that becomes parallel, before it changes: `autotp.integrations` puts on it what other libraries ask for."""


def plan(
    target: object,
    *,
    tp: int,
    recipe: RecipeLike | None = None,
    example_inputs: Given | None = None,
    check: str = "numbers",
    loss_parallel: bool = False,
    sequence_parallel: bool | Literal["auto"] = False,
    experts: str = "width",
) -> Plan:
    """Plan how `parallelize` would shard `target` over `tp` ranks. This needs no process group, no weights and no GPU.

    Args:
        target: an `nn.Module` (on any device, the meta device too), a transformers config, or the path of a directory or file with
            a config.json.
        tp: number of ranks, at least 1.
        recipe: a `Recipe`, or an argument of `Recipe.load`. Its layouts override the planner's choices. autotp proves the recipe
            against the model's axes. Where the model cannot be traced, a recipe that covers every parameter is used without proof,
            and the plan's notes say so.
        example_inputs: keywords of `forward` that the model is traced with, or a list of several calls. A call with an argument of
            another kind (a flag, a mask where there was none) is refused in code that computes on a rank's part. For transformers
            models they are made from the config.
        check: "numbers": where that takes seconds, autotp runs the model (or a smaller twin of a large transformers model) and its
            ranks in this process in float64. Axes that meet at a module whose numbers differ stay whole. `Plan.checked` names the check.
            "graph": the trace alone is proof.
        loss_parallel: leave the logits in parts over the ranks, with losses that need no more (docs/loss_parallel.md). Where a recipe
            asks for it, too.
        sequence_parallel: leave hidden states between regions in parts over the tokens, where gradients are recorded
            (docs/sequence_parallel.md). "auto" does so in calls of many tokens. Where a recipe asks for it, too.
        experts: what of a mixture of experts is cut (docs/experts.md). "width": the width inside each expert. "whole": each rank holds
            some experts whole, where that is proven, with either `check` by running the experts; the plan's notes say where it is not.
            "auto": whole where that makes products larger and costs no memory. A recipe that asks for one goes before the default.

    Raises:
        InputError: a bad target, tp, check, experts or example_inputs. RecipeError: a recipe with mistakes, or one that cannot be proven.
        TraceError: the model cannot be run on fake tensors, and no recipe covers all of it.
    """
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise InputError(f"tp must be a positive int, got {tp!r}")
    targets.check_ranks(tp)
    model = base_of(targets.resolve(target))
    if _STATE in model.__dict__:
        raise PlanError("the model is already parallel: autotp.plan_of(model) gives its plan")
    placements = _placements("plan", loss_parallel, sequence_parallel, experts)
    with plain_weights(model):
        return planned(model, tp, recipe, example_inputs, Check.of(check), placements)


def _placements(function: str, loss_parallel: Any, sequence_parallel: Any, experts: Any) -> Placements:
    return Placements(
        truth(f"{function}: loss_parallel", loss_parallel),
        truth_or_auto(f"{function}: sequence_parallel", sequence_parallel),
        Experts.of(experts, function),
    )


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    recipe: RecipeLike | None = None,
    example_inputs: Given | None = None,
    strict: bool = False,
    check: str = "numbers",
    loss_parallel: bool = False,
    sequence_parallel: bool | Literal["auto"] = False,
    experts: str = "width",
) -> nn.Module:
    """Make `model` tensor-parallel over `mesh`, in place, and return the same object. Collective: call on every rank.

    The class, the module names, `forward`, `generate` and the keys of `state_dict` stay. Parameters become DTensors on the mesh.
    Modules compute on local shards, and outputs are whole on every rank (logits are DTensors with `loss_parallel`).

    Args:
        model: the same model on every rank, with real weights on any device or on the meta device (the shards are then meta too).
            A parallel model on which PEFT has put adapters since is planned again, which its next call does otherwise.
        mesh: 1-D, or n-D with a dim named "tp".
        recipe: as for `plan`. Rank 0 reads it; the others need no file.
        example_inputs: as for `plan`.
        strict: raise when Linear or expert parameters would stay replicated.
        check: as for `plan`.
        loss_parallel: as for `plan`. Where gradients are recorded, `logits` are then `DTensor`s of the whole shape, of which each rank
            holds its tokens of the vocabulary.
        sequence_parallel: as for `plan`.
        experts: as for `plan`.

    Raises:
        AutoTPError: the same on every rank, with the model as it was. MeshError: no process group, no tp dim. PlanError: models
            that differ between ranks, a model that is already parallel, `strict`. InputError, RecipeError, TraceError: as for
            `plan`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"parallelize takes an nn.Module, got {type(model).__name__}; autotp.plan also takes configs and paths")
    checked, placements = Check.of(check), _placements("parallelize", loss_parallel, sequence_parallel, experts)
    given, model = model, base_of(model)
    line = tp_mesh(mesh)
    group = line.get_group()
    if dist.get_world_size(group) == 1:
        if _STATE not in model.__dict__:
            if recipe is not None:
                recipe_plan(Recipe.load(recipe), model, 1, example_inputs)  # its mistakes are mistakes on one rank too
            model.__dict__[_STATE] = ParallelState(whole_plan(model, "the mesh has one rank"), DryComm(1))
        return given
    if plan_adapters(model):
        return given
    comm, request = _ready(model, line), Request(recipe, example_inputs, strict, checked, placements)
    _install(model, mesh, comm, planned_by_one(model, comm, request), request)
    return given


def parallelize_as(model: nn.Module, mesh: DeviceMesh, made: Plan) -> nn.Module:
    """Make `model` parallel as `parallelize` does, by the plan `made`, which is the same on every rank. Collective.

    Raises:
        AutoTPError: as for `parallelize`; PlanError where the plan does not fit the model or the mesh.
    """
    base = base_of(model)
    _install(base, mesh, _ready(base, tp_mesh(mesh)), made, Request())
    return model


def _ready(model: nn.Module, line: DeviceMesh) -> GroupComm:
    """Returns the collectives of a 1-D mesh, once all ranks have the same model and none is parallel."""
    group = line.get_group()
    agree(group, lambda: _refuse(model))
    agree(group, lambda: refuse_synchronised(model, group))
    same_model(group, model)
    return GroupComm(group, line)


def _refuse(model: nn.Module) -> None:
    refuse_parallel(model)
    refuse_codes(model)


def assemble(
    model: nn.Module, mesh: DeviceMesh, make_param: MakeParam, *, recipe: RecipeLike | None = None, made: Plan | None = None
) -> nn.Module:
    """Make `model`, whose parameters are on the meta device, parallel as `parallelize` does. `make_param` makes each parameter of
    the rank.

    Args:
        make_param: gets the name, the old parameter and its layout, and returns the rank's parameter.
        recipe: as for `plan`; followed where `made` is None.
        made: the plan, the same on every rank. None: one rank plans, with `recipe`.

    Raises:
        AutoTPError: as for `parallelize`; also the errors that `make_param` raises on any rank.
    """
    comm = _ready(model, tp_mesh(mesh))
    if made is not None and made.tp != comm.size:
        raise PlanError(f"the plan is for tp {made.tp}, the mesh has {comm.size} ranks along its tp dim: make one with autotp.plan")
    if comm.size == 1:
        agree(comm.group, lambda: _replace_all(model, make_param))
        return parallelize(model, mesh, recipe=recipe)
    if made is None:
        made = planned_by_one(model, comm, Request(recipe))
    return _install(model, mesh, comm, made, Request(recipe), make_param)


def _install(
    model: nn.Module, mesh: DeviceMesh, comm: GroupComm, made: Plan, request: Request, make_param: MakeParam | None = None
) -> nn.Module:
    import_module("autotp.integrations")  # a plug-in: it puts its answers on the list, and knows this module, not the other way round
    return install(model, mesh, comm, made, request, ANSWERS, make_param, Again(model, ANSWERS))


def _replace_all(model: nn.Module, make_param: MakeParam) -> None:
    made = {id(p): make_param(n, p, replicated(tuple(p.shape), 1)) for n, p in model.named_parameters()}
    for module in model.modules():
        module._parameters.update({n: made[id(p)] for n, p in module._parameters.items() if p is not None})


def plan_of(model: nn.Module) -> Plan:
    """Returns the plan that a parallel model was made with.

    Raises:
        PlanError: `model` is not parallel.
    """
    return state_of(model).plan


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns `model.state_dict()` with whole tensors in the model's own order, on every rank. Collective: call on every rank.

    Raises:
        PlanError: `model` is not parallel.
    """
    return full.full_state_dict(model, params_of(model), state_of(model).comm)


def full_grads(model: nn.Module) -> dict[str, Tensor]:
    """Returns whole gradients by parameter name, on every rank; parameters without a gradient are left out. Collective: call on
    every rank.

    Raises:
        PlanError: `model` is not parallel.
    """
    return full.full_grads(model, params_of(model), state_of(model).comm)
