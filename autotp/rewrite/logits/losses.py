"""Losses of logits whose vocabulary is in parts, with the arguments and the numbers of torch's.

cross entropy of one token, with p = softmax(x), its target y, class weights w and a smoothing ε over V entries:

    l = (1 − ε) w_y (log Σ exp x − x_y) + ε / V Σ_c w_c (log Σ exp x − x_c)
    ∂l/∂x_c = (1 − ε) w_y (p_c − [c = y]) + ε / V (p_c Σ w − w_c)

A rank keeps its part of x and nothing more of that size; the backward makes its part of p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from autotp.rewrite.collectives.conversions import copy
from autotp.rewrite.in_parts.tensor import part
from autotp.rewrite.logits.parts import LogitsInParts
from autotp.rewrite.logits.sums import held, log_softmax, logsumexp, picked, wide
from autotp.rewrite.logits.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class _Terms:
    """What a cross entropy has beside logits and targets; `weight`: [V], whole."""

    vocabulary: Vocabulary
    weight: Tensor | None
    smoothing: float

    def part(self) -> Tensor | float:
        """This rank's class weights."""
        v = self.vocabulary
        return 1.0 if self.weight is None else self.weight[v.start : v.start + v.held]

    def sum(self) -> Tensor | float:
        """The sum of all class weights."""
        return float(self.vocabulary.size) if self.weight is None else self.weight.sum()

    def of(self, targets: Tensor) -> Tensor | float:
        """The class weights of targets."""
        return 1.0 if self.weight is None else self.weight[targets]


class _CrossEntropy(torch.autograd.Function):
    """[N, held] logits, [N] targets (any valid one where `ignored`) → [N] losses, 0 where ignored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: Tensor, ignored: Tensor, terms: _Terms) -> Tensor:
        v = terms.vocabulary
        own = [torch.logsumexp(x, 1), held(x, 1, targets.unsqueeze(1), v.start).squeeze(1)]
        own += [(x * terms.part()).sum(1)] if terms.smoothing else []
        levels, *sums = torch.stack(v.comm.all_gather(torch.stack(own))).unbind(1)  # [ranks, N] each, of one message
        level, (of_target, *spread) = torch.logsumexp(levels, 0), [each.sum(0) for each in sums]
        loss = (1 - terms.smoothing) * terms.of(targets) * (level - of_target)
        if spread:
            loss = loss + terms.smoothing / v.size * (terms.sum() * level - spread[0])
        ctx.save_for_backward(x, targets, ignored, level)
        ctx.terms = terms
        return loss.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, targets, ignored, level = ctx.saved_tensors
        terms: _Terms = ctx.terms
        v, smoothing = terms.vocabulary, terms.smoothing
        grad = copy(grad, v.comm).masked_fill(ignored, 0)
        if torch.is_grad_enabled():  # for a second derivative the level is one of `x`
            level = copy(logsumexp(x, 1, v.comm), v.comm)
        of_target = grad * (1 - smoothing) * terms.of(targets)
        scale = of_target + grad * (smoothing / v.size) * terms.sum() if smoothing else of_target
        found = x - level.unsqueeze(1)
        fresh = not torch.is_grad_enabled()  # nothing looks at what is made here: it may be changed in place
        found = found.exp_().mul_(scale.unsqueeze(1)) if fresh else found.exp() * scale.unsqueeze(1)
        if v.held:
            here = (targets >= v.start) & (targets < v.start + v.held)
            at = torch.where(here, targets - v.start, 0).unsqueeze(1)
            less = torch.where(here, -of_target, 0).unsqueeze(1).to(found.dtype)
            found = found.scatter_add_(1, at, less) if fresh else found.scatter_add(1, at, less)
        if smoothing:
            found = found - (grad * (smoothing / v.size)).unsqueeze(1) * terms.part()
        return found, None, None, None


def cross_entropy(
    input: LogitsInParts,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`F.cross_entropy` of logits [V], [N, V] or [N, V, ..] whose vocabulary is in parts; NotImplemented where classes are another dim."""
    given = _Given.of(input, target, weight, size_average, reduce, ignore_index)
    if given is None or not 0 <= label_smoothing <= 1:
        return NotImplemented
    dtype = _dtype(lambda t: F.cross_entropy(t, torch.zeros(1, dtype=torch.int64, device=t.device)), given.x)
    x = wide(given.x.to(dtype))
    terms = _Terms(input._vocabulary, None if given.weight is None else given.weight.to(x.dtype), label_smoothing)
    losses: Tensor = _CrossEntropy.apply(x, given.targets, given.ignored, terms)  # type: ignore[no-untyped-call]
    return given.reduced(losses, terms.of(given.targets), reduction).to(dtype)


