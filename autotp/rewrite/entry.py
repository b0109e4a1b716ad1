"""Runs the checks of each call of a parallel model once, where it is entered: at its root, an inner model, or a block.

Every module that calls others has its forward wrapped. While one of them runs, those inside pass on. The outermost one checks that
the facts that the plan rests on still hold. It agrees on random numbers if it will draw some.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.distributed.tensor import DTensor

from autotp.adapters import settings
from autotp.errors import AutoTPError, ChangedError, LostRankError
from autotp.hugging_face import is_hugging_face
from autotp.plan.items import Path
from autotp.plan.loss_parallel import logits_in_parts
from autotp.plan.plan import Plan
from autotp.plan.sequence_parallel import tokens_in_parts
from autotp.plan.spec import Shown
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.guards.alone import Parts, install_alone
from autotp.rewrite.guards.caches import mark_own, not_of_this_rank, refuse_trained
from autotp.rewrite.guards.called import install_called
from autotp.rewrite.guards.hooks import Watch, install_hooks
from autotp.rewrite.guards.idle import install_idle
from autotp.rewrite.guards.ones import install_ones
from autotp.rewrite.guards.other_leaves import OtherLeaves
from autotp.rewrite.guards.own_grad import mark_copied
from autotp.rewrite.guards.saving import install_saving
from autotp.rewrite.guards.structure import Places, Structure
from autotp.rewrite.guards.tables import Place, Tensors
from autotp.rewrite.guards.values import Values, Watched, stored_names, watched
from autotp.rewrite.in_parts.calls import whole_results
from autotp.rewrite.modules.classes import BASE, wrap_forward
from autotp.rewrite.rng import Dropouts, device_of, install_generate, sync_rng
from autotp.rewrite.running import Running
from autotp.rewrite.sequence.tokens import ParallelTokens
from autotp.rewrite.transforms import refuse_transforms
from autotp.rewrite.undo import Undo
from autotp.trace.example import Setting
from autotp.trace.reading import Reading

ENTRY = "_autotp_entry"
#: What transformers sets to have blocks run again in the backward, which changes no number. No rule tells these attributes from others:
#: the one is a plain flag that forwards test, like flags that choose other numbers, and the method that stores both is as any method
#: of a model that changes what it computes, which the guards must notice. Only for models of transformers, where the names mean this.
_CHECKPOINTING = frozenset(("gradient_checkpointing", "_gradient_checkpointing_func"))
Originals = Mapping[tuple[str, str], Any]

_in_backward = torch._C._current_graph_task_id
_compiler = torch._C._dynamo.eval_frame.get_eval_frame_callback


class Follow(Protocol):
    """Plans a changed model again, where its kind of change is meant to be followed."""

    def begin(self) -> None:
        """Look at the model, which is parallel now."""

    def wants(self) -> bool:
        """True where a change that every guard would accept needs another plan all the same."""

    def __call__(self, change: ChangedError) -> bool:
        """Make the model parallel by another plan, collectively; False where `change` is not to be followed."""


def _while_compiled(follow: Follow | None) -> Callable[[], None]:
    """Makes the check of calls in code that is being compiled, which runs while it is compiled and leaves nothing there."""

    def check() -> None:
        if follow is not None and follow.wants():
            raise AutoTPError(
                "adapters were put on the model after parallelize, and code that is being compiled cannot plan it again: call "
                "autotp.parallelize(model, mesh) again, or the model once, before it is compiled"
            )

    check._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result, which imports dynamo
    return check


class Entry:
    """Guards one module at which a call of the model may begin."""

    __slots__ = (
        "alone", "comm", "compiled", "copies", "dropouts", "follow", "forwards", "hooks",
        "is_root", "leaves", "running", "scatters", "shows", "structure", "tensors", "untrained", "values",
    )  # fmt: skip

    def __init__(
        self,
        running: Running,
        comm: Comm,
        structure: Structure,
        values: Values,
        tensors: Tensors,
        hooks: Watch,
        dropouts: Dropouts,
        alone: Parts,
        untrained: str,
        copies: Sequence[Path],
        forwards: Sequence[tuple[type[nn.Module], Any]],
        follow: Follow | None,
        shows: bool,
        scatters: bool,
        is_root: bool,
        leaves: OtherLeaves,
    ) -> None:
        self.leaves = leaves
        self.scatters, self.is_root = scatters, is_root
        self.untrained, self.copies, self.forwards, self.follow, self.shows = untrained, copies, forwards, follow, shows
        self.compiled = _while_compiled(follow)
        self.running, self.comm, self.alone = running, comm, alone
        self.structure, self.values, self.tensors, self.hooks, self.dropouts = structure, values, tensors, hooks, dropouts

    def begin(self, module: nn.Module) -> None:
        """Runs the checks before the outermost module runs.

        Raises:
            AutoTPError: the model has changed, it is in training mode and was not traced so, the module does not run by itself, or
                it is called inside a transform of torch.func, a trace of torch.jit or an export with gradients.
        """
        refuse_transforms()
        if module.training and self.untrained:
            raise AutoTPError(f"{type(module).__name__} is called in training mode, and the plan knows nothing of that: {self.untrained}")
        if is_exporting() and torch.is_grad_enabled():
            raise AutoTPError("a parallel model is exported without gradients: call torch.export.export inside of torch.no_grad()")
        for cls, forward in self.forwards:
            if cls.forward is not forward:
                raise AutoTPError(
                    f"{cls.__qualname__}.forward is another function than when the model was parallelized, and that one runs on a rank's "
                    "part: patch the class before parallelize"
                )
        self.alone.check()
        if self.structure.differs():
            if self.follow is not None and self.follow.wants():
                raise ChangedError("adapters were put on the model, or taken off, after parallelize")
            self.structure.judge()
        self.values.check()
        self.tensors.check()
        self.leaves.check()
        self.hooks.check()
        # A block that runs again for a checkpoint, in the backward, has the random state of its first run.
        if module.training and _in_backward() == -1 and self.dropouts.active():
            sync_rng(self.comm, device_of(module))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments as the forward gets them."""
        running = self.running
        running.compiles = self.scatters and running.records and (running.inside_compiled or any(map(_is_compiled, module.modules())))
        if any(isinstance(v, DTensor) for v in (*args, *kwargs.values())):  # rows of a weight, say: whole from here on
            args = tuple(map(_whole, args))
            kwargs = {name: _whole(v) for name, v in kwargs.items()}
        if running.records:
            refuse_trained((*args, *kwargs.values()))
        return self.alone.arguments(module, args, kwargs)

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Returns the result as the caller gets it."""
        recording = self.running.records
        if recording:
            mark_own((*args, *kwargs.values(), *(result.values() if isinstance(result, Mapping) else ())))
        elif self.shows:
            result = whole_results(result)
        if recording and self.scatters and (self.is_root or _in_backward() == -1):  # a block that runs again for a checkpoint is inside
            result = whole_results(result, ParallelTokens)
        result = self.alone.whole(result)
        return mark_copied(result, self.copies) if self.copies and recording else result

    def end(self) -> None:
        """Runs when the call is over, whatever came of it."""
        running = self.running
        running.open = running.inside_compiled = False
        running.end()
        self.values.again()

    def planned_again(self, change: ChangedError) -> bool:
        """Makes the model parallel by another plan where `change` is to be followed; True where it did."""
        return self.follow is not None and self.follow(change)


_STEPS: Any = (Entry.begin, Entry.enter, Entry.leave, Entry.end, Entry.planned_again)
#: For calls in compiled code. dynamo would compile them, too: what they ask would be answered for good, and they would not act.
_UNCOMPILED: Any = tuple(map(torch.compiler.disable, _STEPS))


def _call(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entry: Entry = module.__dict__[ENTRY]
    running = entry.running
    if is_dynamo_compiling():
        entry.compiled()
        if running.open:
            return forward(module, *args, **kwargs)
        entry.alone.check()
        # Where the graph breaks inside, dynamo cannot go on in the middle of a `try`: it runs this function as it is, so that such a call
        # begins below as any other, and pieces of it are compiled. Where it does not break, nothing of this is left in the graph.
        running.open = True
        try:
            args, kwargs = entry.alone.arguments(module, args, kwargs)
            return entry.alone.whole(forward(module, *args, **kwargs))
        finally:
            running.open = False
    if running.open:
        return forward(module, *args, **kwargs)
    running.open, running.records, running.inside_compiled = True, torch.is_grad_enabled(), _compiler() is not None
    begin, enter, leave, end, planned_again = _UNCOMPILED if running.inside_compiled else _STEPS
    comm = entry.comm
    outer, comm.running = comm.running, running  # copies of a model share the group, and each has calls of its own
    try:
        begin(entry, module)
    except ChangedError as change:
        running.open = running.inside_compiled = False
        comm.running = outer
        if not planned_again(entry, change):
            raise
        return module.forward(*args, **kwargs)  # the plan, its guards and this forward are new
    except BaseException:
        running.open = running.inside_compiled = False
        comm.running = outer
        raise
    try:
        args, kwargs = enter(entry, module, args, kwargs)
        return leave(entry, args, kwargs, forward(module, *args, **kwargs))
    except LostRankError as error:
        raise LostRankError(f"a call of {type(module).__name__} could not be completed: {error}") from error
    except RuntimeError as error:
        if text := not_of_this_rank((*args, *kwargs.values()), error):
            raise AutoTPError(text) from error
        raise
    finally:
        end(entry)
        comm.running = outer


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _is_compiled(module: nn.Module) -> bool:
    """True after `module.compile()`, and for what `torch.compile(module)` makes."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


