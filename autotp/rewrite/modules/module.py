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
from autotp.rewrite.modules.boundaries import InputSlots, OutputSlots
from autotp.rewrite.modules.classes import STATE
from autotp.rewrite.operators.call_sites import RUNNING, SiteMode, SiteTable
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout
from autotp.rewrite.parameters.reads import Read, read_param

_ABSENT: Any = object()
_grad_enabled = torch.is_grad_enabled


class ModuleRun:
    """Runs the forward of one module. `own` are the reads of its own tensors, `reads` all of them."""

    __slots__ = ("frames", "inputs", "light", "outputs", "own", "parts", "reads", "shared", "sites")

    def __init__(
        self,
        module: nn.Module,
        reads: tuple[Read, ...],
        inputs: InputSlots | None = None,
        outputs: OutputSlots | None = None,
        sites: SiteTable | None = None,
    ) -> None:
        self.reads = reads
        self.own = tuple(r for r in reads if r.owner is module)
        self.inputs, self.outputs, self.sites = inputs, outputs, sites
        self.parts = tuple(r for r in reads if r.written is not Written.NEVER)
        self.shared: dict[str, Tensor] | None = None  # values read by the root for all modules
        self.frames: list[tuple[list[tuple[dict[str, Any], str, Any]], SiteMode | None]] = []
        simple = len(self.own) == len(reads) and all(r.convert is None and not r.is_buffer for r in reads)
        self.light = tuple((r.name, r.fix) for r in reads) if simple and inputs is None and outputs is None and sites is None else None

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
        elif self.sites is None and not self.written(module):  # the class's views read local values
            result = forward(module, *args, **kwargs)
        else:  # the lines of code that make calls are known in eager code only: a break in the graph
            result = self.inside_eagerly(module, forward, args, kwargs)
        return result if self.outputs is None else self.outputs(result)

    def inside(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `forward` with the local tensors in place and sites watched."""
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


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Makes the forward of a rewritten `base`."""
    inner = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attributes = self.__dict__
        run: ModuleRun = attributes[STATE]
        light = run.light
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