def nll_loss(
    input: LogitsInParts,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    """`F.nll_loss` of log-probabilities whose vocabulary is in parts; NotImplemented as `cross_entropy`."""
    given = _Given.of(input, target, weight, size_average, reduce, ignore_index)
    if given is None:
        return NotImplemented
    v, weights = input._vocabulary, 1.0 if given.weight is None else given.weight[given.targets]
    losses = -weights * picked(given.x, 1, given.targets.unsqueeze(1), v.start, v.comm).squeeze(1)
    dtype = _dtype(lambda t: F.nll_loss(t, torch.zeros(1, dtype=torch.int64, device=t.device)), given.x)
    return given.reduced(wide(losses.masked_fill(given.ignored, 0)), weights, reduction).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """The arguments of a loss: `x` [N, held]; `targets` [N], 0 where `ignored`; `weight` [V]; `shape` of the losses."""

    x: Tensor
    targets: Tensor
    ignored: Tensor
    weight: Tensor | None
    shape: torch.Size

    @staticmethod
    def of(input: Any, target: Tensor, weight: Tensor | None, size_average: Any, reduce: Any, ignore_index: int) -> _Given | None:
        """Returns them, None for what torch refuses or treats in a way of its own.

        Raises:
            IndexError: as `_checked`.
        """
        if not isinstance(input, LogitsInParts) or size_average is not None or reduce is not None:
            return None
        dim = 0 if input.ndim == 1 else 1
        target, weight = _plain(target), None if weight is None else _plain(weight)
        shape = (*input.shape[:dim], *input.shape[dim + 1 :])
        if input.vocabulary_dim != dim or target.dtype is not torch.int64 or tuple(target.shape) != shape:
            return None
        if weight is not None and weight.requires_grad:
            return None
        x = part(input).movedim(dim, -1)
        targets, ignored = _checked(target.reshape(-1), ignore_index, input._vocabulary.size)
        return _Given(x.reshape(prod(x.shape[:-1]), x.shape[-1]), targets, ignored, weight, target.shape)

    def reduced(self, losses: Tensor, weights: Tensor | float, reduction: str) -> Tensor:
        """Returns the losses, 0 where ignored, as `reduction` says."""
        if reduction == "none":
            return losses.view(self.shape)
        if reduction == "sum":
            return losses.sum()
        if reduction != "mean":
            raise ValueError(f"{reduction} is not a valid value for reduction")
        counted = (~self.ignored).to(losses.dtype) * weights
        return losses.sum() / counted.sum()


def softmax_of(x: Tensor, dim: int, vocabulary: Vocabulary, *, logarithm: bool) -> Tensor:
    """Probabilities of this rank's entries, or their logarithms, in the dtype that torch gives them."""
    found = log_softmax(wide(x), dim, vocabulary.comm)
    return (found if logarithm else found.exp()).to(_dtype(lambda t: torch.log_softmax(t, -1), x))


def logsumexp_of(x: Tensor, dim: int, vocabulary: Vocabulary) -> Tensor:
    """The logarithm of the sum of exponentials over the vocabulary, in the dtype that torch gives it."""
    return logsumexp(wide(x), dim, vocabulary.comm).to(_dtype(lambda t: torch.logsumexp(t, -1), x))


def _dtype(function: Callable[[Tensor], Tensor], x: Tensor) -> torch.dtype:
    """The dtype of the result that `function` gives a tensor like `x` here: under autocast it may be a wider one."""
    with torch.no_grad():
        return function(x.new_zeros(1, 1)).dtype


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _checked(targets: Tensor, ignore_index: int, size: int) -> tuple[Tensor, Tensor]:
    """(targets, 0 where ignored; mask of the ignored ones).

    Raises:
        IndexError: a target that no entry has, on CPUs; on GPUs the device stops, as torch's own loss does.
    """
    ignored = targets == ignore_index
    targets = targets.masked_fill(ignored, 0).long()
    wrong = (targets < 0) | (targets >= size)
    if not targets.is_cpu:
        torch._assert_async(~wrong.any())
    elif bool(wrong.any()):
        raise IndexError(f"Target {int(targets[wrong][0])} is out of bounds.")
    return targets, ignored
