"""The yardstick: tensor parallelism written by hand for one architecture, on plain tensors, in Megatron's way.

It keeps transformers' llama classes and changes only what must change: local weights, a function for the entering copy,
one for the leaving sum, a vocab-parallel embedding and head. q, k, v share one copy, as do gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class CopyIn(torch.autograd.Function):
    """Identity; sums the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SumOut(torch.autograd.Function):
    """Sums over ranks; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        dist.all_reduce(x, group=group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_out(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums over ranks; dynamo knows no `mark_dirty`, so compiled code, which records no gradients here, has the bare collective."""
    if torch.compiler.is_compiling():
        dist.all_reduce(x, group=group)
        return x
    return SumOut.apply(x, group)


class GatherOut(torch.autograd.Function):
    """Joins the last dim; the gradient's own part passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), x.shape[-1]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.rank * ctx.size, ctx.size), None


class VocabLoss(torch.autograd.Function):
    """[N, V / tp] logits of this rank, [N] targets → [N] losses; Megatron's: three all-reduces, the softmax is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        start = dist.get_rank(group) * logits.shape[-1]
        most = logits.amax(-1)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        logits = logits - most.unsqueeze(-1)
        outside = (targets < start) | (targets >= start + logits.shape[-1])
        local = (targets - start).masked_fill(outside, 0)
        of_target = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(outside, 0)
        dist.all_reduce(of_target, group=group)
        exponentials = logits.exp_()
        total = exponentials.sum(-1)
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local, outside)
        return total.log() - of_target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, outside = ctx.saved_tensors
        softmax.scatter_add_(-1, local.unsqueeze(-1), outside.logical_not().unsqueeze(-1).to(softmax.dtype).neg_())
        return softmax.mul_(grad.unsqueeze(-1)), None, None


class Shared:
    """The entering copy that several linears share within one block."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.of: Tensor | None = None
        self.copied: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self.of is not x or self.copied is None:
            self.of, self.copied = x, CopyIn.apply(x, self.group)
        return self.copied


class Colwise(nn.Module):
    """Rows of the weight on this rank."""

    def __init__(self, weight: Tensor, shared: Shared, gather: bool = False) -> None:
        super().__init__()
        self.weight, self.shared, self.gather = nn.Parameter(weight), shared, gather

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.shared(x), self.weight)
        return GatherOut.apply(y, self.shared.group) if self.gather else y


class Rowwise(nn.Module):
    """Columns of the weight on this rank."""

    def __init__(self, weight: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = nn.Parameter(weight), group

    def forward(self, x: Tensor) -> Tensor:
        return sum_out(F.linear(x, self.weight), self.group)


class VocabEmbedding(nn.Module):
    """Rows of the table on this rank."""

    def __init__(self, weight: Tensor, start: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.start, self.group = nn.Parameter(weight), start, group

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.start
        outside = (local < 0) | (local >= self.weight.shape[0])
        y = F.embedding(local.masked_fill(outside, 0), self.weight)
        return sum_out(y.masked_fill(outside.unsqueeze(-1), 0), self.group)


def parallelize_by_hand(model: nn.Module, group: dist.ProcessGroup, *, loss_parallel: bool = False) -> nn.Module:
    """Replace the linears and the embedding of a LlamaForCausalLM by their local forms.

    `loss_parallel`: the logits stay local, and the loss is computed from them.
    """
    rank, tp = dist.get_rank(group), dist.get_world_size(group)

    def part(weight: Tensor, dim: int) -> Tensor:
        return weight.detach().chunk(tp, dim)[rank].clone(memory_format=torch.contiguous_format)

    for layer in model.model.layers:  # type: ignore[union-attr]
        attention, mlp = layer.self_attn, layer.mlp
        shared = Shared(group)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, Colwise(part(getattr(attention, name).weight, 0), shared))
        attention.o_proj = Rowwise(part(attention.o_proj.weight, 1), group)
        shared = Shared(group)
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, Colwise(part(getattr(mlp, name).weight, 0), shared))
        mlp.down_proj = Rowwise(part(mlp.down_proj.weight, 1), group)
    table: Any = model.model.embed_tokens  # type: ignore[union-attr]
    rows = table.weight.shape[0] // tp
    model.model.embed_tokens = VocabEmbedding(part(table.weight, 0), rank * rows, group)  # type: ignore[union-attr]
    model.lm_head = Colwise(part(model.lm_head.weight, 0), Shared(group), gather=not loss_parallel)  # type: ignore[union-attr, arg-type]
    if loss_parallel:

        def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
            targets = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
            losses = VocabLoss.apply(logits.float().flatten(0, 1), targets.clamp(min=0), group)
            return losses.masked_fill(targets == -100, 0).sum() / (targets != -100).sum()

        model.loss_function = loss  # type: ignore[assignment]
    return model
