"""What people do with the parameters of a model that they train: each use computes named numbers, the same on one device and on ranks.

A use gets the model (on one device or parallel) as it was made, and tokens. It returns tensors, whole or laid out, whose numbers are
compared; where it does not train for itself, the training of the model afterwards is compared too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize, prune

from tests.composition import training
from tests.composition.training import Data, adamw, exact, loss_of

#: The layouts of `training.MODELS`, and biases behind reductions.
MODELS = {**training.MODELS, "biased": ("LlamaConfig", {**training.LLAMA, "attention_bias": True, "mlp_bias": True})}
Found = dict[str, Any]
Use = Callable[[Any, Tensor], Found]


def build(kind: str, *, eager: bool) -> nn.Module:
    """The model on one device, in float64, with weights that no gradient is small for; `eager`: attention that has a second derivative."""
    torch.manual_seed(0)
    name, options = MODELS[kind]
    attention = {"attn_implementation": "eager"} if eager else {}
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options), **attention)
    model.double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.ndim > 1 else p + torch.randn_like(p) * 0.1)
    return model


def whole(x: Any) -> Tensor:
    """The numbers of a tensor, laid out or not."""
    x = torch.as_tensor(x) if not isinstance(x, Tensor) else x
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def head(m: Any) -> Any:
    return m.get_output_embeddings()


def table(m: Any) -> Any:
    return m.get_input_embeddings()


def inner(m: Any) -> Any:
    """A module in a block, with a weight that is cut: the first attention projection."""
    return m.get_submodule(_inner_path(m))


def _inner_path(m: Any) -> str:
    found = [n for n, c in m.named_modules() if n.rpartition(".")[2] in ("c_attn", "qkv_proj", "k_proj", "query_key_value")]
    return found[0]


def hidden(m: Any, ids: Tensor) -> Tensor:
    with exact(m):
        return m.base_model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)  # type: ignore[no-any-return]


def labels(ids: Tensor) -> Tensor:
    return ids[:, 1:].flatten()


def trained(m: Any, loss: Tensor) -> Found:
    """The loss and every gradient."""
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss, **{f"{n}.grad": p.grad for n, p in m.named_parameters() if p.grad is not None}}


def steps(m: Any, ids: Tensor, count: int = 2) -> Found:
    """Losses of steps of AdamW, and the parameters afterwards."""
    optimizer = adamw(m)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(m, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **dict(m.named_parameters())}


# ---------------------------------------------------------------- in operators


def matmul(m: Any, ids: Tensor) -> Found:
    return trained(m, F.cross_entropy(hidden(m, ids) @ head(m).weight.T, labels(ids)))


def linear(m: Any, ids: Tensor) -> Found:
    return trained(m, F.cross_entropy(F.linear(hidden(m, ids), head(m).weight, head(m).bias), labels(ids)))


def einsum(m: Any, ids: Tensor) -> Found:
    return trained(m, F.cross_entropy(torch.einsum("nd,vd->nv", hidden(m, ids), head(m).weight), labels(ids)))


def chunks(m: Any, ids: Tensor) -> Found:
    """A cross entropy in chunks of tokens."""
    total: Any = 0.0
    for h, wanted in zip(hidden(m, ids).split(5), labels(ids).split(5), strict=True):
        total = total + F.cross_entropy(h @ head(m).weight.t(), wanted, reduction="sum")
    return trained(m, total / ids.numel())


class _Fused(torch.autograd.Function):
    """A linear cross entropy that makes its gradients in the forward, in chunks of tokens, as Liger's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(weight)
        losses = torch.zeros(x.shape[0], dtype=x.dtype)
        for a in range(0, x.shape[0], 5):
            part, wanted = x[a : a + 5], target[a : a + 5]
            logits = part @ weight.t()
            losses[a : a + 5] = F.cross_entropy(logits, wanted, reduction="none")
            grad = logits.softmax(-1)
            grad[torch.arange(part.shape[0]), wanted] -= 1
            grad = grad / x.shape[0]
            grad_x[a : a + 5] = grad @ weight
            torch.addmm(grad_w, grad.t(), part, out=grad_w)
        ctx.save_for_backward(grad_x.detach(), grad_w.detach())
        return losses.sum() / x.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None


def fused(m: Any, ids: Tensor) -> Found:
    return trained(m, _Fused.apply(hidden(m, ids), head(m).weight, labels(ids)))  # type: ignore[no-untyped-call]


