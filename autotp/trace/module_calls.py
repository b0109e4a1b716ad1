"""Wraps the `forward` of each module, to record what crosses its boundary and how it was called.

The wrapper lies inside the hooks of the call, and `module.forward(x)` finds it too: the rewritten modules act in the same place.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from autotp.plan.items import Path
from autotp.plan.spec import Call, Forms
from autotp.trace.boundary import Handed, argument_path, flatten_arguments, flatten_result
from autotp.trace.containers import Container, containers
from autotp.trace.forms import SAME, Signature, asks_dims, class_name
from autotp.trace.graph import Node, Origin, Pseudo
from autotp.trace.memo import Memo
from autotp.trace.opened import runs_opened
from autotp.trace.questions import Questions
from autotp.trace.reading import Reading
from autotp.trace.tape import AGAIN, Tape
from autotp.trace.values import Values
from autotp.trace.watch import CHECKPOINT, Refused, compiler_code

_ALIAS = torch.ops.aten.alias.default
_RECORDED = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)  # where the mode is that records operators

Forward = Callable[..., Any]


class Untraceable(Exception):
    """A module's forward failed on fake tensors; the exception carries the place."""

    def __init__(self, module: str, cls: str, node: Node | None, error: BaseException) -> None:
        super().__init__(str(error))
        self.module, self.cls, self.node, self.error = module, cls, node, error


