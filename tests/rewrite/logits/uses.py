"""What people do with logits: each use gives a loss, and most of them need no whole row of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils.checkpoint import checkpoint

Use = Callable[[Any, Tensor], Tensor]


def numbers(*shape: int, seed: int = 5) -> Tensor:
    """Fixed random numbers between 0 and 1."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels_of(ids: Tensor) -> Tensor:
    """Labels of which some are ignored."""
    labels = ids.clone()
    labels[0, :3] = -100
    return labels


def logits_of(model: Any, ids: Tensor) -> Any:
    """[B, T, V]."""
    return model(input_ids=ids, use_cache=False).logits


def own_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels_of(ids)).loss  # type: ignore[no-any-return]


def own_loss_by_items(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels_of(ids), num_items_in_batch=torch.tensor(11)).loss  # type: ignore[no-any-return]


def shifted(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), labels_of(ids)[..., 1:].reshape(-1))


def smoothed(model: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(model, ids).flatten(0, 1), labels_of(ids).flatten(), label_smoothing=0.2)


def weighted(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    weight = numbers(logits.shape[-1])
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels_of(ids).reshape(-1), weight=weight, label_smoothing=0.1)


def each(model: Any, ids: Tensor) -> Tensor:
    losses = F.cross_entropy(logits_of(model, ids).transpose(1, 2), labels_of(ids), reduction="none")
    return (losses * numbers(*ids.shape)).sum()


def summed(model: Any, ids: Tensor) -> Tensor:
    return nn.CrossEntropyLoss(reduction="sum", ignore_index=3)(logits_of(model, ids).flatten(0, 1), ids.flatten())  # type: ignore[no-any-return]


def z_loss(model: Any, ids: Tensor) -> Tensor:
    out = model(input_ids=ids, labels=labels_of(ids))
    return out.loss + 1e-2 * torch.logsumexp(out.logits, -1).pow(2).mean()  # type: ignore[no-any-return]


def preference(model: Any, ids: Tensor) -> Tensor:
    chosen = logits_of(model, ids)[:, :-1].log_softmax(-1)
    return torch.gather(chosen, 2, ids[:, 1:].unsqueeze(2)).squeeze(2).sum(-1).sigmoid().sum()


def by_rows(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)[:, :-1] / 0.7
    chosen = torch.gather(logits, -1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits.unbind(0)])).mean()