class _Recomputed(torch.autograd.Function):
    """A linear cross entropy that keeps its inputs and computes the logits again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, target)
        return torch.stack(
            [F.cross_entropy(h @ weight.T, t, reduction="sum") for h, t in zip(x.split(5), target.split(5), strict=True)]
        ).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, target = ctx.saved_tensors
        grad_x, grad_w = torch.empty_like(x), torch.zeros(weight.shape, dtype=weight.dtype)
        for a in range(0, x.shape[0], 5):
            p = (x[a : a + 5] @ weight.T).softmax(-1) - F.one_hot(target[a : a + 5], weight.shape[0])
            grad_x[a : a + 5] = p @ weight
            grad_w += p.T @ x[a : a + 5]
        return grad * grad_x, grad * grad_w, None


def recomputed(m: Any, ids: Tensor) -> Found:
    return trained(m, _Recomputed.apply(hidden(m, ids), head(m).weight, labels(ids)))  # type: ignore[no-untyped-call]


def embedded(m: Any, ids: Tensor) -> Found:
    with exact(m):
        logits = m(inputs_embeds=F.embedding(ids, table(m).weight), use_cache=False).logits
    return trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids)))


def indexed(m: Any, ids: Tensor) -> Found:
    with exact(m):
        logits = m(inputs_embeds=table(m).weight[ids], use_cache=False).logits
    return trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids)))


def soft_prompt(m: Any, ids: Tensor) -> Found:
    """Learned vectors before the rows of the table."""
    prompt = nn.Parameter(torch.linspace(-1, 1, 3 * table(m).weight.shape[1], dtype=torch.float64).view(3, -1))
    embeds = torch.cat([prompt.expand(ids.shape[0], -1, -1), table(m).weight[ids]], 1)
    with exact(m):
        logits = m(inputs_embeds=embeds, use_cache=False).logits[:, 3:]
    return trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids))) | {"prompt": prompt.grad}


def mixture_of_rows(m: Any, ids: Tensor) -> Found:
    """Soft tokens: probabilities over the table."""
    p = F.one_hot(ids, table(m).weight.shape[0]).double() * 0.9 + 0.1
    with exact(m):
        logits = m(inputs_embeds=p @ table(m).weight, use_cache=False).logits
    return trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids)))


def joined(m: Any, ids: Tensor) -> Found:
    """A head with classes of its own behind the vocabulary."""
    h = hidden(m, ids)
    extra = nn.Parameter(torch.linspace(-1, 1, 4 * h.shape[1], dtype=torch.float64).view(4, -1))
    loss = F.cross_entropy(F.linear(h, torch.cat([head(m).weight, extra])), labels(ids))
    return trained(m, loss) | {"extra": extra.grad}


def sampled(m: Any, ids: Tensor) -> Found:
    """Logits of some classes alone, by a slice and by numbers."""
    h, w = hidden(m, ids), head(m).weight
    rows = torch.tensor([3, 1, 17, 39])
    return trained(m, (h @ w[:10].T).logsumexp(-1).mean() + F.cosine_similarity(h[:4], w[rows]).sum() + (h[:4] * w[rows]).sum())


def probed(m: Any, ids: Tensor) -> Found:
    """Other products with plain tensors: of the inner weight too."""
    w = inner(m).weight
    x = torch.linspace(-1, 1, 5 * w.shape[1], dtype=torch.float64).view(5, -1).requires_grad_()
    y = torch.linspace(-1, 1, 2 * w.shape[0], dtype=torch.float64).view(2, -1).requires_grad_()
    loss = (x @ w.T).tanh().sum() + F.normalize(w, dim=-1).mul(x[0]).sum() + torch.cdist(x, w).sum() + torch.mv(w, x[1]).sin().sum()
    loss = loss + (y @ w @ x.T).sin().sum() + torch.outer(w[0], y[0]).sin().sum()
    return trained(m, loss) | {"x": x.grad, "y": y.grad}


def adapted(m: Any, ids: Tensor) -> Found:
    """A weight with a low-rank addition, put there by functional_call."""
    path = f"{_inner_path(m)}.weight"
    w = m.get_parameter(path)
    a = torch.linspace(-1, 1, 2 * w.shape[1], dtype=torch.float64).view(2, -1).requires_grad_()
    b = torch.linspace(-1, 1, 2 * w.shape[0], dtype=torch.float64).view(-1, 2).requires_grad_()
    with exact(m):
        logits = torch.func.functional_call(m, {path: w + b @ a}, kwargs={"input_ids": ids, "use_cache": False}).logits
    return trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids))) | {"a": a.grad, "b": b.grad}


def scaled(m: Any, ids: Tensor) -> Found:
    """Weights times learned plain numbers: one for each row, one for each entry, one for all; put there by functional_call."""
    path = f"{_inner_path(m)}.weight"
    w = m.get_parameter(path)
    rows = torch.linspace(0.5, 1.5, w.shape[0], dtype=torch.float64).unsqueeze(1).requires_grad_()
    entries = torch.linspace(0.5, 1.5, w.numel(), dtype=torch.float64).view(w.shape).requires_grad_()
    all_of_it = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    new = torch.where(entries > 1, w * rows, w * entries) + entries * all_of_it - w / all_of_it
    with exact(m):
        logits = torch.func.functional_call(m, {path: new}, kwargs={"input_ids": ids, "use_cache": False}).logits
    found = trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids)))
    return found | {"rows": rows.grad, "entries": entries.grad, "all": all_of_it.grad}


def other_rows(m: Any, ids: Tensor) -> Found:
    """A table in which some rows are replaced, in place, by learned plain ones."""
    w = table(m).weight.clone()
    new = torch.linspace(-1, 1, 4 * w.shape[1], dtype=torch.float64).view(4, -1).requires_grad_()
    w[5] = new[0]
    w[torch.tensor([1, 7])] = new[1:3]
    w = w.index_copy(0, torch.tensor([2]), new[3:])
    with exact(m):
        logits = m(inputs_embeds=F.embedding(ids, w), use_cache=False).logits
    return trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids)) + w.pow(2).sum() * 0.01) | {"new": new.grad}


def in_a_module(m: Any, ids: Tensor) -> Found:
    """A head of the user's own that has the model's weight, and norms and biases of the model, as its parameters; checkpointed."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = head(m).weight, nn.Parameter(torch.full((table(m).weight.shape[1],), 1.5, dtype=torch.float64))
            self.norm = next(p for p in m.parameters() if p.ndim == 1 and p.shape == self.scale.shape)

        def forward(self, h: Tensor) -> Tensor:
            return F.linear(F.layer_norm(h, self.scale.shape, self.norm, self.scale) * self.norm + self.scale, self.weight)

    own = Head()
    logits = torch.utils.checkpoint.checkpoint(own, hidden(m, ids), use_reentrant=False)
    return trained(m, F.cross_entropy(logits, labels(ids))) | {"scale": own.scale.grad}


