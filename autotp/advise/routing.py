"""Routes tokens to whole experts without their numbers: evenly, and seen from the rank that gets most of them.

How many tokens a rank's experts get depends on data, which fake tensors do not have. So the experts of all tokens are drawn, each token's
without repetition and each expert alike, from one seed. A step ends when its last rank does, so the experts are numbered such that the
rank that is measured, rank 0, has most of the pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from autotp.plan.expressions import size
from autotp.plan.layout import intervals
from autotp.plan.plan import Plan
from autotp.plan.spec import Pairs
from autotp.rewrite.in_parts.tensor import InParts
from autotp.trace.keep import Undo


def route_evenly(model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Give each module of whole experts drawn experts in place of those that its router chose, until `undo` is played back.

    The forwards of the modules are still their own.
    """
    for m in plan.modules:
        if m.pairs is not None:
            module = model.get_submodule(m.path)
            hook = _hook(inspect.signature(module.forward), m.pairs, plan.tp)
            undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _hook(signature: inspect.Signature, pairs: Pairs, tp: int) -> Callable[..., Any]:
    spans = [next(iter(intervals(pairs.experts, rank, tp)), (0, 0)) for rank in range(tp)]
    count = size(pairs.experts)

    def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = signature.bind(*args, **kwargs)
        index = given.arguments[pairs.index]
        if isinstance(index, InParts):
            index = index.gathered()  # which runs in the model, too
        (tokens, each), dtype = index.shape, index.dtype
        with _disable_current_modes():  # a router is counted already, and this one has numbers
            given.arguments[pairs.index] = drawn(tokens, each, count, spans).to(dtype)
        return given.args, given.kwargs

    return routed


def drawn(tokens: int, each: int, experts: int, spans: list[tuple[int, int]]) -> Tensor:
    """Returns experts [tokens, each]; the first of `spans` (from its first expert to the one after its last) has most of the pairs."""
    numbers = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    index = numbers.topk(each, -1).indices
    turns = [(index - start) % experts for start, _ in spans]
    first, last = spans[0]
    return max(turns, key=lambda turned: int(((turned >= first) & (turned < last)).sum()))