def entropy(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    return -(F.softmax(logits, -1) * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def distilled(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    teacher = numbers(*logits.shape).log_softmax(-1)
    found = F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
    return found + F.kl_div(F.log_softmax(logits, -1), teacher.exp(), reduction="sum")


def chosen_rows(model: Any, ids: Tensor) -> Tensor:
    logits, here = logits_of(model, ids), ids > 20
    return F.cross_entropy(logits[here], ids[here]) + logits[0].sum() + logits[:, 1].mean() + logits[[0, 1]].square().sum()


def capped(model: Any, ids: Tensor) -> Tensor:
    logits = torch.tanh(logits_of(model, ids) / 3) * 3
    return F.nll_loss(F.log_softmax(logits, -1).view(-1, logits.size(-1)), labels_of(ids).view(-1))


def joined(model: Any, ids: Tensor) -> Tensor:
    one, other = logits_of(model, ids), logits_of(model, ids.flip(0))
    return F.cross_entropy(torch.cat([one, other]).flatten(0, 1), torch.cat([ids, ids.flip(0)]).flatten()) + (one - other).pow(2).mean()


def likeliest(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    return F.cross_entropy(logits.flatten(0, 1), logits.argmax(-1).flatten())


def learned(model: Any, ids: Tensor) -> Tensor:
    """Plain tensors that meet logits get whole gradients."""
    logits = logits_of(model, ids)
    bias, heat = numbers(logits.shape[-1]).requires_grad_(), numbers(*ids.shape, 1).requires_grad_()
    loss = F.cross_entropy((logits * heat + bias).flatten(0, 1), ids.flatten())
    of_bias, of_heat = torch.autograd.grad(loss, (bias, heat), retain_graph=True)
    return loss + (of_bias * numbers(logits.shape[-1], seed=6)).sum() + of_heat.square().sum()


def in_place(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    logits.div_(0.7)
    logits -= 1
    logits.masked_fill_(ids.unsqueeze(-1) > 20, 0.5)
    same = logits.double()
    same.clamp_(min=-1.3)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def suppressed(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    logits[..., 3:7] = -9.0
    logits *= 2
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def without_history(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    with torch.no_grad():
        logits.clamp_(-0.05, 0.05)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def weighted_by_casts(model: Any, ids: Tensor) -> Tensor:
    """Plain tensors that take the dtype of logits stay plain."""
    logits = logits_of(model, ids)
    mask, weight = (ids > 20).type_as(logits), torch.linspace(1, 2, ids.numel()).view(ids.shape).to(logits)
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (losses * mask).sum() / 5 + (logits.log_softmax(axis=-1).gather(-1, ids[..., None]).squeeze(-1) * weight).mean()  # type: ignore[call-overload]


def hooked(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    logits.retain_grad()
    logits.register_hook(lambda grad: grad * 2)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def penalty(model: Any, ids: Tensor) -> Tensor:
    loss = own_loss(model, ids)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + sum(g.pow(2).sum() for g in grads)


def by_torch(model: Any, ids: Tensor) -> Tensor:
    with loss_parallel():
        return F.cross_entropy(logits_of(model, ids).flatten(0, 1), ids.flatten())


def checkpointed(model: Any, ids: Tensor) -> Tensor:
    """The head and the loss run again in the backward."""
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(rows), labels, reduction="sum")

    chunks = zip(states.flatten(0, 1).chunk(3), labels_of(ids).flatten().chunk(3), strict=True)
    return sum(checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks)  # type: ignore[return-value]


def made_whole(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    return (logits * numbers(logits.shape[-1])).sum()


def redistributed(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    logits = logits.redistribute(placements=[Replicate()]).to_local() if hasattr(logits, "full_tensor") else logits
    return (logits * numbers(logits.shape[-1])).sum()


def anything(model: Any, ids: Tensor) -> Tensor:
    """Operators that have no way to run on parts."""
    logits = logits_of(model, ids)
    found = (
        logits.topk(5, -1).values.sum() + logits.max(-1).values.mean() + torch.einsum("btv,v->bt", logits, numbers(logits.shape[-1])).sum()
    )
    return (
        found + logits[..., 3].sum() + logits[:, :, :10].square().sum() + logits.mT.cos().sum() + logits.sort(-1).values.diff().pow(2).sum()
    )


def soft_targets(model: Any, ids: Tensor) -> Tensor:
    logits = logits_of(model, ids)
    return F.cross_entropy(logits.flatten(0, 1), numbers(*logits.shape).softmax(-1).flatten(0, 1))


#: They gather nothing that has a vocabulary.
IN_PARTS: dict[str, Use] = {
    "own loss": own_loss,
    "own loss, by items": own_loss_by_items,
    "shifted": shifted,
    "smoothed": smoothed,
    "weighted": weighted,
    "each": each,
    "summed": summed,
    "z-loss": z_loss,
    "preference": preference,
    "by rows": by_rows,
    "entropy": entropy,
    "distilled": distilled,
    "chosen rows": chosen_rows,
    "capped": capped,
    "joined": joined,
    "likeliest": likeliest,
    "learned": learned,
    "hooked": hooked,
    "in place": in_place,
    "without history": without_history,
    "weighted by casts": weighted_by_casts,
    "penalty": penalty,
    "by torch": by_torch,
    "checkpointed": checkpointed,
}
#: They need it whole, and get it.
WHOLE: dict[str, Use] = {
    "made whole": made_whole,
    "redistributed": redistributed,
    "anything": anything,
    "suppressed": suppressed,
    "soft targets": soft_targets,
}