def in_low_precision(m: Any, ids: Tensor) -> Found:
    """A product in another dtype: the numbers are those of one device as far as they go."""
    logits = hidden(m, ids).float() @ head(m).weight.float().T
    return trained(m, F.cross_entropy(logits.double(), labels(ids)))


# ---------------------------------------------------------------- penalties


def decay(m: Any, ids: Tensor) -> Found:
    return trained(m, loss_of(m, ids) + 0.1 * sum(p.pow(2).sum() for p in m.parameters()))


def lasso(m: Any, ids: Tensor) -> Found:
    return trained(m, loss_of(m, ids) + 0.1 * sum(p.abs().sum() for p in m.parameters()))


def norms(m: Any, ids: Tensor) -> Found:
    return trained(m, loss_of(m, ids) + sum(p.norm() + torch.linalg.vector_norm(p, 4) for p in m.parameters()))


def spectral(m: Any, ids: Tensor) -> Found:
    w = inner(m).weight
    return trained(m, loss_of(m, ids) + torch.linalg.matrix_norm(w, 2) + torch.linalg.svdvals(w).sum() + torch.linalg.matrix_norm(w, "nuc"))


def orthogonal(m: Any, ids: Tensor) -> Found:
    w = inner(m).weight
    return trained(m, loss_of(m, ids) + (w.T @ w - torch.eye(w.shape[1], dtype=w.dtype)).pow(2).sum())


def from_start(m: Any, ids: Tensor) -> Found:
    """L2 to the weights at the start, plain and whole, with an importance of each entry, as elastic weight consolidation."""
    start = {n: whole(p) * 0.5 for n, p in m.named_parameters()}
    return trained(m, loss_of(m, ids) + sum((start[n].abs() * (p - start[n]) ** 2).sum() for n, p in m.named_parameters()))


