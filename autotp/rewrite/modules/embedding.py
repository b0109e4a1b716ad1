"""Runs `nn.Embedding` with sharded rows: each rank looks up the ids that it holds, with zeros for the others, and the sum is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from autotp.errors import PlanError
from autotp.plan.conversions import Op
from autotp.plan.spec import DistributedForm, GradSum, ModulePlan
from autotp.rewrite.collectives.comm import Comm, keeps_results
from autotp.rewrite.collectives.conversions import copy, reduce
from autotp.rewrite.modules.classes import STATE
from autotp.rewrite.operators.distributed import local_ids
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout, laid_out
from autotp.rewrite.parameters.reads import Read, given, refuse_second
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.sequence.scatter import Scatter
from autotp.rewrite.sequence.tokens import entered_rows, tokens_of
from autotp.rewrite.transforms import refuse_transforms


class EmbeddingRun:
    """Knows which rows this rank holds and whether the lookup's partial sum is reduced here.

    No id stands for a row of padding, so a lookup gives it no gradient and `weight.fix` has nothing to do.
    """

    __slots__ = ("comm", "own", "padding", "reads", "reduces", "rows", "runs", "scatters", "weight")

    def __init__(self, weight: Read, padding_idx: int | None, comm: Comm, *, reduces: bool, scatters: Scatter | None) -> None:
        if weight.layout is None or weight.layout.is_shared:
            raise PlanError("a sharded embedding needs a layout without shared rows")
        self.weight = weight
        self.own = self.reads = (weight,)
        self.comm = comm
        self.reduces, self.scatters = reduces, scatters
        self.rows, self.runs = weight.layout.shape[0], weight.layout.runs(comm.rank)
        self.padding = -1
        offset = 0
        for a, b in self.runs:
            if padding_idx is not None and 0 <= a <= padding_idx < b:
                self.padding = padding_idx - a + offset
            offset += b - a

    def composed(self, input: Tensor) -> Tensor:
        """Runs the lookup from separate differentiable steps."""
        weight = self.weight.value()  # first: a weight of other rows is told before ids that it alone would have
        ids, outside = local_ids(input, self.runs, self.rows)
        padding = None if self.padding < 0 else self.padding
        y = F.embedding(ids, weight, padding)  # type: ignore[arg-type]
        if outside is not None:
            y = y.masked_fill(outside.unsqueeze(-1), 0)
        if self.scatters is not None:
            return self.scatters(y)
        return reduce(y, self.comm) if self.reduces else y

    def local(self, ids: Tensor, outside: Tensor | None, w: Tensor, kind: Rows | None) -> Tensor:
        """Returns rows [.., width] of local ids, zero where `outside`, summed over ranks; nothing is recorded. For a `kind` this rank's."""
        y = F.embedding(ids, w)
        if outside is not None:
            outside = outside.unsqueeze(-1)
            y = y.masked_fill(outside, 0) if keeps_results() else y.masked_fill_(outside, 0)
        if kind is not None:
            return kind.sum(y)
        return self.comm.all_reduce_(y) if self.reduces else y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: LayoutDTensor, run: EmbeddingRun, kind: Rows | None) -> Tensor:
        ids, outside = local_ids(input, run.runs, run.rows)
        ctx.save_for_backward(ids, outside)
        ctx.run, ctx.weight, ctx.rows, ctx.kind = run, weight, weight._local_tensor.shape[0], kind
        y = run.local(ids, outside, weight._local_tensor, kind)
        return y.data if y._is_view() else y  # as in a Linear

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms()
        ids, outside = ctx.saved_tensors
        if ctx.kind is not None:
            grad = entered_rows(grad, ctx.kind)
        if torch.is_grad_enabled():  # for second derivatives
            refuse_second(ctx.weight)
            if ctx.run.reduces and ctx.kind is None:
                grad = copy(grad, ctx.run.comm)
        if outside is not None:
            grad = grad.masked_fill(outside.unsqueeze(-1), 0)
        dense = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, ctx.run.padding, False)
        if dense.requires_grad:
            return None, given(dense, ctx.run.weight.fix, ctx.weight._spec), None, None
        return None, laid_out(ctx.weight._spec, dense, ctx.run.weight.layout), None, None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Makes the forward of an Embedding with sharded rows."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        run: EmbeddingRun = self.__dict__[STATE]
        weight: Tensor | None = self._parameters["weight"]
        if is_dynamo_compiling() or not in_layout(weight, run.weight.layout):
            return run.composed(input)
        kind = None if run.scatters is None else run.scatters.rows(input.unsqueeze(-1), weight.shape[1], weight.itemsize)
        if torch.is_grad_enabled() and weight.requires_grad:
            refuse_transforms()
            y: Tensor = _Embedding.apply(input, weight, run, kind)  # type: ignore[no-untyped-call]
        else:
            y = run.local(*local_ids(input, run.runs, run.rows), weight._local_tensor, kind)
        return y if kind is None else tokens_of(y, kind)

    return forward


def embedding_run(
    module: nn.Embedding, plan: ModulePlan, own: tuple[Read, ...], comm: Comm, scatter: Scatter | None
) -> EmbeddingRun | None:
    """Returns the fast form of an Embedding under `plan`, None where the plan asks for something else.

    Raises:
        PlanError: for options that a sharded lookup does not support.
    """
    weight = next((r for r in own if r.name == "weight"), None)
    if weight is None or weight.layout is None or weight.layout.dim != 0 or len(own) != 1 or plan.inputs or plan.attributes:
        return None
    if weight.convert is not None or weight.fix.grad is not GradSum.NONE or [s.kernel for s in plan.sites] != [DistributedForm.LOOKUP]:
        return None
    ops = [c.op for s in plan.outputs if not s.path for c in s.conversions]
    site = [c.op for _, conversions in plan.sites[0].outputs for c in conversions]
    if ops + site not in ([], [Op.REDUCE], [Op.SCATTER]) or plan.sites[0].inputs or plan.sites[0].ints or plan.sites[0].multiples:
        return None
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise PlanError(
            f"{plan.path}: max_norm, sparse and scale_grad_by_freq are not supported for an embedding with sharded rows; keep it replicated"
        )
    return EmbeddingRun(weight, module.padding_idx, comm, reduces=bool(ops + site), scatters=scatter if Op.SCATTER in ops else None)
