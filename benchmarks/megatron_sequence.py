"""The yardstick of sequence parallelism: Megatron's way for one architecture, on plain tensors.

Hidden states between regions are a rank's tokens [1, tokens / tp, width]. q, k, v share one all-gather of their input, in the forward and
again in the backward, as do gate and up. The gradients of norms are summed in one all-reduce after the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.megatron import GatherOut, parallelize_by_hand


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[1, n, width] of every rank → [1, tp · n, width]."""
    found = x.new_empty(dist.get_world_size(group) * x.shape[1], x.shape[2])
    dist.all_gather_into_tensor(found, x[0].contiguous(), group=group)
    return found.unsqueeze(0)


def scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums [1, tp · n, width] → this rank's [1, n, width]."""
    found = x.new_empty(x.shape[1] // dist.get_world_size(group), x.shape[2])
    dist.reduce_scatter_tensor(found, x[0].contiguous(), group=group)
    return found.unsqueeze(0)


class Into(torch.autograd.Function):
    """Column-parallel products of one gathered input: x [1, n, in], weights [out / tp, in] → [1, tp · n, out / tp] each."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        whole = gathered(x, group)
        return tuple(F.linear(whole, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        whole = gathered(x, ctx.group)[0]
        of_input = grads[0] @ weights[0]
        for g, w in zip(grads[1:], weights[1:], strict=True):
            of_input = of_input + g @ w
        return None, scattered(of_input, ctx.group), *(g[0].t() @ whole for g in grads)


class Out(torch.autograd.Function):
    """Reduce-scatter; all-gathers the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, ctx.group), None


class Given(nn.Module):
    """Hands on a product that was made with others, in place of the Linear that the attention calls."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.value is not None
        return self.value


class Rows(nn.Module):
    """A row-parallel Linear whose sum is scattered."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = weight, group

    def forward(self, x: Tensor) -> Tensor:
        return Out.apply(F.linear(x, self.weight), self.group)


class SequenceParallel(nn.Module):
    """A LlamaForCausalLM that was made parallel by hand, with a forward of its own."""

    def __init__(self, model: Any, group: dist.ProcessGroup) -> None:
        super().__init__()
        parallelize_by_hand(model, group)
        self.config, self.group, self.inner = model.config, group, model.model
        self.lm_head, self.loss_function = model.lm_head, model.loss_function
        for layer in self.inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            layer.heads = nn.ParameterList([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            attention.q_proj, attention.k_proj, attention.v_proj = Given(), Given(), Given()
            attention.o_proj = Rows(attention.o_proj.weight, group)
            mlp.down_proj = Rows(mlp.down_proj.weight, group)

    def forward(self, ids: Tensor, labels: Tensor, **_: Any) -> Any:
        """Returns an object with the loss."""
        table = self.inner.embed_tokens
        local = ids - table.start
        outside = (local < 0) | (local >= table.weight.shape[0])
        rows = F.embedding(local.masked_fill(outside, 0), table.weight).masked_fill(outside.unsqueeze(-1), 0)
        x = Out.apply(rows, self.group)
        positions = self.inner.rotary_emb(rows, torch.arange(ids.shape[1]).unsqueeze(0))
        for layer in self.inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v = Into.apply(self.group, layer.input_layernorm(x), *layer.heads)
            attention.q_proj.value, attention.k_proj.value, attention.v_proj.value = q, k, v
            x = x + attention(rows, position_embeddings=positions, attention_mask=None)[0]
            gate, up = Into.apply(self.group, layer.post_attention_layernorm(x), mlp.gate_proj.weight, mlp.up_proj.weight)
            x = x + mlp.down_proj(mlp.act_fn(gate) * up)
        (logits,) = Into.apply(self.group, self.inner.norm(x), self.lm_head.weight)
        logits = GatherOut.apply(logits, self.group)
        self.loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return self

    def finish(self) -> None:
        """Sums the gradients of norms, which are those of a rank's tokens."""
        norms = [p for n, p in self.inner.named_parameters() if "norm" in n]
        flat = torch.cat([p.grad for p in norms if p.grad is not None])
        dist.all_reduce(flat, group=self.group)
        for p, grad in zip(norms, flat.split([p.numel() for p in norms]), strict=True):
            p.grad = grad