def near_start(m: Any, ids: Tensor) -> Found:
    """How near the weights are to those at the start, as a plain number."""
    start = {n: whole(p) * 0.5 + 0.1 for n, p in m.named_parameters()}
    sums = [(p * start[n]).sum() for n, p in m.named_parameters()]
    rows = F.cosine_similarity(inner(m).weight, start[f"{_inner_path(m)}.weight"], dim=-1)
    made = [x.full_tensor() if isinstance(x, DTensor) else x for x in (*sums, rows)]
    return trained(m, loss_of(m, ids) + 0.1 * sum(x.pow(2).sum() for x in made))


def power_iteration(m: Any, ids: Tensor) -> Found:
    """The spectral norm by power iteration, as torch's spectral_norm has it."""
    w = inner(m).weight
    u = torch.ones(w.shape[0], dtype=w.dtype)
    with torch.no_grad():
        for _ in range(3):
            v = F.normalize(torch.mv(w.t(), u), dim=0)
            u = F.normalize(torch.mv(w, v), dim=0)
    return trained(m, loss_of(m, ids) + torch.dot(u, torch.mv(w, v)))


# ---------------------------------------------------------------- writes


@torch.no_grad()
def row(m: Any, ids: Tensor) -> Found:
    table(m).weight[5] = 0
    head(m).weight[3:5] *= 2
    head(m).weight[1] = torch.ones(head(m).weight.shape[1], dtype=torch.float64) * 0.1
    inner(m).weight[:, 2] = 0.5
    inner(m).weight[0].zero_()
    return {}


def row_of_data(m: Any, ids: Tensor) -> Found:
    table(m).weight.data[5] = 0
    inner(m).weight.data[1:3] = 0.25
    inner(m).weight.data.mul_(0.5).add_(0.01)
    mean = head(m).weight.data[:6].mean(dim=0, keepdim=True)
    head(m).weight.data[6:9] = mean
    return {}


def drawn(m: Any, ids: Tensor) -> Found:
    torch.manual_seed(7)
    inner(m).weight.data.normal_(mean=0.0, std=0.2)
    table(m).weight.data.uniform_(-0.1, 0.1)
    return {}


def initialised(m: Any, ids: Tensor) -> Found:
    torch.manual_seed(7)
    nn.init.normal_(inner(m).weight, std=0.1)
    nn.init.orthogonal_(inner(m).weight)
    nn.init.xavier_uniform_(inner(m).weight)
    nn.init.kaiming_normal_(head(m).weight)
    nn.init.trunc_normal_(table(m).weight, std=0.1)
    for p in m.parameters():
        if p.ndim == 1:
            nn.init.constant_(p, 0.3)
    return {}


def initialised_by_the_model(m: Any, ids: Tensor) -> Found:
    torch.manual_seed(7)
    for module in m.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return {}


@torch.no_grad()
def copied(m: Any, ids: Tensor) -> Found:
    for p in m.parameters():
        p.copy_(torch.linspace(-0.3, 0.3, p.numel(), dtype=p.dtype).view(p.shape))
    return {}


def assigned(m: Any, ids: Tensor) -> Found:
    for p in m.parameters():
        p.data = torch.linspace(-0.3, 0.3, p.numel(), dtype=p.dtype).view(p.shape)
    return {}


def replaced(m: Any, ids: Tensor) -> Found:
    """Parameters of whole tensors, and of the parameters' own numbers."""
    w = inner(m)
    w.weight = nn.Parameter(w.weight.detach().clone() * 0.5)
    table(m).weight = nn.Parameter(torch.linspace(-0.3, 0.3, table(m).weight.numel(), dtype=torch.float64).view(table(m).weight.shape))
    return {}


# ---------------------------------------------------------------- gradients


def frozen_rows(m: Any, ids: Tensor) -> Found:
    w = table(m).weight
    mask = torch.ones(w.shape[0], 1, dtype=w.dtype)
    mask[:20] = 0
    w.register_hook(lambda g: g * mask)
    inner(m).weight.register_hook(lambda g: g * torch.linspace(0, 1, g.numel(), dtype=g.dtype).view(g.shape))
    return steps(m, ids)


