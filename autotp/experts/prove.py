"""Proves by numbers that a module of experts treats each (token, slot) pair by itself and adds up the slots of a token.

The module alone is run as a model, whole and on the ranks of a plan that deals its experts whole, on tokens that are routed evenly,
all to one expert, past some experts, twice to one, and as the model did (`autotp.numeric`). Results and gradients of tokens, weights
and parameters are compared. A module that drops tokens, mixes them, or counts them, differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from autotp.experts.calls import Call
from autotp.numeric.check import judge
from autotp.numeric.copies import copy_of
from autotp.numeric.exact import Precision
from autotp.numeric.subject import in_precision
from autotp.numeric.untouched import untouched
from autotp.plan.conversions import Conversion, Op
from autotp.plan.experts import EXPERTS, Routing, dealt_layout, pairs_of
from autotp.plan.layout import replicated
from autotp.plan.plan import Plan
from autotp.plan.spec import ModulePlan, ParamPlan, Slot
from autotp.trace.example import Example

#: Attributes that may hold the number of experts, of which every choice is tried.
MOST_ATTRIBUTES = 4
#: Tokens of the largest draw: shares of tokens, past which some would be dropped, have a least size for the most part.
MANY = 256
#: Elements of weights that the pairs of a draw may choose, as code that picks the weights of each pair holds all of them; and tokens
#: that are drawn nevertheless.
MOST_CHOSEN, LEAST = 20_000_000, 16
_PATH = "module"


class _Alone(nn.Module):
    """Calls a module of experts with drawn tensors, as `call` did."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Any:
        """Runs it."""
        args, kwargs = self.call.of(tokens, index, weights)
        return self.module(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Proven:
    """How the experts of a module are dealt whole, or why they are not."""

    routing: Routing | None
    problem: str = ""


def proven(module: nn.Module, call: Call, routing: Routing, tp: int, precision: Precision) -> Proven:
    """Runs `module` alone; see the module docstring. It is left as it was. `precision`: one in which it runs."""
    count = next(iter(module.parameters())).shape[0]
    if any(b.dim() and b.shape[0] == count for b in module.buffers(recurse=False)):
        return Proven(None, "a buffer has a number for each expert")
    of_each = sum(p.numel() for p in module.parameters()) // count
    alone, examples = _Alone(module, call), tuple(_examples(call, count, of_each))
    if problem := _draws(alone, examples[0], precision):
        return Proven(None, problem)
    for names in _choices(module, count):
        tried = replace(routing, attributes=names)
        verdict = judge(alone, examples, _plan(alone, tried, count, tp))
        if verdict.unknown:
            return Proven(None, f"its numbers cannot be compared: {verdict.unknown}")
        if verdict.module is None:
            return Proven(tried)
        problem = problem or verdict.reason
    return Proven(None, f"it does not treat each token and expert by itself: {problem}")


def _draws(alone: _Alone, example: Example, precision: Precision) -> str:
    """Says that a module draws random numbers in training mode: ranks with other numbers of pairs would draw others ever after."""
    with untouched(alone), torch.random.fork_rng(devices=[]), torch.no_grad(), precision.mode():
        try:
            copied = copy_of(alone, precision).train()
            state = torch.get_rng_state()
            copied(**in_precision(example.make(), precision))
        except Exception as error:  # what a module holds may refuse to be copied, and its code to run, in any way
            return f"it does not run by itself ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        return "" if torch.equal(state, torch.get_rng_state()) else "it draws random numbers (a dropout)"


def counting(module: nn.Module, count: int) -> tuple[str, ...]:
    """The attributes of a module, and of a config that it holds, whose value is the number of its experts."""
    own = [name for name, value in vars(module).items() if _is(value, count)]
    config = vars(getattr(module, "config", None) or object) if hasattr(getattr(module, "config", None), "__dict__") else {}
    return (*own, *(f"config.{name}" for name, value in config.items() if _is(value, count) and not name.startswith("_")))


def _is(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == count


def _choices(module: nn.Module, count: int) -> Iterator[tuple[str, ...]]:
    """Sets of attributes to make local: those of the module itself, most first, and then with one of its config's.

    A size that is as large as the number of experts by chance is among them; a wrong choice gives wrong numbers.
    """
    found = counting(module, count)
    own = [name for name in found if "." not in name][:MOST_ATTRIBUTES]
    chosen = [names for n in range(len(own), -1, -1) for names in combinations(own, n)]
    yield from chosen
    yield from ((*names, name) for name in found if "." in name for names in chosen)


def _plan(alone: _Alone, routing: Routing, count: int, tp: int) -> Plan:
    params = {}
    for name, p in alone.named_parameters():
        params[name] = ParamPlan(name, dealt_layout(replicated(tuple(p.shape), tp)), EXPERTS)
    copies = tuple(Slot((name,), (Conversion(Op.COPY),)) for name in (routing.tokens, routing.weights))
    module = ModulePlan(_PATH, copies, (Slot((), (Conversion(Op.REDUCE),)),), pairs=pairs_of(routing, count, tp))
    return Plan(_Alone.__name__, tp, params, (module,), (), (), {})


def _examples(call: Call, count: int, of_each: int) -> Iterator[Example]:
    """Yields the calls; an expert has `of_each` elements."""
    tokens, index, weights = call.at(call.tokens), call.at(call.index), call.at(call.weights)
    generator = torch.Generator().manual_seed(0)
    slots = index.shape[1]
    # what a module does to the slots of a token among themselves shows where there are two
    for each in (slots,) if slots > 1 else (1, min(2, count)):
        most = max(LEAST, MOST_CHOSEN // (each * of_each))
        for name, chosen in _routings(count, each, most, generator):
            x = torch.randn(len(chosen), tokens.shape[1], generator=generator)
            w = torch.rand(len(chosen), each, generator=generator) + 0.1
            yield from _in_both_modes(Example(f"{name}, {each} to a token", partial(_arguments, x, chosen.to(index.dtype), w)))
    most = max(LEAST, MOST_CHOSEN // (slots * of_each))
    yield from _in_both_modes(Example("as the model", partial(_arguments, tokens[:most], index[:most], weights[:most])))


def _in_both_modes(example: Example) -> Iterator[Example]:
    """A module may drop tokens in training alone."""
    yield example
    yield replace(example, name=f"{example.name}, in training", training=True)


def _routings(count: int, slots: int, most: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yields experts [T, slots] of up to `most` tokens."""

    def even(n: int) -> Tensor:
        return torch.stack([torch.randperm(max(count, slots), generator=generator)[:slots] % count for _ in range(n)])

    def half(first: int, others: Tensor) -> Tensor:
        return torch.where(torch.rand(others.shape, generator=generator) < 0.5, first, others)

    yield "even", even(min(3 * count + 1, most))
    yield "repeated", torch.randint(count, (min(2 * count + 1, most), slots), generator=generator)
    yield "to the last", torch.full((min(2 * count + 3, most), slots), count - 1)
    yield "to the first and the middle", half(0, torch.full((min(count + 2, most), slots), count // 2))
    yield "one token", even(1)
    yield "many, and half to one", half(count - 1, even(min(MANY, most)))


def _arguments(tokens: Tensor, index: Tensor, weights: Tensor) -> dict[str, object]:
    return {"tokens": tokens.clone(), "index": index.clone(), "weights": weights.clone()}
