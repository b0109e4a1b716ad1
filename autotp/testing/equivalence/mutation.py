"""One mistake in a plan: a value that changes the plan before it is applied, and damages the parallel model after.

| kind    | the mistake                                                                                                     |
|---------|-----------------------------------------------------------------------------------------------------------------|
| drop    | a collective is left out: a conversion at a module boundary or call, a gradient's sum, a statistic, a choice of pairs |
| double  | an all-reduce is done twice, forward (of a result) or backward (of what enters a region)                         |
| swap    | two ranks have each other's shard of a parameter                                                                 |
| bias    | a row-parallel bias is added on each rank instead of once                                                        |
| repeat  | the sum of a gradient that is whole already                                                                      |
| shift   | a slice is taken elsewhere: every tp-th index instead of a block of a value, a parameter's shard off by one      |
| forget  | an attribute, or an int of a call, that must be local stays global                                               |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from autotp.plan.plan import Plan
from autotp.plan.spec import ModulePlan


class Kind(Enum):
    """Kinds of mistakes; see the module docstring."""

    DROP = "drop"
    DOUBLE = "double"
    SWAP = "swap"
    BIAS = "bias"
    REPEAT = "repeat"
    SHIFT = "shift"
    FORGET = "forget"


class Damage(Enum):
    """What is done to a parameter of the parallel model."""

    NONE = "none"
    SWAP = "swap"  # ranks 0 and `other` exchange their shards
    ROLL = "roll"  # the shard is cut one index too late
    SUM_AGAIN = "sum again"  # its finished gradient is all-reduced once more


@dataclass(frozen=True, slots=True)
class Mutation:
    """One mistake. `where` says it in words; `old` becomes `new` in the plan's modules; `damage` befalls `parameter`."""

    kind: Kind
    where: str
    old: ModulePlan | None = None
    new: tuple[ModulePlan, ...] = ()
    parameter: str = ""
    damage_by: Damage = Damage.NONE
    other: int = 1

    def __str__(self) -> str:
        return f"{self.kind.value} {self.where}"

    def change(self, plan: Plan) -> Plan:
        """`plan` with the mistake in it."""
        if self.old is None:
            return plan
        changed = {m.path: m for m in self.new}
        return replace(plan, modules=tuple(changed.get(m.path, m) for m in plan.modules))

    def damage(self, model: nn.Module, plan: Plan) -> None:
        """Do to a parameter of the parallel model, on this rank, what no plan can say."""
        if self.damage_by is Damage.NONE:
            return
        parameter = dict(model.named_parameters(remove_duplicate=False))[self.parameter]
        if self.damage_by is Damage.SUM_AGAIN:
            parameter.register_post_accumulate_grad_hook(_sum_again)  # type: ignore[no-untyped-call]
            return
        assert isinstance(parameter, DTensor)
        layout, local, rank = plan.params[self.parameter].layout, parameter._local_tensor, dist.get_rank()
        shards = [torch.empty_like(local) for _ in range(layout.tp)]
        dist.all_gather(shards, local.detach().contiguous())
        full = layout.unshard(shards)
        with torch.no_grad():
            if self.damage_by is Damage.ROLL:
                local.copy_(layout.shard(full.roll(-1, layout.dim or 0), rank))
            else:
                local.copy_(layout.shard(full, {0: self.other, self.other: 0}.get(rank, rank)))


def _sum_again(parameter: torch.Tensor) -> None:
    grad = parameter.grad
    if grad is not None:
        dist.all_reduce(grad._local_tensor if isinstance(grad, DTensor) else grad)