def frozen_rows_by_number(m: Any, ids: Tensor) -> Found:
    def hook(g: Tensor) -> Tensor:
        g = g.clone()
        g[:20] = 0
        return g

    table(m).weight.register_hook(hook)
    inner(m).weight.register_hook(hook)
    return steps(m, ids)


def gradients(m: Any, ids: Tensor) -> Found:
    """Gradients read and written between backward and step."""
    loss_of(m, ids).backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([p.grad.norm() for p in m.parameters()]).norm()
    for p in m.parameters():
        p.grad.data.mul_(0.5)
        p.grad[0] = 0
        p.grad = p.grad * 2
    table(m).weight.grad += torch.ones(table(m).weight.shape, dtype=torch.float64)
    clipped = nn.utils.clip_grad_norm_(m.parameters(), 0.3)
    nn.utils.clip_grad_value_(m.parameters(), 0.05)
    found = {n: p.grad for n, p in m.named_parameters()}
    optimizer = adamw(m)
    optimizer.step()
    return found | {"norm": norm, "clipped": clipped} | {f"{n}.new": p for n, p in m.named_parameters()}


def given_gradients(m: Any, ids: Tensor) -> Found:
    """Gradients that a user makes: like the parameter, and whole."""
    optimizer = adamw(m)
    for i, p in enumerate(m.parameters()):
        p.grad = torch.ones_like(p) if i % 2 else torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape)
    optimizer.step()
    return dict(m.named_parameters())


def surgery(m: Any, ids: Tensor) -> Found:
    """Gradients of two losses, projected (PCGrad)."""
    params = list(m.parameters())
    one = torch.autograd.grad(loss_of(m, ids), params)
    other = torch.autograd.grad(loss_of(m, ids.flip(1)), params)
    dot = sum((a * b).sum() for a, b in zip(one, other, strict=True))
    norm = sum(b.pow(2).sum() for b in other)
    flat = torch.cat([(a - dot / norm * b).flatten() for a, b in zip(one, other, strict=True)])
    return {"flat": flat, "dot": dot, "cosine": F.cosine_similarity(flat, torch.cat([b.flatten() for b in other]), dim=0)}


# ---------------------------------------------------------------- other modules, other shapes


def tied_later(m: Any, ids: Tensor) -> Found:
    head(m).weight = table(m).weight
    return steps(m, ids)


def untied(m: Any, ids: Tensor) -> Found:
    head(m).weight = nn.Parameter(head(m).weight.clone())
    return steps(m, ids)


def untied_of_data(m: Any, ids: Tensor) -> Found:
    head(m).weight = nn.Parameter(head(m).weight.data.clone())
    return steps(m, ids)


def retied(m: Any, ids: Tensor) -> Found:
    m.tie_weights()
    return steps(m, ids)


def _resized(rows: int) -> Use:
    def use(m: Any, ids: Tensor) -> Found:
        torch.manual_seed(3)
        m.resize_token_embeddings(rows, mean_resizing=False)
        return steps(m, ids % rows)

    return use


# ---------------------------------------------------------------- states


def _state(m: Any) -> dict[str, Tensor]:
    return {n: torch.linspace(-0.3, 0.3, t.numel(), dtype=t.dtype).view(t.shape) for n, t in m.state_dict().items()}


def _loaded(**options: Any) -> Use:
    def use(m: Any, ids: Tensor) -> Found:
        m.load_state_dict(_state(m), **options)
        return {}

    return use


def loaded_partly(m: Any, ids: Tensor) -> Found:
    state = {n: t for i, (n, t) in enumerate(_state(m).items()) if i % 2}
    m.load_state_dict(state, strict=False)
    return {}


def loaded_into_a_module(m: Any, ids: Tensor) -> Found:
    inner(m).load_state_dict(_state(inner(m)))
    return {}