def originals_of(model: nn.Module, plan: Plan) -> Originals:
    """Returns the objects (configs) of which `apply` makes local copies; call this before `apply` makes them."""
    heads = {(m.path, a.path.partition(".")[0]) for m in plan.modules for a in m.attributes if "." in a.path}
    found = {(path, head): getattr(model.get_submodule(path), head, None) for path, head in heads}
    return {key: value for key, value in found.items() if hasattr(value, "__dict__")}


def install_entries(model: nn.Module, plan: Plan, comm: Comm, originals: Originals, undo: Undo, follow: Follow | None = None) -> None:
    """Guard a model that `plan` was applied to; journalled in `undo`. `follow` is asked before a change is refused."""
    modules = [(path, m) for path, m in model.named_modules()]
    install_ones(model, plan, undo)
    install_called(model, plan, undo)
    places, floats = _places(plan), _floats(plan, [path for path, _ in modules])
    running = comm.running
    install_alone(model, plan, comm, undo)
    install_idle(model, plan, running, undo)
    hooks = install_hooks(model, plan, running, undo)
    runs = [(p, m) for p, m in modules if p in places.runs or p in floats]
    reading = Reading()
    stored = stored_names(reading, (m for _, m in modules))
    if is_hugging_face(model):
        stored |= _CHECKPOINTING
    wholes = {(m.path, a.path): a.value for m in plan.modules for a in m.attributes if "." not in a.path}
    made = {type(m) for _, m in modules if hasattr(type(m), BASE)}
    classes = {getattr(cls, BASE, cls) for cls in made | {type(m) for _, m in runs}}
    # what a descriptor makes anew at each access (a partialmethod) cannot be compared
    forwards = tuple((c, c.forward) for c in sorted(classes, key=lambda c: c.__qualname__) if c.forward is c.forward)
    values = list(watched(runs, reading, stored, Watched(originals, wholes, floats)))
    tensors = [(p, Place(p, m, reading.of(type(m)).read - reading.of(type(m)).own - stored)) for p, m in runs]
    entered = [(p, m) for p, m in modules if m is model or _may_begin(model, m)]
    for _, module in entered:
        wrap_forward(module, _call, undo)
    for path, module in entered:  # now that all classes and forwards are those that will run
        under = [(p, m) for p, m in modules if _within(p, path)]
        own = {(type(v), id(v.object), v.names): v for p, v in reversed(values) if _within(p, path)}
        alone = Parts(path, module, plan.boundaries.get(path, ()) if path else (), comm)
        structure, dropouts = Structure(under, places, comm), Dropouts(m for _, m in under)
        held = Tensors([t for p, t in tensors if _within(p, path)])
        more = (
            plan.untrained,
            plan.copies.get(path, ()),
            forwards,
            follow,
            bool(logits_in_parts(plan)),
            bool(tokens_in_parts(plan)),
            module is model,
            OtherLeaves(under),
        )
        entry = Entry(running, comm, structure, Values(list(own.values())), held, hooks, dropouts, alone, *more)
        undo.set_item(module.__dict__, ENTRY, entry)
    if plan.settings:
        for setting in (Setting("as it is", {}), *(s for s in settings(model) if s.name in plan.settings)):
            with setting.on(model):
                for _, module in entered:
                    module.__dict__[ENTRY].values.learn()
    install_generate(model, comm, undo)
    install_saving(model, undo)


