"""Plans a parallel model again after adapters were put on it, switched, merged or taken off.

The rewrite is taken back but for the parameters. One rank plans the model as it is now. Parameters that have a layout keep it, and
stay the same objects, wherever a plan can have it; the others are gathered and cut anew. New parameters are cut from the whole ones
that every rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from autotp import adapters
from autotp.agree import agree
from autotp.errors import AutoTPError, ChangedError, PlanError, sentence
from autotp.examine import TWIN_FROM
from autotp.install import Answer, install, planned_by_one
from autotp.parallel_state import ParallelState
from autotp.plan.layout import Layout, alike
from autotp.plan.placements import placements_of
from autotp.preflight import STATE, same_model, tp_mesh
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.entry import ENTRY
from autotp.rewrite.modules.classes import wrap_forward
from autotp.rewrite.parameters.data_parallel import is_managed
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.make import MakeParam, shard_onto
from autotp.rewrite.parameters.names import own_name
from autotp.rewrite.parameters.quantized import cut_onto
from autotp.rewrite.strip import is_rewritten, strip
from autotp.rewrite.undo import Undo


class Again:
    """Follows the changes that adapters make to `model`; see `autotp.rewrite.entry.Follow`."""

    def __init__(self, model: nn.Module, answers: Sequence[Answer]) -> None:
        self.model, self.answers = model, answers
        self.known: frozenset[tuple[str, bool]] = frozenset()

    def begin(self) -> None:
        """See `Follow`."""
        self.known = self._now()

    def wants(self) -> bool:
        """True where there are adapters that the plan does not know."""
        return self._can() and self._now() != self.known

    def _now(self) -> frozenset[tuple[str, bool]]:
        """The parameters of adapters as they are, whatever wrappers of torch's are between."""
        return frozenset((own_name(name), laid_out) for name, laid_out in adapters.parameters(self.model))

    def __call__(self, change: ChangedError) -> bool:
        """See `Follow`. Collective.

        Raises:
            PlanError: FSDP holds the parameters, or ranks have other adapters. AutoTPError: no plan can be made. The model is then not
                parallel any more.
        """
        if not self._can() or not (self.known or self._now()):
            return False
        plan_again(self.model, self.answers, change)
        return True

    def _can(self) -> bool:
        state = self.model.__dict__.get(STATE)
        return isinstance(state, ParallelState) and state.journal is not None


def plan_adapters(model: nn.Module) -> bool:
    """Plan a parallel model again where adapters were put on it since, rather than at its next call. Collective.

    Returns:
        Whether there were any.

    Raises:
        AutoTPError: as `plan_again`.
    """
    entry = model.__dict__.get(ENTRY)
    if entry is None or entry.follow is None or not entry.follow.wants():
        return False
    return bool(entry.follow(ChangedError("adapters were put on the model after parallelize")))


def plan_again(model: nn.Module, answers: Sequence[Answer], change: ChangedError) -> None:
    """Make a parallel `model` parallel by a plan of what it is now. Collective.

    Raises:
        PlanError: FSDP holds the parameters. AutoTPError: as for `parallelize`; every later call then raises it again.
    """
    state: ParallelState = model.__dict__[STATE]
    comm, mesh, journal = state.comm, state.mesh, state.journal
    assert isinstance(comm, GroupComm) and mesh is not None and journal is not None
    comm.ask()
    agree(comm.group, lambda: _refuse_chunks(model, change))
    journal.undo()
    del model.__dict__[STATE]
    try:
        _strip_copies(model)
        same_model(comm.group, model)
        held = {n: p._layout for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, LayoutDTensor)}
        # the plan may have its placements from a recipe, or have been given
        request = replace(state.request, recipe=None, placements=state.request.placements | placements_of(state.plan))
        with _whole(model):
            made = planned_by_one(model, comm, request, held)
        install(model, mesh, comm, made, request, answers, _keep(tp_mesh(mesh)), Again(model, answers))
    except AutoTPError as error:
        text = (
            f"{change}, and the model cannot be planned again: {sentence(error)} Build the model again, alike on every rank (one seed), "
            "with the adapters before parallelize"
        )
        wrap_forward(model, partial(_refuse, text), Undo())
        raise PlanError(text) from error


def _refuse(text: str, *_: Any) -> Any:
    raise PlanError(text)


def _refuse_chunks(model: nn.Module, change: ChangedError) -> None:
    if any(isinstance(m, FSDPModule) for m in model.modules()) or any(map(is_managed, model.parameters())):
        raise PlanError(f"{change}. FSDP has taken the parameters over: put adapters on, and take them off, before fully_shard")


def _strip_copies(model: nn.Module) -> None:
    for module in model.modules():
        if is_rewritten(module):
            strip(module)


def _numbers(p: DTensor) -> Tensor:
    detached: Any = p.detach()
    return detached.full_tensor()  # type: ignore[no-any-return]


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Has `model` hold whole parameters while it is planned: their numbers where the model is small, else none."""
    small = sum(p.numel() for p in model.parameters()) <= TWIN_FROM
    whole: dict[int, nn.Parameter] = {}
    for p in model.parameters():
        if isinstance(p, DTensor):
            numbers = _numbers(p) if small else torch.empty(p.shape, dtype=p.dtype, device="meta")
            whole[id(p)] = nn.Parameter(numbers, requires_grad=p.requires_grad)
    tables = [(m._parameters, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None and id(p) in whole]
    for table, name, p in tables:
        table[name] = whole[id(p)]
    try:
        yield
    finally:
        for table, name, p in tables:
            table[name] = p


def _keep(line: DeviceMesh) -> MakeParam:
    """As `shard_onto`; a parameter that is in its layout already stays the same object."""
    cut = cut_onto(line, shard_onto(line))

    def make(name: str, old: nn.Parameter, layout: Layout) -> nn.Parameter:
        if isinstance(old, LayoutDTensor) and alike(old._layout, layout):
            return old
        if not isinstance(old, DTensor):
            adapters.stop_averaging(old)
            return cut(name, old, layout)
        whole = nn.Parameter(_numbers(old), requires_grad=old.requires_grad)
        whole.grad = old.grad.full_tensor() if isinstance(old.grad, DTensor) else old.grad
        return cut(name, whole, layout)

    return make