def loaded_wrong(m: Any, ids: Tensor) -> Found:
    state = _state(m)
    name = next(iter(state))
    state[name] = state[name][:-1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        m.load_state_dict(state)
    return {}


def saved_and_loaded(m: Any, ids: Tensor) -> Found:
    """Snapshots: of references, and deep ones that are put back."""
    kept = copy.deepcopy(m.state_dict())
    found = steps(m, ids)
    m.load_state_dict(kept)
    return found


# ---------------------------------------------------------------- averages and copies


def ema(m: Any, ids: Tensor) -> Found:
    average = {n: p.detach().clone() for n, p in m.named_parameters()}
    optimizer = adamw(m)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(m, ids).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for n, p in m.named_parameters():
                average[n].mul_(0.9).add_(p.detach(), alpha=0.1)
    kept = {n: p.detach().clone() for n, p in m.named_parameters()}
    with torch.no_grad():
        for n, p in m.named_parameters():
            p.copy_(average[n])
        loss = loss_of(m, ids)
        for n, p in m.named_parameters():
            p.data.copy_(kept[n])
    return {"averaged": loss, **average}


def ema_on_cpu(m: Any, ids: Tensor) -> Found:
    """The averages in plain tensors."""
    average = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in m.named_parameters()}
    for n, p in m.named_parameters():
        average[n].lerp_(p.detach(), 0.25)
        average[n] = 0.9 * average[n] + 0.1 * p.data
    m.load_state_dict(average, strict=False)
    return dict(average)


def _averaged_model(**options: Any) -> Use:
    def use(m: Any, ids: Tensor) -> Found:
        from torch.optim.swa_utils import AveragedModel

        average = AveragedModel(m, **{k: v() for k, v in options.items()})
        optimizer = adamw(m)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(m, ids).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            average.update_parameters(m)
        with torch.no_grad():
            loss = loss_of(average.module, ids)
        return {"averaged": loss, **dict(average.module.named_parameters())}

    return use


def _ema_multi() -> Any:
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    return get_ema_multi_avg_fn(0.9)


def _ema_one() -> Any:
    from torch.optim.swa_utils import get_ema_avg_fn

    return get_ema_avg_fn(0.9)


def soup(m: Any, ids: Tensor) -> Found:
    first = {n: t.clone() for n, t in m.state_dict().items()}
    steps(m, ids)
    second = m.state_dict()
    m.load_state_dict({n: 0.5 * first[n] + 0.5 * t for n, t in second.items()})
    return {}


