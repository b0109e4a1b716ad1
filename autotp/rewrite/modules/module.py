"""Runs any module's forward under a plan: convert arguments, read local tensors, watch sites, convert results.

`ModuleRun` is the state that a rewritten module carries. It runs either as the forward of a subclass or, where an object's class
must stay, as a forward of the instance. Both are found by `module(x)`, inside of its hooks, and by `module.forward(x)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from autotp.plan.layout import Layout
from autotp.plan.spec import Written
from autotp.rewrite.in_parts.tensor import part
from autotp.rewrite.modules.boundaries import InputSlots, OutputSlots
from autotp.rewrite.modules.classes import STATE
from autotp.rewrite.modules.pairs import PairsRun
from autotp.rewrite.operators.call_sites import RUNNING, SiteMode, SiteTable
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout
from autotp.rewrite.parameters.reads import GradFix, Read, read_by_token, read_param
from autotp.rewrite.sequence.tokens import ParallelTokens, tokens_of

_ABSENT: Any = object()
_grad_enabled = torch.is_grad_enabled


class ModuleRun:
    """Runs the forward of one module. `own` are the reads of its own tensors, `reads` all of them."""

    __slots__ = ("by_token", "frames", "inputs", "light", "outputs", "own", "pairs", "parts", "reads", "rows", "shared", "sites")

    def __init__(
        self,
        module: nn.Module,
        reads: tuple[Read, ...],
        inputs: InputSlots | None = None,
        outputs: OutputSlots | None = None,
        sites: SiteTable | None = None,
        pairs: PairsRun | None = None,
    ) -> None:
        self.reads, self.pairs = reads, pairs
        self.own = tuple(r for r in reads if r.owner is module)
        self.inputs, self.outputs, self.sites = inputs, outputs, sites
        self.parts = tuple(r for r in reads if r.written is not Written.NEVER)
        self.shared: dict[str, Tensor] | None = None  # values read by the root for all modules
        #: The reads of a module that can run on a rank's tokens, with what sums their gradients then.
        self.by_token: tuple[tuple[Read, GradFix], ...] | None = None
        self.rows: dict[str, Tensor] | None = None  # values read by the root for calls on tokens
        self.frames: list[tuple[list[tuple[dict[str, Any], str, Any]], SiteMode | None]] = []
        simple = len(self.own) == len(reads) and all(r.convert is None and not r.is_buffer for r in reads)
        simple = simple and inputs is None and outputs is None and sites is None and pairs is None
        self.light = tuple((r.name, r.fix) for r in reads) if simple else None

    def on_tokens(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: ParallelTokens
    ) -> Any:
        """Runs `forward` on the rows of `x`, the one tensor among its arguments."""
        attributes, local, shared = module.__dict__, part(x), self.rows or {}
        try:
            for read, fix in self.by_token or ():
                attributes[read.name] = shared[read.name] if read.name in shared else read_by_token(read, fix)
            result = forward(module, *(local if a is x else a for a in args), **{n: local if a is x else a for n, a in kwargs.items()})
        finally:
            for read, _ in self.by_token or ():
                attributes.pop(read.name, None)
        result = tokens_of(result, x._kind)
        return result if self.outputs is None else self.outputs(result)

    def enter(self) -> None:
        """Put the local tensors where the forward reads them and start watching sites."""
        saved: list[tuple[dict[str, Any], str, Any]] = []
        mode: SiteMode | None = None
        self.frames.append((saved, None))
        layouts: dict[int, Layout] = {}
        held: dict[int, Tensor] = {}
        for read in self.reads:
            value = read.value()
            attributes = read.owner.__dict__
            saved.append((attributes, read.name, attributes.get(read.name, _ABSENT)))
            attributes[read.name] = value
            if read.layout is not None:
                layouts[id(value)] = read.layout
            if read.held and value is not None:
                held[id(read.tensor)] = value
        if self.sites is not None:
            mode = SiteMode(self.sites, layouts, held)
            mode.__enter__()
        elif RUNNING.modes:
            RUNNING.modes.append(None)
        else:
            return
        self.frames[-1] = (saved, mode or _PAUSE)

    def leave(self) -> None:
        """Undo `enter`, also after an error in the middle of it."""
        saved, mode = self.frames.pop()
        if mode is _PAUSE:
            RUNNING.modes.pop()
        elif mode is not None:
            mode.__exit__(None, None, None)
        for attributes, name, old in reversed(saved):
            if old is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = old

    def __call__(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `forward(module, *args, **kwargs)` under the plan."""
        if self.inputs is not None:
            args, kwargs = self.inputs(args, kwargs)
        if not is_dynamo_compiling():
            result = self.inside(module, forward, args, kwargs)
        elif self.sites is None and self.pairs is None and not self.written(module):  # the class's views read local values
            result = forward(module, *args, **kwargs)
        else:  # the lines of code that make calls, and how many pairs a rank has, are known in eager code only: a break in the graph
            result = self.inside_eagerly(module, forward, args, kwargs)
        return result if self.outputs is None else self.outputs(result)

    def inside(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `forward` with the local tensors in place and sites watched."""
        if self.pairs is not None:
            forward = self.pairs.around(forward)
        try:
            self.enter()
            if not self.parts:
                return forward(module, *args, **kwargs)
            result = forward(module, *args, **kwargs)
            self.put_back(module)
            return result
        finally:
            self.leave()

    def put_back(self, module: nn.Module) -> None:
        """Make buffers whole again whose parts the forward changed (running statistics)."""
        for read in self.written(module):
            read.put_back(read.owner.__dict__[read.name])

    def written(self, module: nn.Module) -> list[Read]:
        """Returns the buffers whose parts a forward changes in the mode that the module is in."""
        return [read for read in self.parts if module.training or read.written is Written.ALWAYS]

    inside_eagerly = torch.compiler.disable(inside)  # type: ignore[no-untyped-call]


_PAUSE: Any = object()


RUN = "_autotp_run"


def run_instance(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the forward of a module whose class stays, under the plan. No view of the class reads its parameters: that is never compiled."""
    run: ModuleRun = module.__dict__[RUN]
    if run.reads and is_dynamo_compiling():
        return _run_eagerly(run, module, forward, args, kwargs)
    return run(module, forward, args, kwargs)


_run_eagerly = torch.compiler.disable(ModuleRun.__call__)  # type: ignore[no-untyped-call]


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParallelTokens | None:
    """The tokens that a call is about, where they are the only tensor among its arguments."""
    found = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return found[0] if len(found) == 1 and type(found[0]) is ParallelTokens else None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Makes the forward of a rewritten `base`."""
    inner = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attributes = self.__dict__
        run: ModuleRun = attributes[STATE]
        light = run.light
        if run.by_token is not None and not is_dynamo_compiling() and (x := _tokens(args, kwargs)) is not None:
            return run.on_tokens(self, inner, args, kwargs, x)
        if light is None or is_dynamo_compiling():
            return run(self, inner, args, kwargs)
        parameters = attributes["_parameters"]
        record = _grad_enabled()
        for name, fix in light:
            if name in attributes or not in_layout(parameters.get(name), fix.layout):  # called inside its own forward; put there by someone
                return run(self, inner, args, kwargs)
        try:
            for name, fix in light:
                p: LayoutDTensor = parameters[name]
                if record and p.requires_grad:
                    shared = run.shared
                    attributes[name] = shared[name] if shared and name in shared else read_param(p, fix)
                else:
                    attributes[name] = p._local_tensor
            return inner(self, *args, **kwargs)
        finally:
            for name, _ in light:
                attributes.pop(name, None)

    return forward