def _may_begin(model: nn.Module, module: nn.Module) -> bool:
    """True for modules that people call by themselves: those that call others, and dropouts beside models."""
    if not module._modules:
        return isinstance(module, nn.modules.dropout._DropoutNd) and any(module is child for child in model.children())
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def _places(plan: Plan) -> Places:
    cut = {name.rpartition(".")[0] for name, p in plan.params.items() if p.layout.dim is not None}
    changed = {m.path for m in plan.modules} | cut
    inner = frozenset(plan.boundaries)
    runs = inner | cut | plan.inside.keys() | {m.path for m in plan.modules if m.sites or m.attributes}
    touched: set[str] = set()
    for path in changed | inner | {u.owner for m in plan.modules for u in m.uses}:
        touched.update(_above(path))
    local = frozenset((m.path, a.path.rpartition(".")[2]) for m in plan.modules for a in m.attributes)
    return Places(inner, runs, frozenset(changed | runs), frozenset(touched), plan.swapped, local, plan.idle)


def _floats(plan: Plan, paths: Collection[str]) -> frozenset[str]:
    """Returns the modules that summands of a joint sum pass, and those that run a rank's pairs alone: a dropout there that drops nothing
    must go on dropping nothing.
    """
    dealt = [m.path for m in plan.modules if m.pairs is not None]
    passed = {path for path, slots in plan.boundaries.items() if any(b.shown is Shown.HELD and not b.result for b in slots)}
    passed |= {path for path in paths if any(_within(path, module) for module in dealt)}
    return frozenset(passed | {m.path for m in plan.modules if m.joint})


def _above(path: str) -> Collection[str]:
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")