def task_arithmetic(m: Any, ids: Tensor) -> Found:
    """A vector of a task, trimmed by magnitude (TIES), added to the weights."""
    first = {n: p.detach().clone() for n, p in m.named_parameters()}
    steps(m, ids)
    with torch.no_grad():
        for n, p in m.named_parameters():
            delta = p - first[n]
            k = max(1, delta.numel() // 2)
            kept = delta.abs().flatten().kthvalue(delta.numel() - k + 1).values
            p.copy_(first[n] + 0.5 * torch.where(delta.abs() >= kept, delta, torch.zeros_like(delta)))
    return {}


def slerp(m: Any, ids: Tensor) -> Found:
    other = {n: t.flip(0) for n, t in _state(m).items()}
    merged = {}
    for n, a in m.state_dict().items():
        b = other[n]
        if a.ndim < 2:
            merged[n] = torch.lerp(a, b, 0.3)
            continue
        x, y = a.flatten() / a.norm(), b.flatten() / b.norm()
        angle = torch.arccos(torch.clamp(torch.dot(x, y), -0.99, 0.99))
        merged[n] = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    m.load_state_dict(merged)
    return {}


def reference(m: Any, ids: Tensor) -> Found:
    """DPO with a frozen copy."""
    ref = copy.deepcopy(m).requires_grad_(False)
    optimizer = adamw(m)
    losses = []

    def logp(model: Any, tokens: Tensor) -> Tensor:
        with exact(model):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum((1, 2))

    for _ in range(2):
        optimizer.zero_grad()
        with torch.no_grad():
            base = logp(ref, ids) - logp(ref, ids.flip(1))
        loss = -F.logsigmoid(0.1 * (logp(m, ids) - logp(m, ids.flip(1)) - base)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():  # TR-DPO moves the reference
        for p, q in zip(ref.parameters(), m.parameters(), strict=True):
            p.copy_(0.4 * p + 0.6 * q)
        moved = loss_of(ref, ids)
    return {"losses": torch.stack(losses), "moved": moved, **dict(ref.named_parameters())}


# ---------------------------------------------------------------- masks and parametrizations


def pruned(m: Any, ids: Tensor) -> Found:
    prune.l1_unstructured(inner(m), "weight", 0.3)
    found = steps(m, ids)
    prune.remove(inner(m), "weight")
    return found | {"after": inner(m).weight}


def pruned_rows(m: Any, ids: Tensor) -> Found:
    prune.ln_structured(inner(m), "weight", 0.25, n=2, dim=0)
    return steps(m, ids)


def pruned_everywhere(m: Any, ids: Tensor) -> Found:
    modules = [(c, "weight") for c in m.modules() if isinstance(c, nn.Linear)]
    prune.global_unstructured(modules, prune.L1Unstructured, amount=0.2)
    return steps(m, ids)


@torch.no_grad()
def masked(m: Any, ids: Tensor) -> Found:
    """Pruning by hand: the smallest entries of each matrix are zero, and stay so by hooks."""
    for p in m.parameters():
        if p.ndim == 2:
            mask = p.abs() > p.abs().flatten().kthvalue(p.numel() // 3).values
            p.mul_(mask)
            p.register_hook(lambda g, mask=mask: g * mask)
    return {}


class _Scaled(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, rows, dtype=torch.float64).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def parametrized(m: Any, ids: Tensor) -> Found:
    parametrize.register_parametrization(inner(m), "weight", _Scaled(inner(m).weight.shape[0]))
    return steps(m, ids)


def weight_normed(m: Any, ids: Tensor) -> Found:
    nn.utils.parametrizations.weight_norm(inner(m), "weight")
    return steps(m, ids)


def spectral_normed(m: Any, ids: Tensor) -> Found:
    torch.manual_seed(4)
    nn.utils.parametrizations.spectral_norm(inner(m), "weight")
    return steps(m, ids)


# ---------------------------------------------------------------- second derivatives


def _embeds(m: Any, ids: Tensor) -> Tensor:
    return whole(table(m).weight)[ids].requires_grad_()


def _loss_of_embeds(m: Any, embeds: Tensor, ids: Tensor) -> Tensor:
    with exact(m):
        logits = m(inputs_embeds=embeds, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids))


def penalty_of_inputs(m: Any, ids: Tensor) -> Found:
    """A gradient penalty: of the gradient of the inputs."""
    x = _embeds(m, ids)
    loss = _loss_of_embeds(m, x, ids)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    return trained(m, loss + g.pow(2).sum()) | {"g": g, "x": x.grad}


def penalty_of_parameters(m: Any, ids: Tensor) -> Found:
    """The norm of all gradients of parameters, as a term of the loss."""
    loss = loss_of(m, ids)
    grads = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
    return trained(m, loss + sum(g.pow(2).sum() for g in grads))


def backward_twice(m: Any, ids: Tensor) -> Found:
    """backward(create_graph=True), and a loss of `.grad` (SAM, MAML)."""
    loss_of(m, ids).backward(create_graph=True)  # type: ignore[no-untyped-call]
    grads = [p.grad for p in m.parameters()]
    found = {f"{n}.first": p.grad for n, p in m.named_parameters()}
    for p in m.parameters():
        p.grad = None
    sum(g.pow(2).sum() for g in grads).backward()
    return found | {f"{n}.grad": p.grad for n, p in m.named_parameters()}


def hvp_of_inputs(m: Any, ids: Tensor) -> Found:
    x = _embeds(m, ids).detach()
    v = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    out, found = torch.autograd.functional.hvp(lambda t: _loss_of_embeds(m, t, ids), x, v)
    _, other = torch.autograd.functional.vhp(lambda t: _loss_of_embeds(m, t, ids), x, v)
    return {"out": out, "hvp": found, "vhp": other}


def hvp_of_parameters(m: Any, ids: Tensor) -> Found:
    """Pearlmutter's product with the Hessian of the parameters."""
    params = list(m.parameters())
    grads = torch.autograd.grad(loss_of(m, ids), params, create_graph=True)
    vectors = [torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape) for p in params]
    dot = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
    return {n: h for (n, _), h in zip(m.named_parameters(), torch.autograd.grad(dot, params), strict=True)}


def hessian_trace(m: Any, ids: Tensor) -> Found:
    """Hutchinson's estimate for one parameter, by a second gradient with grad_outputs."""
    w = inner(m).weight
    (g,) = torch.autograd.grad(loss_of(m, ids), w, create_graph=True)
    v = torch.sign(torch.linspace(-1, 1.1, w.numel(), dtype=w.dtype).view(w.shape))
    (h,) = torch.autograd.grad(g, w, grad_outputs=v)
    (again,) = torch.autograd.grad((loss_of(m, ids) ** 2), w)
    return {"h": h, "trace": (h * v).sum(), "again": again}


def inner_step(m: Any, ids: Tensor) -> Found:
    """MAML: a step inside, and the loss after it, back through both."""
    params = dict(m.named_parameters())
    grads = torch.autograd.grad(loss_of(m, ids), list(params.values()), create_graph=True)
    moved = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
    with exact(m):
        logits = torch.func.functional_call(m, moved, kwargs={"input_ids": ids.flip(0), "use_cache": False}).logits
    return trained(m, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(ids.flip(0))))