class ModuleCalls:
    """Records the calls of modules. `call` gets each of them, and calls `run` where the forward is to run."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        tape: Tape,
        values: Values,
        memo: Memo,
        questions: Questions,
        call: Callable[[nn.Module, str, Forward, Any, Any], Any],
    ) -> None:
        self.paths = {id(m): path for path, m in modules.items()}
        self.refilled: set[str] = set()  # modules that change a list or dict that they are called with
        self.asks_dims: set[str] = set()
        self.swapped: set[tuple[str, str]] = set()
        self.start: CodeType | None = None  # what calls the model: a forward that is further out is another one's
        self._modules, self._call = modules, call
        self._tape, self._values, self._memo, self._questions = tape, values, memo, questions
        self._compiler = compiler_code()
        self._reading = Reading()
        self._later: WeakSet[Any] = WeakSet()  # results of forwards whose bodies run when someone goes over them
        self._children = {path: dict(m._modules) for path, m in modules.items()}
        self._wrappers: dict[str, tuple[Any, Forward]] = {}  # module → the forward of its class, and the wrapper of that
        self._forms: list[tuple[int, str, dict[str, str]]] = []  # (number of nodes, module, kinds of its arguments) of each call
        self._containers: list[tuple[int, str, Container]] = []  # (number of nodes, module, what it was called with or returned)
        self._same: dict[str, dict[Path, Path]] = {}  # module → argument path → a path that was the same tensor in some call

    # running ------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Inside, wraps every module's `forward` in the instance, to record what crosses it. Calls and `module.forward(x)` find it."""
        placed: list[tuple[dict[str, Any], Any, Any]] = []
        try:
            for path, module in self._modules.items():
                attributes = module.__dict__
                wrapped = self._wrapper(module, path, attributes.get("forward"))
                placed.append((attributes, wrapped, attributes.get("forward")))
                attributes["forward"] = wrapped
            yield
        finally:
            for attributes, wrapped, own in placed:
                if attributes.get("forward") is not wrapped:
                    continue  # the model's code put another one there
                if own is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = own

    def _wrapper(self, module: nn.Module, path: str, own: Forward | None) -> Forward:
        """Returns the wrapper of a module's forward: the same one in each call, as long as the module has the forward of its class."""
        of_class = type(module).forward
        held = self._wrappers.get(path)
        if own is None and held is not None and held[0] is of_class:
            return held[1]
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = self._tape.quiet or torch._C._are_functorch_transforms_active()
            return inner(*args, **kwargs) if hidden else self._call(module, path, inner, args, kwargs)

        if own is None:
            self._wrappers[path] = of_class, forward
        return forward

    def run(self, module: nn.Module, path: str, inner: Forward, args: Any, kwargs: Any) -> Any:
        """Run the forward `inner` of a module; its tensors are aliased where a rewrite acts on them."""
        self.check_forward(sys._getframe(1))
        signature = Signature.of(inner)
        with torch._C.DisableTorchFunction():  # these are no questions of the model's code
            kinds = signature.kinds_of(args, kwargs, shallow=not self._questions.data_vary)
        names = self._reading.of(type(module))
        if names.identity or runs_opened(type(module)):
            kinds[SAME] = signature.same(args, kwargs)
        self._forms.append((len(self._tape.nodes), path, kinds))
        if asks_dims(names.read):
            self.asks_dims.add(path)
        self._note(path, *_containers_of(module, args, kwargs))
        try:
            given = args, kwargs
            args, kwargs = self._enter(module, path, args, kwargs)
            handed = Handed(given, (args, kwargs))
            result = self._tape.inside(path, inner, args, kwargs)
            if handed.back():
                self.refilled.add(path)
            if isinstance(result, (GeneratorType, CoroutineType, AsyncGeneratorType)):
                self._later.add(result)
            self._note(path, *containers(result, result=True))
            return self._leave(path, result)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(path, type(module).__name__, self._tape.last(), error) from error

    def _note(self, path: str, *found: Container) -> None:
        self._containers += [(len(self._tape.nodes), path, container) for container in found]

    def _enter(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Returns `args`, `kwargs` with each tensor replaced by its alias inside the module."""
        seen: dict[int, tuple[Path, Tensor]] = {}

        def once(where: Path, tensor: Tensor) -> Tensor:
            if id(tensor) not in seen:
                seen[id(tensor)] = where, self._cross(tensor, Pseudo.ENTER, path, where)
            first, alias = seen[id(tensor)]
            if first != where:
                same = self._same.setdefault(path, {})
                same[_root(same, where)] = _root(same, first)
            return alias

        return flatten_arguments(module, args, kwargs, once)

    def _leave(self, path: str, result: Any) -> Any:
        """Returns `result` with each tensor replaced by its alias outside the module, one alias for each place it is returned at."""
        return flatten_result(result, lambda where, t: self._cross(t, Pseudo.EXIT, path, where))

    def _cross(self, tensor: Tensor, kind: Pseudo, module: str, path: Path) -> Tensor:
        """Returns an alias of `tensor` on the other side of a module boundary."""
        with torch._C.DisableTorchFunction():  # the modes record what code of the model does
            alias = self._alias(tensor)
            before = self._values.of(tensor)
            after = self._values.bind(alias, Origin.NODE)
            self._values.alike(before, after)
            self._tape.add(kind, (before,), {}, (after,), slot=(module, path))
        for name, held in vars(tensor).items():  # what code has put on it
            vars(alias).setdefault(name, held)
        return alias

    def _alias(self, tensor: Tensor) -> Tensor:
        """Returns an alias that requires a gradient where `tensor` does, whatever the mode."""
        was, differentiable = torch._C.is_grad_enabled(), tensor.requires_grad  # torch's own function is watched
        torch._C._set_grad_enabled(differentiable)
        try:
            with self._tape.paused(), torch._C._ExcludeDispatchKeyGuard(_RECORDED):
                alias: Tensor = self._memo.run(_ALIAS, (tensor,), {})
            return alias
        finally:
            torch._C._set_grad_enabled(was)

    def check_forward(self, frame: FrameType | None) -> str:
        """Says why code between `frame` and the forward of the module that runs is apart from it when it is not traced; "" where it
        is not.

        Raises where `frame` belongs to a forward that was called through a class, past the module's instance.

        Raises:
            Refused: it does. The rewritten module may act there or not, which the trace cannot know.
        """
        here, stops, compiler, apart = self._tape.module, (Tape.inside.__code__, self.start), self._compiler, ""
        while frame is not None and frame.f_code not in stops:
            code = frame.f_code
            if code.co_name == "forward" and code.co_argcount:
                path = self.paths.get(id(frame.f_locals.get(code.co_varnames[0])))
                if path is not None and path != here and not self._runs_later(frame) and not _of_a_base(frame, self._modules[path]):
                    raise Refused(
                        f"the forward of module {path!r} ({type(self._modules[path]).__name__}) is called through a class inside of module "
                        f"{here or '<root>'!r}: call the module itself, or its own forward (module.forward(x))"
                    )
            if code is compiler:
                apart = "it runs in a function that torch.compile compiles"
            elif code.co_filename == CHECKPOINT:
                apart = AGAIN
            frame = frame.f_back
        return apart

    def _runs_later(self, frame: FrameType) -> bool:
        """True for the body of a forward that yields or awaits: the call has returned, and whoever iterates over its result runs
        the body.

        Then it runs as a part of that code, here as after the rewrite.
        """
        return any(_frame_of(result) is frame for result in self._later)

    def rewind(self, mark: int) -> None:
        """Forget the forms and the containers of the calls that were made after the first `mark` nodes."""
        self._forms = [form for form in self._forms if form[0] < mark]
        self._containers = [found for found in self._containers if found[0] < mark]

    # what was found -----------------------------------------------------------------------------------------------------------

    def note_swaps(self) -> None:
        """Note which modules the forwards have put in place of others, before the trace puts those back."""
        for path, before in self._children.items():
            for name, module in self._modules[path]._modules.items():
                if module is not None and before.get(name) not in (None, module):
                    self.swapped.add((f"{path}.{name}" if path else name, class_name(type(module))))

    def forms(self) -> dict[str, Forms]:
        """Returns module → the forms that it was called in."""
        found: dict[str, set[Call]] = {}
        for _, path, kinds in self._forms:
            found.setdefault(path, set()).add(frozenset(kinds.items()))
        return {path: frozenset(calls) for path, calls in found.items()}

    def containers(self) -> dict[str, frozenset[Container]]:
        """Returns module → the lists, tuples and dicts that it was called with or returned."""
        found: dict[str, set[Container]] = {}
        for _, path, container in self._containers:
            found.setdefault(path, set()).add(container)
        return {path: frozenset(every) for path, every in found.items()}

    def one_slot(self, nodes: tuple[Node, ...]) -> tuple[tuple[Node, ...], dict[tuple[str, Path], tuple[Path, ...]]]:
        """Returns the nodes with one slot for all argument paths that were one tensor in some call, and the paths of each such slot."""
        members: dict[tuple[str, Path], tuple[Path, ...]] = {}
        for module, pairs in self._same.items():
            for path in dict.fromkeys((*pairs, *pairs.values())):
                key = module, _root(pairs, path)
                members[key] = tuple(sorted({*members.get(key, ()), path, key[1]}, key=str))
        return (tuple(map(self._renamed, nodes)) if members else nodes), members

    def _renamed(self, node: Node) -> Node:
        if node.op is not Pseudo.ENTER or node.slot is None or node.slot[0] not in self._same:
            return node
        module, path = node.slot
        return replace(node, slot=(module, _root(self._same[module], path)))


def _frame_of(result: GeneratorType[Any, Any, Any] | CoroutineType[Any, Any, Any] | AsyncGeneratorType[Any, Any]) -> FrameType | None:
    if isinstance(result, GeneratorType):
        return result.gi_frame
    return result.cr_frame if isinstance(result, CoroutineType) else result.ag_frame


def _containers_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Container]:
    """Yields the containers in the arguments of a call, `*args` as one of them."""
    given: dict[Path, Any] = {(name,): value for name, value in kwargs.items()}
    for i, value in enumerate(args):
        path = argument_path(module, i)
        if len(path) > 1:
            given[path[:1]] = (*given.get(path[:1], ()), value)
        else:
            given[path] = value
    for path, value in given.items():
        yield from containers(value, result=False, path=path)


def _root(same: Mapping[Path, Path], path: Path) -> Path:
    while same.get(path, path) != path:
        path = same[path]
    return path


def _of_a_base(frame: FrameType, module: nn.Module) -> bool:
    """True for `super().forward(…)` in another method of a module: the rewritten module's own forward is not called there either."""
    caller = frame.f_back
    if caller is None or not caller.f_code.co_argcount or caller.f_locals.get(caller.f_code.co_varnames[0]) is not module:
        return False
    above = (vars(cls).get("forward") for cls in type(module).__mro__[1:])
    return any(f is not None and getattr(inspect.unwrap(f), "__code__", None) is frame.f_code for f in above)
