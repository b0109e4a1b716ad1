"""Watches how a model calls its modules of experts: which argument is which, and that the result is a row for each token."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autotp.numeric.copies import copy_of
from autotp.numeric.exact import DOUBLE, SINGLE, Precision
from autotp.numeric.subject import CannotRun, in_precision, without_dropout
from autotp.numeric.untouched import one_thread, untouched
from autotp.plan.experts import Routing
from autotp.trace.example import Example
from autotp.trace.model_state import same_numbers


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module of experts: its arguments, of which `tokens`, `index` and `weights` say where the three tensors are."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: str | int
    index: str | int
    weights: str | int

    def at(self, key: str | int) -> Tensor:
        """Returns one of the three tensors."""
        found = self.args[key] if isinstance(key, int) else self.kwargs[key]
        assert isinstance(found, Tensor)
        return found

    def of(self, tokens: Tensor, index: Tensor, weights: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call alike, with other tensors."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for key, value in ((self.tokens, tokens), (self.index, index), (self.weights, weights)):
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        return tuple(args), kwargs


@dataclass(slots=True)
class Seen:
    """What was seen of a module: its first call and how its arguments are called, or why it is not called as a module of experts is.

    inner: the modules inside of it that were called, by their paths from it.
    """

    call: Call | None = None
    routing: Routing | None = None
    problem: str = ""
    inner: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Watched:
    """What a run of a model showed, in a `precision` in which it runs. `examples`: the calls that it takes."""

    precision: Precision
    examples: tuple[Example, ...] = ()
    modules: dict[str, Seen] = field(default_factory=dict)


def watch(model: nn.Module, examples: Sequence[Example], paths: Sequence[str]) -> Watched:
    """Run a copy of `model` on `examples`, and look at the calls of the modules at `paths`. The model is left as it was.

    Raises:
        CannotRun: it cannot be copied, or turns down a call that it has to take.
    """
    with untouched(model), one_thread(), same_numbers(), warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        for precision in (DOUBLE, SINGLE):
            try:
                return _watch(copy_of(model, precision), examples, paths, precision)
            except CannotRun:
                if precision is SINGLE:
                    raise
    raise AssertionError("one of the precisions is the last")


def _watch(model: nn.Module, examples: Sequence[Example], paths: Sequence[str], precision: Precision) -> Watched:
    found = Watched(precision, modules={path: Seen() for path in paths})
    with _hooked(model, found.modules), without_dropout(precision):
        for example in examples:
            model.train(example.training)
            torch.manual_seed(0)
            try:
                example.call(model, dict(in_precision(example.make(), precision)))
            except Exception as error:  # the model may turn a call down in any way
                if example.optional:
                    continue
                text = " ".join(str(error).split())[:200]
                raise CannotRun(f"the model does not run on the example inputs ({type(error).__name__}: {text})") from error
            found.examples += (example,)
    for seen in found.modules.values():
        if seen.call is None and not seen.problem:
            seen.problem = "no call of it was seen"
    return found


@contextmanager
def _hooked(model: nn.Module, found: dict[str, Seen]) -> Iterator[None]:
    before: dict[str, Any] = {}

    def note_of(path: str) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            before[path] = _kept_by(module)

        return note

    def inner_of(path: str, name: str) -> Any:
        return lambda *_: found[path].inner.add(name)

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            seen = found[path]
            call, routing, problem = look_at(module, args, kwargs, result)
            if _kept_by(module) != before[path]:
                problem = "its forward leaves tensors in its attributes"
            if seen.routing is not None and routing is not None and seen.routing != routing:
                problem = "its calls pass the tokens and their experts in different ways"
            seen.problem = seen.problem or problem
            if seen.call is None and call is not None:
                seen.call, seen.routing = call, routing

        return hook

    handles: list[Any] = []
    for path in found:
        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(note_of(path)), module.register_forward_hook(hook_of(path), with_kwargs=True)]
        handles += [m.register_forward_pre_hook(inner_of(path, name)) for name, m in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept_by(module: nn.Module) -> list[tuple[int, int]]:
    """The tensors that a module and those inside of it hold, and their versions."""
    held = [v for m in module.modules() for name, v in vars(m).items() if name not in ("_modules", "_forward_hooks", "_forward_pre_hooks")]
    return [(id(t), t._version) for t in tree_leaves(held) if isinstance(t, Tensor)]


def look_at(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[Call | None, Routing | None, str]:
    """Returns a call with what its arguments are, or why they are not those of a module of experts."""
    tensors: dict[str | int, Tensor] = {i: v for i, v in enumerate(args) if isinstance(v, Tensor)}
    tensors |= {name: v for name, v in kwargs.items() if isinstance(v, Tensor)}
    if len(tensors) != sum(isinstance(v, Tensor) for v in tree_leaves((args, kwargs))) or len(tensors) != 3:
        return None, None, f"it takes {len(tensors)} tensors, and not tokens, their experts and weights alone"
    indices = [k for k, t in tensors.items() if t.dim() == 2 and not t.is_floating_point() and t.dtype is not torch.bool]
    if len(indices) != 1:
        return None, None, "no argument of two dims, or more than one, has whole numbers that could choose experts"
    index = tensors[indices[0]]
    floats = [k for k, t in tensors.items() if t.is_floating_point() and t.dim() == 2 and len(t) == len(index)]
    weights = [k for k in floats if tensors[k].shape == index.shape]
    if len(floats) != 2 or len(weights) != 1:
        return None, None, "its arguments are not tokens [T, H], with experts and weights [T, k]"
    (tokens,) = (k for k in floats if k != weights[0])
    if not isinstance(result, Tensor) or result.dim() != 2 or len(result) != len(index):
        return None, None, "its result has no row for each token"
    names = _names(module)
    called = [k if isinstance(k, str) else names[k] for k in (tokens, indices[0], weights[0]) if isinstance(k, str) or k < len(names)]
    if len(called) < 3:
        return None, None, "its forward has no names for its arguments"
    kept = Call(tuple(_still(v) for v in args), {k: _still(v) for k, v in kwargs.items()}, tokens, indices[0], weights[0])
    return kept, Routing(called[0], called[1], called[2]), ""


def _names(module: nn.Module) -> list[str]:
    parameters = list(inspect.signature(module.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    return names[1:] if names and names[0] == "self" else names  # a wrapped function of a method shows it


def _still(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
