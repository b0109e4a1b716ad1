"""Records a run of a model on fake tensors as a `Graph`.

Two modes work together. A `TorchFunctionMode` sees each call as the code wrote it: raw Python ints with their provenance, and
the place of the call. A dispatch mode on the PreDispatch key sees the same call as ATen operators that are not decomposed yet
(`linear`, `scaled_dot_product_attention`, …). The `forward` of every module is wrapped, inside the hooks of the call and where
`module.forward(x)` finds it too, to record what crosses module boundaries: the rewritten modules act in the same place.

Small integer and constant tensors are computed for real beside the fake run, so that branches on masks and positions go the
way they go for the user. Where code depends on data that is unknown (which experts are hit), sizes are chosen: see `choices`.
"""

from __future__ import annotations

import functools
import sys
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.autograd_function import custom_function_call
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from autotp.plan.spec import Call, Forms
from autotp.trace import unknown_data
from autotp.trace.boundary import Handed, Path, flatten_arguments, flatten_result
from autotp.trace.call_sites import call_of, call_place
from autotp.trace.fills import FILL_AT, FILLS, KEEPING
from autotp.trace.forms import Signature, asks_dims, class_name
from autotp.trace.functions import Applied, TensorLike, prove
from autotp.trace.graph import Access, Graph, Node, Origin, Place, Pseudo, PythonCall, Random, Result, Scope, Value
from autotp.trace.ints import IntExpr, Life, SizeRef, TaggedInt, expr_of
from autotp.trace.lengths import BY_LENGTH, with_tensors
from autotp.trace.memo import Known, Memo
from autotp.trace.reading import Reading
from autotp.trace.storage import storage_of
from autotp.trace.watch import (
    CHECKPOINT,
    FUNCTION,
    GRAD_FN,
    REQUIRES_GRAD,
    Question,
    Refused,
    compiler_code,
    is_model,
    is_running,
    watching,
)
from autotp.trace.weights import Weights

_SHAPE, _SIZE, _NUMEL = torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel  # type: ignore[attr-defined]
_LEN = torch.Tensor.__len__
_VIEW, _ALIAS = torch.ops.aten.view.default, torch.ops.aten.alias.default
_SIZES = frozenset((_SHAPE, _SIZE, _NUMEL, _LEN))  # each access of a getter makes a new wrapper, equal to the others
_AFTER = Tensor.register_post_accumulate_grad_hook
_GRADIENTS = frozenset((REQUIRES_GRAD, GRAD_FN, Tensor.is_inference, Tensor.register_hook, Tensor.retain_grad, _AFTER))
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_MADE = frozenset((_DATA, *(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))))
_SLOTS = ("__get__", "__set__")


_AGAIN = "it runs in a checkpointed function, whose second run, in the backward, is outside of the module's forward"


