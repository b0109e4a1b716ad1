"""Runs a module of experts on the (token, slot) pairs whose experts this rank holds.

    tokens [T, H], index [T, k], weights [T, k]  →  rows [n, H], local index [n, 1], weights [n, 1]   (`pick`)
    results [n, O]  →  [T, O], the rank's summand of each token                                        (`put_back`)

The module's own code runs on the rows as on so many tokens of one slot each. Over the ranks, every pair is picked once, so the results
sum to those of one device. Hidden states in token parts are dispatched: T are then the tokens that have an expert on this rank, and
their summands go back to the ranks that hold the tokens (`autotp.rewrite.sequence.dispatch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting

from autotp.errors import AutoTPError
from autotp.plan.expressions import size
from autotp.plan.layout import intervals
from autotp.plan.spec import Pairs
from autotp.rewrite.attributes import localised
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.in_parts.tensor import InParts, part
from autotp.rewrite.modules.binding import Binding
from autotp.rewrite.sequence.dispatch import Route
from autotp.rewrite.sequence.tokens import ParallelTokens, tokens_of


@dataclass(frozen=True, slots=True)
class Picked:
    """Pairs of one rank: `token` [n] and `slot` [n] say which, `local` [n] is the number of the expert on this rank."""

    token: Tensor
    slot: Tensor
    local: Tensor


def pick(index: Tensor, start: int, stop: int) -> Picked:
    """Returns the pairs of `index` [T, k] whose experts are `start` to `stop`, in the order of the tokens."""
    token, slot = ((index >= start) & (index < stop)).nonzero(as_tuple=True)
    return Picked(token, slot, index[token, slot] - start)


def put_back(rows: Tensor, picked: Picked, tokens: int) -> Tensor:
    """Returns the sums of a rank's `rows` [n, O] by token: [tokens, O]."""
    return rows.new_zeros(tokens, *rows.shape[1:]).index_add(0, picked.token, rows)


class _Dropped(torch.autograd.Function):
    """Zeros for `count` tokens in place of `rows`. What they would be made of gets zeros as gradients, whatever `rows` are."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, *of: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in of]
        return rows.new_zeros(count, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class PairsRun:
    """Calls the forward of one module with this rank's pairs. dispatches: the plan has tokens in parts stay so up to here."""

    __slots__ = ("arguments", "attributes", "count", "dispatches", "running", "span", "spans", "where")

    def __init__(self, plan: Pairs, forward: Callable[..., Any], comm: Comm, where: str, dispatches: bool = False) -> None:
        self.dispatches = dispatches
        self.where, self.count, self.attributes = where, size(plan.experts), plan.attributes
        self.running = comm.running  # code that is compiled around this opens no call of the model
        self.spans = tuple(next(iter(intervals(plan.experts, rank, comm.size)), (0, 0)) for rank in range(comm.size))
        self.span = self.spans[comm.rank]
        self.arguments = tuple(Binding((name,), forward, where) for name in (plan.tokens, plan.index, plan.weights))

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `forward` as one that takes all tokens and gives this rank's summand of their results; tokens for tokens in parts."""

        def of_pairs(module: Any, *args: Any, **kwargs: Any) -> Any:
            def run(tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                """[n, H] → [n, O]: calls `forward` with other tensors for the three."""
                positional, keywords = list(args), dict(kwargs)
                for b, value in zip(self.arguments, (tokens, index, weights), strict=True):
                    if b.index is not None and b.index < len(positional):
                        positional[b.index] = value
                    else:
                        keywords[b.name] = value
                rows = forward(module, *positional, **keywords)
                if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != len(tokens):
                    raise AutoTPError(f"{self.where}: its forward gave no row for each token, so its experts cannot be dealt whole")
                return rows

            tokens, index, weights = self._checked(*(b.given(args, kwargs) for b in self.arguments))
            with self.running.opened(), localised(module, self.attributes, self.where):
                if not self.dispatches or type(tokens) is not ParallelTokens:
                    return self._summand(module, run, tokens, index, weights)
                kind, rows = tokens._kind, part(tokens)
                index = index.gathered() if isinstance(index, InParts) else index
                route = Route.of(index, self.spans, kind)
                got = route.tokens
                summand = self._summand(module, run, route.dispatched(rows), index[got], weights[got])
                return tokens_of(kind.part_of(route.combined(summand)), kind)

        return of_pairs

    def _summand(self, module: Any, run: Callable[..., Tensor], tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[n, H] → [n, O]: what this rank's experts give for each token.

        Where the rank has no pair, one stands in, so that the module's code runs; its result and its gradients are dropped.
        """
        picked = pick(index, *self.span)
        if len(picked.token):
            rows = run(tokens[picked.token], picked.local[:, None], weights[picked.token, picked.slot][:, None])
            return put_back(rows, picked, len(tokens))
        with torch.no_grad():
            rows = run(tokens.new_zeros(1, tokens.shape[1]), index.new_zeros(1, 1), weights.new_ones(1, 1))
        own = (module.__dict__.get(name, p) for name, p in module._parameters.items())
        of = (tokens, weights, *(p for p in own if p is not None and p.requires_grad))
        return _Dropped.apply(rows, len(tokens), *of)  # type: ignore[no-any-return, no-untyped-call]

    def _checked(self, tokens: Any, index: Any, weights: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the arguments.

        Raises:
            AutoTPError: on every rank, where they are not tokens [T, H] with experts and weights [T, k], or an expert is none of the
                module's.
        """
        if is_exporting():
            raise AutoTPError(f"{self.where}: how many tokens its experts get is not known in an export: plan with experts='width'")
        given = (tokens, index, weights)
        if not all(isinstance(t, Tensor) and t.dim() == 2 for t in given) or index.shape != weights.shape or len(tokens) != len(index):
            shapes = ", ".join(f"{tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in given)
            raise AutoTPError(
                f"{self.where}: experts that are dealt whole take tokens [T, H], and experts and weights [T, k], got {shapes}: plan with "
                "experts='width'"
            )
        if index.numel() and not bool(((index >= 0) & (index < self.count)).all()):
            raise AutoTPError(
                f"{self.where}: a token is routed to an expert outside of 0 to {self.count - 1}, and no rank holds that one: plan with "
                "experts='width'"
            )
        return tokens, index, weights
