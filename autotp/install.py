"""Rewrites a model by a plan on every rank of a group, or on none, and takes the rewrite back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.agree import agree
from autotp.already_quantized import plain_weights, settle_all
from autotp.examine import checked_plan
from autotp.experts.place import with_experts
from autotp.parallel_state import ParallelState, Request
from autotp.plan.experts import is_dealt
from autotp.plan.layout import Layout, alike
from autotp.plan.placements import placed
from autotp.plan.plan import Plan
from autotp.plan.sequence_parallel import tokens_in_parts
from autotp.planning import apart_of, prepared
from autotp.preflight import STATE, tp_mesh
from autotp.rewrite.apply import apply
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.entry import Follow, install_entries, originals_of
from autotp.rewrite.guards.same_inputs import install_same_inputs
from autotp.rewrite.parameters.make import MakeParam, shard_onto
from autotp.rewrite.parameters.quantized import cut_onto
from autotp.rewrite.sequence.scatter import Scatter
from autotp.rewrite.undo import Undo

Answer = Callable[[nn.Module, DeviceMesh, Undo], None]


def planned_by_one(model: nn.Module, comm: GroupComm, request: Request, held: Mapping[str, Layout] | None = None) -> Plan:
    """Rank 0's plan, on every rank. Collective.

    `held`: layouts that parameters have already. A plan that gives them others is made again, with these asked for.

    Raises:
        AutoTPError: as for `prepared`, the same on every rank.
    """

    def work() -> Plan | None:
        if comm.rank:
            return None
        with plain_weights(model):
            made = prepared(model, comm.size, request.recipe, request.example_inputs, request.strict, request.check, request.placements)
            if all(alike(made.params[name].layout, layout) for name, layout in (held or {}).items()):
                return made
            wanted = {name: layout for name, layout in (held or {}).items() if not is_dealt(layout)}  # no axis of the planner's is so
            again = checked_plan(
                model, comm.size, request.example_inputs, wanted, check=request.check, apart=apart_of(model, request.placements)
            )
            again = with_experts(again, model, request.example_inputs, request.check, request.placements.experts)
            return placed(again, request.placements)

    parcel: list[Any] = [agree(comm.group, work)]
    dist.broadcast_object_list(parcel, group=comm.group, group_src=0)
    return parcel[0]  # type: ignore[no-any-return]


def install(
    model: nn.Module,
    mesh: DeviceMesh,
    comm: GroupComm,
    made: Plan,
    request: Request,
    answers: Sequence[Answer],
    make_param: MakeParam | None = None,
    follow: Follow | None = None,
) -> nn.Module:
    """Rewrite `model` on every rank, or on none. Collective.

    Args:
        answers: each puts on the model what another library asks of it, before it changes.
        make_param: as for `apply`; None shards the parameters that are there.
        follow: is asked before a change of the model is refused.

    Raises:
        AutoTPError: the same on every rank, with the model as it was.
    """
    undo, line = Undo(), tp_mesh(mesh)

    def rewrite() -> None:
        for answer in answers:
            answer(model, mesh, undo)
        originals = originals_of(model, made)
        scatter = Scatter(comm, made.least_scattered) if tokens_in_parts(made) else None
        make = make_param or cut_onto(line, shard_onto(line))
        more = {"scatter": scatter, "by_token": made.tokens.by_token, "together": made.together}
        done = apply(model, made.params, made.modules, comm=comm, make_param=make, **more)  # type: ignore[arg-type]
        undo.push(done.undo)
        undo.at_release(done.settle)
        install_entries(model, made, comm, originals, undo, follow)
        install_same_inputs(model, comm, undo)
        settle_all(model, made)

    try:
        agree(comm.group, rewrite)
    except BaseException:
        undo.undo()  # also where another rank failed: either all models are parallel or none is
        raise
    undo.settle()
    if follow is not None:
        follow.begin()
    model.__dict__[STATE] = ParallelState(made, comm, mesh, request, undo)
    return model