class Recorder:
    """Collects nodes; used as `with recorder.recording(): model(...)`."""

    def __init__(
        self,
        fake: FakeTensorMode,
        keep: Callable[[Any], bool],
        modules: Mapping[str, nn.Module],
        hidden: Callable[[str], bool] = lambda file: False,
        known: Known | None = None,
    ) -> None:
        """`keep`: operators recorded whole (others are decomposed if they can be). `modules`: path → module, one path each.

        `hidden(file)`: calls made from such a file are run but not recorded. `known`: what earlier recorders have seen, see `memo`.
        """
        self.fake, self.keep, self.hidden, self.every = fake, keep, hidden, modules
        self.paths = {id(m): path for path, m in modules.items()}
        self.nodes: list[Node] = []
        self.params: dict[str, Value] = {}
        self.buffers: dict[str, Value] = {}
        self.results: list[Result] = []
        self.fills: dict[int, float] = {}
        self.notes: list[str] = []
        self.concrete: dict[int, Tensor] = {}  # value id → real tensor
        self.ends = True  # an unknown mask selects its last row too
        self.unknown = 0  # what stands for an unknown number
        self.guessed = False  # code has read an unknown number in this call
        self.untrained = ""  # why the path in training mode could not be traced
        self.refilled: set[str] = set()
        self.left: dict[tuple[str, str], dict[int, Value]] = {}
        self.life = Life()  # of the tags of this trace
        self.modules: list[tuple[str, int]] = [("", 0)]
        self.calls: dict[int, tuple[str, int]] = {}  # frame → (path of its module, frame of the caller)
        self._values: dict[int, Value] = {}  # id(tensor) → value
        self._before: list[tuple[int, int, Value | None]] = []  # (number of nodes, id(tensor), its value) before each change of `_values`
        self._alive: list[Tensor] = []
        self._copies = unknown_data.Copies()
        self._aliases: dict[int, list[Tensor]] = {}
        self._call: tuple[Any, Any, Any, Place] | None = None
        self._apart = ""  # why that call is made apart from the module's forward
        self._compiler = compiler_code()
        self._calls = self._frames = 0
        self.python: dict[int, PythonCall] = {}
        self.weights = Weights()
        self._accesses: dict[tuple[str, int], dict[Access, None]] = {}
        self._quiet = 0
        self._count = 0
        self.asked: set[Question] = set()
        self.inference = self.contrary = False
        self.data_vary = False  # what holds of the inputs that are known may not hold of others
        self.turned: list[tuple[str, Place | None]] = []  # where a condition was answered contrary to what is usual
        self.settled: set[tuple[str, Place | None]] = set()  # where it never is
        self.conditions: list[tuple[str, Place | None]] = []  # where a condition was asked in this call
        self.reversed: set[tuple[str, Place | None]] = set()  # where the usual answer makes the code raise: the other one is usual there
        self.applied: list[Applied] = []
        self._scopes: list[tuple[FrameType, int]] = []  # calls of autograd functions that run
        self._reading = Reading()
        self._later: WeakSet[Any] = WeakSet()  # results of forwards whose bodies run when someone goes over them
        self._asks_dims: set[str] = set()
        self._children = {path: dict(m._modules) for path, m in modules.items()}
        self.swapped: set[tuple[str, str]] = set()
        self._forms: list[tuple[int, str, dict[str, str]]] = []  # (number of nodes, module, kinds of its arguments) of each call
        self._same: dict[str, dict[Path, Path]] = {}  # module → argument path → a path that was the same tensor in some call
        self.memo = Memo(fake, {} if known is None else known)
        self.dispatch = _Dispatch(self)
        self.function = _Function(self)

    # values ---------------------------------------------------------------------------------------------------------------

    def bind(self, tensor: Tensor, origin: Origin, name: str = "") -> Value:
        """A new value for `tensor` (a tensor that was written in place gets a fresh one each time)."""
        value = Value(self._count, tuple(tensor.shape), tensor.dtype, origin, name)
        self._count += 1
        self._set(tensor, value)
        self._alive.append(tensor)
        if isinstance(tensor, FakeTensor):
            self._aliases.setdefault(storage_of(tensor), []).append(tensor)
        return value

    def _set(self, tensor: Tensor, value: Value) -> None:
        if value.origin not in (Origin.PARAM, Origin.BUFFER):  # those stay whatever is rewound
            self._before.append((len(self.nodes), id(tensor), self._values.get(id(tensor))))
        self._values[id(tensor)] = value

    def value(self, tensor: Tensor) -> Value:
        """The current value of `tensor`; a tensor never seen before is a constant."""
        known = self._values.get(id(tensor))
        if known is not None:
            if known.origin is Origin.PARAM:
                self._note_access(tensor, known)
            return known
        value = self.bind(tensor, Origin.CONST)
        real = tensor.constant if isinstance(tensor, FakeTensor) else tensor
        if real is not None and real.device.type != "meta" and unknown_data.small(real):
            self.know(value, real)
        return value

    def _note_access(self, tensor: Tensor, value: Value) -> None:
        if self._apart is _AGAIN and not self.modules[-1][0] and "." not in value.name:  # the model keeps its class, which would see to it
            raise Refused(
                f"the forward reads {value.name} in a function of its own that is checkpointed, and runs again outside of it: put "
                "the parameter and that code into a module inside of the model"
            )
        shown = self.weights.attributes.get(id(tensor))
        access = Access(shown[1], False) if shown is not None else Access(self.weights.objects.get(id(tensor), value.name), True)
        self._accesses.setdefault((self.modules[-1][0], value.id), {})[access] = None

    def shows(self, shown: Tensor, name: str) -> None:
        """`shown` is what an attribute gives for the parameter `name`."""
        self._set(shown, self.params[name])
        self._alive.append(shown)

    def fakes(self, tree: Any) -> Any:
        """The arguments of a call with fake parameters instead of real ones that the code holds."""
        if isinstance(tree, Tensor):
            found = self.weights.originals.get(id(tree))
            return tree if found is None else found[0][found[1]]
        if type(tree) in (tuple, list):
            return type(tree)(self.fakes(x) if isinstance(x, (Tensor, tuple, list)) else x for x in tree)
        return tree

    def know(self, value: Value, real: Tensor) -> None:
        """The numbers of `value` are those of `real`, of which a copy is kept: operators may write into it."""
        with self.paused():
            self.concrete[value.id] = self._copies.of(real)

    def adopt(self, tensor: Tensor, node: Node) -> None:
        """Factory functions return another Python object than the dispatcher did: it stands for the same value."""
        if len(node.outputs) == 1 and node.outputs[0].shape == tuple(tensor.shape):
            self.stands_for(tensor, node.outputs[0])

    def stands_for(self, tensor: Tensor, value: Value) -> None:
        """`tensor` is another object for `value`."""
        self._set(tensor, value)
        self._alive.append(tensor)
        if isinstance(tensor, FakeTensor):
            self._aliases.setdefault(storage_of(tensor), []).append(tensor)

    def replaces_data(self, how: str) -> NoReturn:
        """Code gives a tensor other data: where the tensor is a rank's part, or what stands for a parameter, they are lost."""
        raise Refused(
            f"the forward of module {self.modules[-1][0] or '<root>'!r} puts other data into a tensor ({how}), which would be lost where "
            "that tensor is a rank's part: write into it in place (`with torch.no_grad(): w.copy_(…)`)"
        )

    def met(self, func: Any, args: tuple[Any, ...]) -> None:
        """Code calls `func`, a function of tensors or the getter of a property; for recorders that care."""

    def rewind(self, mark: int) -> None:
        """Forget the nodes after the first `mark` ones (a path that the model turned down), and the values that they made.

        An operator may return its argument (a `to` that changes nothing): a buffer is then itself again.
        """
        del self.nodes[mark:]
        self._forms = [form for form in self._forms if form[0] < mark]
        while self._before and self._before[-1][0] >= mark:
            _, key, value = self._before.pop()
            if value is None:
                del self._values[key]
            else:
                self._values[key] = value
        self.modules[1:] = []
        self._scopes = []
        self._call = None

    def graph(self, repeats: dict[str, str]) -> Graph:
        """Everything recorded so far, without versions of aliases that nothing reads."""
        nodes, results = _alive(self.nodes, self.results, (v for values in self.left.values() for v in values.values()))
        constants = {
            v.id: self.concrete[v.id]
            for n in nodes
            for v in n.inputs()
            if v.id in self.concrete and (v.origin is Origin.CONST or prod(v.shape) <= 16)
        }
        nodes, members = _one_slot(nodes, self._same)
        tables = dict(self.params), dict(self.buffers)
        notes, numbers = tuple(self.notes), {n.call for n in nodes}
        python = {number: call for number, call in self.python.items() if number in numbers}
        calls, held = dict(self.calls), {key: tuple(found) for key, found in self._accesses.items()}
        scopes, refilled = self._proven(), frozenset(self.refilled)
        fills = dict(self.fills)
        left = {key: tuple(values.values()) for key, values in self.left.items()}
        alike, forms = dict(repeats), self._called()
        return Graph(
            nodes,
            *tables,
            results,
            alike,
            fills,
            notes,
            constants,
            calls,
            held,
            python,
            members,
            scopes,
            refilled,
            left,
            forms,
            frozenset(self._asks_dims),
            frozenset(self.swapped),
            "" if any("-training" in result.name for result in results) else self.untrained,
        )

    def note_swaps(self) -> None:
        """Take down which modules the forwards have put in place of others, before the trace puts those back."""
        for path, before in self._children.items():
            for name, module in self.every[path]._modules.items():
                if module is not None and before.get(name) not in (None, module):
                    self.swapped.add((f"{path}.{name}" if path else name, class_name(type(module))))

    def _called(self) -> dict[str, Forms]:
        found: dict[str, set[Call]] = {}
        for _, path, kinds in self._forms:
            found.setdefault(path, set()).add(frozenset(kinds.items()))
        return {path: frozenset(calls) for path, calls in found.items()}

    def _proven(self) -> tuple[Scope, ...]:
        known: dict[object, Scope] = {}
        scopes: list[Scope] = []
        for call in self.applied:
            key = call.function, tuple(a if isinstance(a, (TensorLike, int, float, str, bool, type(None))) else id(a) for a in call.args)
            if key not in known:
                known[key] = prove(call)
            scopes.append(known[key])
        return tuple(scopes)

    # nodes ----------------------------------------------------------------------------------------------------------------

    def add(self, op: Any, args: Any, kwargs: Any, outputs: tuple[Value, ...], **more: Any) -> Node:
        """Append a node at the current module."""
        module, frame = self.modules[-1]
        apart = self._apart if self._call is not None else ""
        node = Node(len(self.nodes), op, args, kwargs, outputs, module, frame, scope=self._scope(), apart=apart, **more)
        self.nodes.append(node)
        return node

    def cross(self, tensor: Tensor, kind: Pseudo, module: str, path: tuple[str | int, ...]) -> Tensor:
        """An alias of `tensor` on the other side of a module boundary."""
        with torch._C.DisableTorchFunction():
            differentiable = tensor.requires_grad
        with self.paused(), torch.set_grad_enabled(differentiable):  # the alias of what requires a gradient does, whatever the mode
            alias: Tensor = self.memo.run(_ALIAS, (tensor,), {})
        before = self.value(tensor)
        after = self.bind(alias, Origin.NODE)
        if before.id in self.concrete:
            self.concrete[after.id] = self.concrete[before.id]
        if before.id in self.fills:
            self.fills[after.id] = self.fills[before.id]
        self.add(kind, (before,), {}, (after,), slot=(module, path))
        for name, held in vars(tensor).items():  # what code has put on it
            vars(alias).setdefault(name, held)
        return alias

    def dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run and record one ATen call."""
        if torch._C._are_functorch_transforms_active():
            self._escape(args)
            return func(*args, **kwargs)
        place = self._call[3] if self._call else None
        if self._quiet or (place is not None and self.hidden(place.file)):
            return func(*args, **kwargs)
        if func._schema.name == "aten::set_" and self.value(args[0]).origin in (Origin.PARAM, Origin.BUFFER):
            self.replaces_data("`set_`")
        whole = self.keep(func) or func._schema.name in BY_LENGTH
        if not whole and (parts := self._decomposed(func, args, kwargs)) is not NotImplemented:
            return parts
        vargs, vkwargs = self._values_for(args), {name: self._values_for(x) for name, x in kwargs.items()}
        try:
            result, real = unknown_data.run(self, func, args, kwargs)
        except unknown_data.Unfolded:
            if (parts := self._decomposed(func, args, kwargs)) is not NotImplemented:
                return parts
            raise RuntimeError(f"what {func._schema.name} gives depends on data that is not known without running the model") from None
        if not isinstance(result, (Tensor, tuple, list)):
            self.add(func, vargs, vkwargs, (), **self._provenance(args, kwargs))  # a number leaves the graph
            return result
        written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
        mutated = [args[i] if i < len(args) else kwargs.get(name) for i, name in written]
        outputs = []
        flat = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
        reals = [real] if isinstance(result, Tensor) else real if real is not None else [None] * len(flat)
        for tensor, exact in zip(flat, reals, strict=False):
            value = self.bind(tensor, Origin.NODE)
            outputs.append(value)
            if exact is not None and unknown_data.small(exact):
                self.concrete[value.id] = exact
        if func is _VIEW and place is not None and place.file == FUNCTION:  # what a function returns as it is, in a view of its size
            func, vargs = _ALIAS, vargs[:1]
        node = self.add(func, vargs, vkwargs, tuple(outputs), **self._provenance(args, kwargs))
        self._note_fill(node)
        for target in mutated:
            if isinstance(target, Tensor):
                self._written(target, outputs[0] if outputs else self.value(target))
        return result

    def _decomposed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the operators that `func` is made of, which are recorded; `NotImplemented` where it is not made of others."""
        if not func._can_decompose():
            return NotImplemented
        func, args = with_tensors(func, args)
        with self.dispatch:
            return func.decompose(*args, **kwargs)

    def _values_for(self, tree: Any) -> Any:
        """The arguments of an ATen call with values in the place of tensors, which come alone or in lists; generators as they are now."""
        if isinstance(tree, Tensor):
            return self.value(tree)
        if isinstance(tree, torch.Generator):
            return Random.of(tree)
        return type(tree)(map(self._values_for, tree)) if type(tree) in (tuple, list) else tree

    def _escape(self, args: tuple[Any, ...]) -> None:
        """Note which values are used inside a functorch transform, whose tensors are wrappers that cannot be told apart."""
        functorch = torch._C._functorch
        for tensor in (a for a in tree_flatten(args)[0] if isinstance(a, Tensor)):
            while functorch.is_functorch_wrapped_tensor(tensor):
                tensor = functorch.get_unwrapped(tensor)
            value = self._values.get(id(tensor))
            if value is None:
                continue
            if value.dtype.is_floating_point and value.origin is not Origin.CONST:
                raise RuntimeError("a vmap over activations cannot be traced")
            self.add(Pseudo.ESCAPE, (value,), {}, ())

    def _provenance(self, args: Any, kwargs: Any) -> dict[str, Any]:
        if self._call is None:
            return {}
        _, raw_args, raw_kwargs, place = self._call
        ints: list[IntExpr] = []
        tensors: list[int] = []
        _gather(raw_args, ints, tensors, self)
        _gather(tuple(raw_kwargs.values()), ints, tensors, self)
        return {"place": place, "ints": tuple(ints), "tensors": tuple(tensors), "call": self._calls}

    def _note_fill(self, node: Node) -> None:
        name = node.opname
        number = FILLS.get(name)
        if number is None and name in FILL_AT:
            at = FILL_AT[name]
            raw = node.args[at] if at < len(node.args) else None
            number = float(raw) if isinstance(raw, (int, float)) else None
        source = next(iter(node.inputs()), None)
        if number is None and name in KEEPING:
            number = self.fills.get(source.id) if source is not None else None
        if number is not None:
            for out in node.outputs:
                self.fills[out.id] = number

    def _written(self, target: Tensor, new: Value) -> None:
        """`target` was changed in place: every alias of its storage gets a new version that depends on the written value."""
        self.fills.pop(new.id, None)
        if self._values.get(id(target)) is not new:
            self._set(target, new)
        if not isinstance(target, FakeTensor):
            return
        for alias in list(self._aliases.get(storage_of(target), ())):
            if alias is target:
                continue
            before = self.value(alias)
            if before.origin in (Origin.PARAM,):
                continue
            exact = self.concrete.get(before.id) if new.id in self.concrete else None
            after = Value(self._count, before.shape, before.dtype, Origin.NODE)
            self._count += 1
            self._set(alias, after)
            if exact is not None:
                self.concrete[after.id] = exact
            self.add(Pseudo.WRITE, (before, new), {}, (after,))

    # context --------------------------------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operators run inside are not recorded."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @contextmanager
    def recording(self, grad: bool = False, inference: bool = False, contrary: bool = False) -> Iterator[None]:
        """Record everything that runs inside. `grad`: with gradients; `inference`: as if in inference mode; `contrary`: see `condition`."""
        self.inference, self.contrary = inference, contrary
        self.turned, self.conditions = [], []
        watched = watching(self.ask, self.apply, inference)
        with torch.set_grad_enabled(grad), self.fake, self.function, enable_python_dispatcher(), self.dispatch, self._boundaries(), watched:
            yield

    @contextmanager
    def _boundaries(self) -> Iterator[None]:
        """Every module's `forward` records what crosses it, in the instance, where calls and `module.forward(x)` find it."""
        placed: list[tuple[dict[str, Any], Any, Any]] = []
        try:
            for path, module in self.every.items():
                attributes = module.__dict__
                wrapped = self._boundary(module, path, module.forward)
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

    def _boundary(self, module: nn.Module, path: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs) if self._quiet else self.module_call(module, path, inner, args, kwargs)

        return forward

    def module_call(self, module: nn.Module, path: str, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the forward `inner` of a module; its tensors are aliased where a rewrite acts on them."""
        self.check_forward(sys._getframe(1))
        signature = Signature.of(inner)
        self._forms.append((len(self.nodes), path, signature.kinds_of(args, kwargs, shallow=not self.data_vary)))
        if asks_dims(self._reading.of(type(module)).read):
            self._asks_dims.add(path)
        try:
            given = args, kwargs
            args, kwargs = self.enter(module, path, args, kwargs)
            handed = Handed(given, (args, kwargs))
            result = self._inside(path, inner, args, kwargs)
            if handed.back():
                self.refilled.add(path)
            if isinstance(result, (GeneratorType, CoroutineType, AsyncGeneratorType)):
                self._later.add(result)
            return self.leave(path, result)
        except unknown_data.Untraceable:
            raise
        except Exception as error:
            raise unknown_data.Untraceable(path, type(module).__name__, self.nodes[-1] if self.nodes else None, error) from error

    def _inside(self, path: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._frames += 1
        self.calls[self._frames] = (path, self.modules[-1][1])
        self.modules.append((path, self._frames))
        held, self._call = self._call, None
        try:
            return run(*args, **kwargs)
        finally:
            self.modules.pop()
            self._call = held

    def check_forward(self, frame: FrameType | None) -> str:
        """Why code between `frame` and the forward of the module that runs is apart from it when it is not traced; "" where it is not.

        Raises where `frame` belongs to a forward that was called through a class, past the module's instance.

        Raises:
            Refused: it does. The rewritten module may act there or not, which the trace cannot know.
        """
        here, stop, compiler, apart = self.modules[-1][0], Recorder._inside.__code__, self._compiler, ""
        while frame is not None and frame.f_code is not stop:
            code = frame.f_code
            if code.co_name == "forward" and code.co_argcount:
                path = self.paths.get(id(frame.f_locals.get(code.co_varnames[0])))
                if path is not None and path != here and not self._runs_later(frame):
                    raise Refused(
                        f"the forward of module {path!r} ({type(self.every[path]).__name__}) is called through a class inside of module "
                        f"{here or '<root>'!r}: call the module itself, or its own forward (module.forward(x))"
                    )
            if code is compiler:
                apart = "it runs in a function that torch.compile compiles"
            elif code.co_filename == CHECKPOINT:
                apart = _AGAIN
            frame = frame.f_back
        return apart

    def _runs_later(self, frame: FrameType) -> bool:
        """True for the body of a forward that yields or awaits: the call has returned, and whoever goes over its result runs the body.

        Then it runs as a part of that code, here as after the rewrite.
        """
        return any(_frame_of(result) is frame for result in self._later)

    # gradients ------------------------------------------------------------------------------------------------------------

    def ask(self, question: Question, file: str) -> None:
        """Code in `file` asks about gradients: the path that it takes then may be another."""
        if not self._quiet and is_model(file) and not self.hidden(file):
            self.asked.add(question)

    def condition(self, usual: bool, node: Node | None) -> bool:
        """What holds of data that is not known: the `usual`, or the contrary the first time that a module asks at some place."""
        self.asked.add(Question.CONDITION)
        where = self.modules[-1][0], None if node is None else node.place
        self.conditions.append(where)
        usual = usual is not (where in self.reversed)
        if not self.contrary or where in self.turned or where in self.settled:
            return usual
        self.turned.append(where)
        return not usual

    def apply(self, frame: FrameType, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The autograd function `function` is applied in `frame`: what is recorded until it returns is in its scope."""
        caller = frame.f_back
        if self._quiet or caller is None or self.hidden(caller.f_code.co_filename):
            return
        values = tuple(self.value(a) for a in args if isinstance(a, Tensor))
        self._scopes.append((frame, len(self.applied)))
        self.applied.append(Applied(function, tuple(self._like(a) if isinstance(a, Tensor) else a for a in args), kwargs))
        self.add(Pseudo.APPLY, values, {}, ())

    def _like(self, tensor: Tensor) -> TensorLike:
        value = self.value(tensor)
        return TensorLike(value.shape, value.dtype, self.concrete.get(value.id))

    def _scope(self) -> int:
        while self._scopes and not is_running(self._scopes[-1][0]):
            self._scopes.pop()
        return self._scopes[-1][1] if self._scopes else -1

    def hooked(self, tensor: Tensor) -> None:
        """Code of the model sees the gradient of `tensor`."""
        if not self._quiet:
            self.add(Pseudo.HOOK, (self.value(tensor),), {}, ())

    def enter(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """`args`, `kwargs` with each tensor replaced by its alias inside the module."""
        seen: dict[int, tuple[Path, Tensor]] = {}

        def once(where: Path, tensor: Tensor) -> Tensor:
            if id(tensor) not in seen:
                seen[id(tensor)] = where, self.cross(tensor, Pseudo.ENTER, path, where)
            first, alias = seen[id(tensor)]
            if first != where:
                same = self._same.setdefault(path, {})
                same[_root(same, where)] = _root(same, first)
            return alias

        return flatten_arguments(module, args, kwargs, once)

    def leave(self, path: str, result: Any) -> Any:
        """`result` with each tensor replaced by its alias outside the module, one alias for each place it is returned at."""
        return flatten_result(result, lambda where, t: self.cross(t, Pseudo.EXIT, path, where))

    def finish(self, name: str, result: Any, left: Iterable[tuple[str, str, Value]] = ()) -> None:
        """Close one path: note what it returned, and what it `left` on modules (see `stash`).

        What is left on the root is like a result: its class stays, so nothing keeps its user from reading it.
        """
        found: list[tuple[tuple[str | int, ...], Any]] = []

        def tensor(where: tuple[str | int, ...], t: Tensor) -> Tensor:
            found.append((where, self.value(t)))
            return t

        flatten_result(result, tensor, lambda where, x: found.append((where, x)))
        for path, attribute, value in left:
            if path:
                self.left.setdefault((path, attribute), {})[value.id] = value
            else:
                found.append((("the attribute", attribute), value))
        self.results.append(Result(name, tuple(found), len(self.nodes)))


def _frame_of(result: GeneratorType[Any, Any, Any] | CoroutineType[Any, Any, Any] | AsyncGeneratorType[Any, Any]) -> FrameType | None:
    if isinstance(result, GeneratorType):
        return result.gi_frame
    return result.cr_frame if isinstance(result, CoroutineType) else result.ag_frame


def _root(same: Mapping[Path, Path], path: Path) -> Path:
    while same.get(path, path) != path:
        path = same[path]
    return path


def _one_slot(
    nodes: tuple[Node, ...], same: Mapping[str, Mapping[Path, Path]]
) -> tuple[tuple[Node, ...], dict[tuple[str, Path], tuple[Path, ...]]]:
    """The nodes with one slot for all argument paths that were one tensor in some call, and the paths of each such slot."""
    members: dict[tuple[str, Path], tuple[Path, ...]] = {}
    for module, pairs in same.items():
        for path in dict.fromkeys((*pairs, *pairs.values())):
            key = module, _root(pairs, path)
            members[key] = tuple(sorted({*members.get(key, ()), path, key[1]}, key=str))
    if not members:
        return nodes, members

    def renamed(node: Node) -> Node:
        if node.op is not Pseudo.ENTER or node.slot is None or node.slot[0] not in same:
            return node
        module, path = node.slot
        return replace(node, slot=(module, _root(same[module], path)))

    return tuple(map(renamed, nodes)), members


def _alive(nodes: list[Node], results: list[Result], left: Iterable[Value]) -> tuple[tuple[Node, ...], tuple[Result, ...]]:
    used = {leaf.id for result in results for _, leaf in result.leaves if isinstance(leaf, Value)} | {v.id for v in left}
    kept: list[Node] = []
    counts: list[int] = []
    for node in reversed(nodes):
        if node.op is Pseudo.WRITE and not any(o.id in used for o in node.outputs):
            continue
        used.update(v.id for v in node.inputs())
        kept.append(node)
        counts.append(node.index)
    kept.reverse()
    counts.reverse()
    final = tuple(replace(result, stop=bisect_left(counts, result.stop)) for result in results)
    return tuple(replace(node, index=i) for i, node in enumerate(kept)), final


def _gather(tree: Any, ints: list[IntExpr], tensors: list[int], recorder: Recorder) -> None:
    for item in tree:
        if isinstance(item, Tensor):
            known = recorder._values.get(id(item))
            tensors.append(known.id if known else -1)
        elif isinstance(item, int) and not isinstance(item, bool):
            ints.append(expr_of(item))
        elif isinstance(item, (tuple, list)):
            _gather(item, ints, tensors, recorder)
        elif isinstance(item, slice):
            _gather((item.start, item.stop, item.step), ints, tensors, recorder)


class TaggedSize(tuple[int, ...]):
    """A tensor's shape in tagged ints; torch.Size would make plain ints of them."""

    __slots__ = ()

    def numel(self) -> int:
        """The number of elements."""
        total: int = 1
        for n in self:
            total = total * n
        return total

    def __getitem__(self, index: Any) -> Any:
        item = tuple.__getitem__(self, index)
        return TaggedSize(item) if isinstance(index, slice) else item


class _Dispatch(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """The ATen half. torch lets only a few classes of modes onto the PreDispatch key; SchemaCheckMode's slot is the plain one."""

    def __init__(self, recorder: Recorder) -> None:
        TorchDispatchMode.__init__(self, _dispatch_key=DispatchKey.PreDispatch)  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.dispatched(func, args, kwargs or {})


@custom_function_call.py_impl(_Dispatch)
def _custom_function(mode: _Dispatch, function: Any, *args: Any, **kwargs: Any) -> Any:
    """An autograd.Function inside vmap (transformers' masks index with one): run by functorch, not recorded."""
    return custom_function_call(function, *args, **kwargs)


class _Function(TorchFunctionMode):
    """The Python half: sizes are answered with tagged ints, calls are noted with their place."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rec = self.recorder
        if not rec._quiet and (func in _SIZES or getattr(func, "__name__", "") not in _SLOTS or func in _MADE):
            args = rec.fakes(args)
            kwargs = {k: rec.fakes(v) for k, v in kwargs.items()} if kwargs else {}
        if func == _DATA:
            func = torch.Tensor.detach
        rec.met(func, args)
        if func in _SIZES:
            return self._size(func, args[0], args[1:], kwargs or {})
        code, offset = call_place(2)
        if func == _SET_DATA and not rec._quiet and is_model(code.co_filename):
            rec.replaces_data("`.data = …`")
        if func in _GRADIENTS:
            return self._gradient(func, code.co_filename, args, kwargs or {})
        held = rec._call
        frame = sys._getframe(1)
        while frame.f_code is not code and frame.f_back is not None:
            frame = frame.f_back
        apart = rec._apart
        if not rec._quiet:
            rec._apart = rec.check_forward(frame)
        rec._calls += 1
        rec._call = (func, args, kwargs or {}, Place.of(code, call_of(code, offset), frame.f_lineno))
        before, number = len(rec.nodes), rec._calls
        args, kwargs = unknown_data.with_numbers(rec, func, args, kwargs or {})
        try:
            result = func(*args, **kwargs)
        finally:
            rec._call, rec._apart = held, apart
        if isinstance(result, Tensor) and len(rec.nodes) > before and id(result) not in rec._values:
            rec.adopt(result, rec.nodes[-1])
        if len(rec.nodes) > before:
            found: list[int] = []
            _gather((result,), [], found, rec)
            rec.python[number] = PythonCall(getattr(func, "__name__", str(func)), tuple(found))
        return result

    def _gradient(self, func: Any, file: str, args: Any, kwargs: Any) -> Any:
        """Questions about gradients are noted, hooks on them recorded."""
        rec = self.recorder
        if rec._quiet or rec.hidden(file) or not is_model(file):
            return func(*args, **kwargs)
        if func == REQUIRES_GRAD:
            rec.ask(Question.GRAD, file)
        elif func is Tensor.is_inference:
            rec.ask(Question.INFERENCE, file)
            return rec.inference or func(*args, **kwargs)
        elif func is _AFTER:
            where = rec.modules[-1][0] or "<root>"
            raise Refused(
                f"the forward of module {where!r} calls {func.__name__}, but reads a parameter in the form of a local tensor there"
            )
        else:
            if func == GRAD_FN:
                rec.ask(Question.GRAD, file)
            if REQUIRES_GRAD(args[0]):
                rec.hooked(args[0])
                if func is Tensor.register_hook:
                    return RemovableHandle(OrderedDict())  # nothing runs backwards here
        return func(*args, **kwargs)

    def _size(self, func: Any, tensor: Tensor, rest: Any, kwargs: Any) -> Any:
        rec = self.recorder
        plain = func(tensor, *rest, **kwargs)
        if id(tensor) not in rec._values or rec._quiet:
            return plain
        value = rec.value(tensor)
        if isinstance(plain, torch.Size):
            return TaggedSize(TaggedInt(n, SizeRef(value.id, i, n), rec.life) for i, n in enumerate(plain))
        if func is _NUMEL:
            return TaggedInt(plain, SizeRef(value.id, -1, plain), rec.life)
        dim = (rest[0] if rest else kwargs.get("dim", 0)) if func is _SIZE else 0
        return TaggedInt(plain, SizeRef(value.id, int(dim) % max(tensor.dim(), 1), plain), rec.life)
