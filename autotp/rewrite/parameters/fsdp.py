"""Keeps the layouts of parameters that FSDP2, HSDP or `replicate` take over.

torch's `fully_shard` makes a 2-D DTensor of a parameter that is a DTensor over the tp mesh. It does not know that the parameter has a
layout, and has no protocol to be told: what it makes would be read as if it were cut evenly. So `FSDPParam`, which holds one parameter
for FSDP, becomes a `LayoutFSDPParam` where the parameter has a layout. It gives the layout to every tensor that FSDP makes of it.

FSDP has its own parameters, sharded ones; those of before, and the gathered ones that stay after a forward without a backward, get no
gradients. An optimizer that has such a one is told so when it steps.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from autotp.errors import AutoTPError, MeshError
from autotp.plan.boxes import is_even
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.compiled_grads import order_gradient
from autotp.rewrite.parameters.data_parallel import MANAGED, NO_HOOKS, REPLACED, DataParallelDTensor, placed
from autotp.rewrite.parameters.layout_dtensor import GradHook, LayoutDTensor, laid_out, same_layout
from autotp.rewrite.parameters.quantized import QuantizedDTensor


class LayoutFSDPParam(FSDPParam):
    """Holds one parameter that has a layout for FSDP."""

    _layout: Layout

    def to_sharded_dtensor(self, tensor: Tensor) -> DataParallelDTensor:
        """Returns the sharded parameter, or its gradient, of this rank's chunk `tensor`."""
        made = super().to_sharded_dtensor(tensor)
        return placed(made._spec, made._local_tensor, self._layout)

    def init_unsharded_param(self) -> None:
        """Makes the parameter that the module's forward reads: the tp rank's part."""
        super().init_unsharded_param()  # type: ignore[no-untyped-call]
        made: Any = self._unsharded_param
        if type(made) is not LayoutDTensor:
            unsharded = laid_out(made._spec, made._local_tensor, self._layout)
            self._unsharded_param = nn.Parameter(unsharded, requires_grad=made.requires_grad)
            setattr(self._unsharded_param, MANAGED, True)

    def reset_sharded_param(self) -> None:
        """Takes the parameter over that its module has now: `model.to(…)` and `load_state_dict(assign=True)` make another."""
        now, *tied = self._holders()
        taken = isinstance(now, DataParallelDTensor) and same_layout(now, self.sharded_param)  # type: ignore[arg-type]
        if now is not self.sharded_param and not taken:
            _refuse_replaced(self)
        if any(p is not now for p in tied):  # `assign=True` comes to them in turn; `to_unsharded` refuses what stays so
            return
        super().reset_sharded_param()  # type: ignore[no-untyped-call]
        self._hook()

    def to_unsharded(self) -> None:
        """Puts the gathered parameter where forwards read it."""
        if self.sharded_state is ShardedState.SHARDED and any(p is not self.sharded_param for p in self._holders()):
            _refuse_replaced(self)
        super().to_unsharded()
        self._hook()
        unsharded: Any = self._unsharded_param
        # FSDP itself takes a gradient that compiled code made, an ordinary DTensor, where that is as large as the parameter says.
        if not is_even(self._layout) and unsharded.requires_grad:  # which users may change between steps
            order_gradient(unsharded)

    def _holders(self) -> list[Any]:
        info = self._module_info
        places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
        return [module._parameters.get(name) for module, name in places]

    def _hook(self) -> None:
        if self.sharded_param.requires_grad and isinstance(self.sharded_param, LayoutDTensor):
            order_gradient(self.sharded_param)


def _refuse_replaced(held: LayoutFSDPParam) -> NoReturn:
    """Refuse a parameter that a user put where FSDP had its own, which would take its place again.

    Raises:
        AutoTPError: always.
    """
    info = held._module_info
    whose = f"{type(info.module).__name__}.{info.param_name}"
    tied = [f"{type(m).__name__}.{name}" for m, name in zip(info.shared_modules, info.shared_param_names, strict=True)]
    if len({id(p) for p in held._holders()}) > 1:
        raise AutoTPError(
            f"{' and '.join([whose, *tied])} were one parameter in fully_shard and are not now: one was replaced (assigned, or by "
            "load_state_dict(assign=True), which unties). Tie them again (model.tie_weights()) before the next forward, or untie them "
            "before fully_shard"
        )
    raise AutoTPError(
        f"{whose} was replaced (assigned, tied, reparametrized, or given by functional_call) after fully_shard, which goes on with the "
        "parameter that it knows: replace it before fully_shard, or copy_ into it"
    )


def reshard(model: nn.Module) -> None:
    """Has FSDP let go of the parameters that it gathered for a forward: a root keeps them where no backward came (an evaluation)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _keeps_layouts(init: Any) -> Any:
    @wraps(init)
    def init_sharded_param(self: FSDPParam, param: nn.Parameter, *args: Any, **kwargs: Any) -> None:
        if isinstance(param, QuantizedDTensor):
            raise AutoTPError(
                "FSDP does not shard quantized weights: call fully_shard(…, ignored_params={p for p in model.parameters() if not "
                "p.requires_grad}), and each data-parallel rank keeps its tp part of the frozen weights"
            )
        if isinstance(param, LayoutDTensor):
            self.__class__ = LayoutFSDPParam
            self._layout = param._layout  # type: ignore[attr-defined]
            if any(isinstance(hook, GradHook) for hook in (param._backward_hooks or {}).values()):
                raise AutoTPError(f"a parameter of shape {tuple(param.shape)} has a hook: {NO_HOOKS}")
            # Newer versions pass it.
            over = getattr(self, "mesh_info", None) or next(a for a in (*args, *kwargs.values()) if hasattr(a, "mesh"))
            _refuse_tp_ranks(over.mesh, param)
        init(self, param, *args, **kwargs)
        if isinstance(param, LayoutDTensor):
            setattr(param, REPLACED, True)
            self._hook()  # type: ignore[attr-defined]

    return init_sharded_param


def _refuse_tp_ranks(mesh: Any, param: LayoutDTensor) -> None:
    """Refuse to shard over ranks that hold different tp parts.

    Raises:
        MeshError: the mesh has more than one rank of the parameter's tp group.
    """
    tp = set(dist.get_process_group_ranks(param._spec.mesh.get_group()))
    if len(both := tp & set(mesh.mesh.flatten().tolist())) > 1:
        raise MeshError(
            f"fully_shard would shard a tensor-parallel model over the ranks {sorted(both)}, which hold different parts of it: pass the "
            'mesh of the data-parallel ranks, as in fully_shard(model, mesh=mesh["dp"]) of init_device_mesh(device, (dp, tp), '
            'mesh_dim_names=("dp", "tp"))'
        )


def _refuse_stale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse to step parameters that have no gradients under FSDP, and would never be trained.

    Raises:
        AutoTPError: the optimizer has parameters of before `fully_shard`, or gathered ones of after a forward without a backward.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if type(p) is LayoutDTensor and (REPLACED in p.__dict__ or MANAGED in p.__dict__):
                when = "before fully_shard" if REPLACED in p.__dict__ else "while FSDP held gathered parameters, after a forward"
                raise AutoTPError(
                    f"the optimizer was made {when}: its parameter of shape {tuple(p.shape)} is not the model's any more, and would never "
                    "be trained. Make the optimizer after fully_shard and before the first forward, or after model.reshard()"
                )


register_optimizer_step_pre_hook(_refuse_stale)
FSDPParam._init_sharded_param = _keeps_layouts(FSDPParam._init_sharded_param)  # type: ignore[method-assign]