USES: dict[str, Use] = {
    "matmul": matmul,
    "linear": linear,
    "einsum": einsum,
    "chunks": chunks,
    "fused": fused,
    "recomputed": recomputed,
    "embedding": embedded,
    "rows by ids": indexed,
    "soft prompt": soft_prompt,
    "mixture of rows": mixture_of_rows,
    "joined": joined,
    "sampled classes": sampled,
    "other products": probed,
    "low-rank addition": adapted,
    "scaled": scaled,
    "other rows": other_rows,
    "in a module": in_a_module,
    "in low precision": in_low_precision,
    "decay": decay,
    "lasso": lasso,
    "norms": norms,
    "spectral": spectral,
    "orthogonal": orthogonal,
    "from the start": from_start,
    "near the start": near_start,
    "power iteration": power_iteration,
    "row": row,
    "row of data": row_of_data,
    "drawn": drawn,
    "initialised": initialised,
    "reset": initialised_by_the_model,
    "copied": copied,
    "assigned": assigned,
    "replaced": replaced,
    "frozen rows": frozen_rows,
    "frozen rows by number": frozen_rows_by_number,
    "gradients": gradients,
    "given gradients": given_gradients,
    "gradient surgery": surgery,
    "tied later": tied_later,
    "untied": untied,
    "untied of data": untied_of_data,
    "tied again": retied,
    "grown": _resized(48),
    "grown unevenly": _resized(43),
    "shrunk": _resized(30),
    "loaded": _loaded(),
    "loaded by assignment": _loaded(assign=True),
    "loaded partly": loaded_partly,
    "loaded into a module": loaded_into_a_module,
    "loaded wrong": loaded_wrong,
    "saved and loaded": saved_and_loaded,
    "moving average": ema,
    "plain moving average": ema_on_cpu,
    "AveragedModel": _averaged_model(),
    "AveragedModel, EMA": _averaged_model(multi_avg_fn=_ema_multi),
    "AveragedModel, EMA one by one": _averaged_model(avg_fn=_ema_one),
    "soup": soup,
    "task arithmetic": task_arithmetic,
    "slerp": slerp,
    "reference": reference,
    "masked": masked,
    "pruned": pruned,
    "pruned rows": pruned_rows,
    "pruned everywhere": pruned_everywhere,
    "parametrized": parametrized,
    "weight norm": weight_normed,
    "spectral norm": spectral_normed,
    "penalty of inputs": penalty_of_inputs,
    "penalty of parameters": penalty_of_parameters,
    "backward twice": backward_twice,
    "hvp of inputs": hvp_of_inputs,
    "hvp of parameters": hvp_of_parameters,
    "Hessian's trace": hessian_trace,
    "inner step": inner_step,
}

#: Those of second derivatives.
SECOND = tuple(USES)[-7:]
#: What is said where a use is refused.
REFUSED = dict.fromkeys(
    ("pruned", "pruned rows", "pruned everywhere", "parametrized", "weight norm", "spectral norm"), "before parallelize"
)


def observed(use: str, model: Any) -> Found:
    """What the use found, then the parameters, a loss and its gradients."""
    ids = Data(1).ids(0)
    found = USES[use](model, ids)
    if not found:
        found |= {f"{n} after": p.detach() for n, p in model.named_parameters()}
        found |= {f"{n} {k}": v for n, d in [("after", trained(model, loss_of(model, ids)))] for k, v in d.items()}
    return {n: whole(v) for n, v in found.items()}


def apart(wanted: Found, got: Found) -> dict[str, float]:
    """The largest difference of each number, relative to its size; inf where one is missing or has another shape."""
    found: dict[str, float] = {}
    for n in dict.fromkeys((*wanted, *got)):
        a, b = wanted.get(n), got.get(n)
        if a is None or b is None or a.shape != b.shape:
            found[n] = float("inf")
        elif a.numel():
            found[n] = float((a - b).abs().max() / (a.abs().max() + 1e-4))
    return found
