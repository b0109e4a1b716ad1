"""Runs a block alike to an earlier one only once for each form of its arguments.

The results of the *template* stand for those of every block alike to it. That holds only where everything that happens to a block
goes through calls of the block itself. So a trace is turned down (`NotAlike`) as soon as it finds an exception: a module inside of
a block is called past it, a parameter or buffer of a block that did not run is read, a call has another form, or the template wrote
into its arguments or left something behind that cannot be given to the others. The next trace runs every block of that kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from autotp.trace.boundary import flatten_result
from autotp.trace.graph import Pseudo, Value
from autotp.trace.recorder import Recorder
from autotp.trace.repeats import Holders

_TABLES = frozenset(nn.Module().__dict__) | {"forward"}
_BY_VALUE = (int, float, str, bool, type(None), complex, bytes, torch.dtype, torch.device, Enum)
_CONTAINERS = (list, dict, OrderedDict)
#: What is alike in blocks that are alike, and may be asked of any of their tensors.
_ABOUT = frozenset(
    (
        *(getattr(Tensor, n).__get__ for n in ("dtype", "device", "is_meta", "layout", "requires_grad", "is_sparse", "is_cuda", "ndim")),
        *(getattr(Tensor, n) for n in ("is_floating_point", "is_complex", "dim")),
        torch.is_floating_point,
        torch.is_complex,
    )
)


class NotAlike(BaseException):
    """Blocks are used in another way than their template: they must run.

    It is no Exception, so that code of the model does not catch it.
    """

    def __init__(self, blocks: set[str]) -> None:
        super().__init__(", ".join(sorted(blocks)))
        self.blocks = blocks


@dataclass(frozen=True, slots=True)
class _Memory:
    """Says where a fake tensor lies: in which storage (of how many elements), and how."""

    storage: Any
    elements: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    grad: bool

    @staticmethod
    def of(tensor: Tensor) -> _Memory:
        """Returns the memory of `tensor`; it is read past the recorder's modes."""
        with torch._C.DisableTorchFunction():
            if tensor.layout is not torch.strided:  # a sparse tensor lies nowhere; it stands for itself
                return _Memory(None, 0, tuple(tensor.shape), (), 0, tensor.dtype, tensor.requires_grad)
            storage, dtype = tensor.untyped_storage(), tensor.dtype
            key = (storage._cdata, dtype) if isinstance(tensor, FakeTensor) else None
            size, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
            return _Memory(key, storage.nbytes() // dtype.itemsize, size, stride, offset, dtype, tensor.requires_grad)


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer of a call of the template: its arguments, its result, and the attributes (path inside, name, value) that it left.

    `ins`, `lent`: its tensor arguments. `outs`: id(tensor of the result or of an attribute left) → its state when the call ended.
    """

    arguments: Any
    ins: tuple[Value, ...]
    lent: tuple[_Memory, ...]
    result: Any
    outs: Mapping[int, tuple[Value, _Memory]]
    left: tuple[tuple[str, str, Any], ...]


class BlockRecorder(Recorder):
    """Records a run, with blocks answered from their templates: see the module.

    `repeats`: path of a block that does not run → path of its template.
    """

    repeats: Mapping[str, str]

    def watch(self, model: nn.Module, repeats: Mapping[str, str]) -> None:
        """Answer calls of `repeats` from their templates; call this when the tensors of all other modules are fake."""
        self.repeats, self.modules_at = dict(repeats), dict(model.named_modules())
        self.templates = {**self.repeats, **{t: t for t in self.repeats.values()}}
        self.answered: set[str] = set()
        self.unlike: set[str] = set()
        self.round = 0
        self._running: list[str] = []
        self._done: dict[Any, _Answer | None] = {}
        self._seen: set[Any] = set()
        self._numbers: dict[tuple[int, int], tuple[Tensor, Any]] = {}
        self._within: dict[str, str] = {}
        self._owner: dict[int, str] = {}
        holders = Holders(model)
        for block in sorted(self.templates, key=lambda path: path.count(".")):  # inner blocks last, they are the nearest
            for module in holders.own(self.modules_at[block]):
                if (path := self.calls.paths[id(module)]) != block:
                    self._within[path] = block
                if block in self.repeats:
                    tensors = (*module._parameters.values(), *module._buffers.values())
                    self._owner.update((id(t), block) for t in tensors if t is not None and not isinstance(t, FakeTensor))

    def next_round(self) -> None:
        """Begin another call of the model."""
        self.round += 1
        self.values.renew()

    def within(self, path: str) -> str | None:
        """Returns the innermost block that the module at `path` is inside of."""
        return self._within.get(path)

    def differ(self, block: str) -> None:
        """Notes that `block` or one alike to it is used in a way of its own."""
        template = self.templates[block]
        self.unlike |= {b for b, t in self.repeats.items() if t == template}
        raise NotAlike(self.unlike)

    def counted(self, path: str) -> None:
        """Notes that code of the module at `path` computes with the number of its block."""
        self.differ(next(b for b in self.templates if (path + ".").startswith(b + ".")))

    def check(self) -> None:
        """Checks at the end that all blocks were found alike, and that each of them was called where its template was."""
        ran = {t for t, *_ in self._done}
        unlike = self.unlike | {b for b, t in self.repeats.items() if t in ran and b not in self.answered}
        if unlike:
            raise NotAlike(unlike)

    # what the model does with a block beside calling it -------------------------------------------------------------------------

    def missed(self, tensor: Tensor) -> None:
        """Notes that code uses a tensor that has no value yet; one of a block that did not run gets none."""
        if id(tensor) in self._owner:
            self.differ(self._owner[id(tensor)])

    def met(self, func: Any, args: tuple[Any, ...]) -> None:
        """Notes that code does something with tensors."""
        if self._owner:
            for item in args:
                if id(item) in self._owner and self.values.known(item) is None and func not in _ABOUT:
                    self.differ(self._owner[id(item)])

    # calls ----------------------------------------------------------------------------------------------------------------------

    def module_call(self, module: nn.Module, path: str, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a forward, or answer it from its template's."""
        block = self._within.get(path)
        if block is not None and (block in self.repeats or block not in self._running):
            self.differ(block)
        if path not in self.templates:
            return super().module_call(module, path, inner, args, kwargs)
        form = self._form((args, kwargs), {})
        key = (self.templates[path], self.round, torch._C.is_grad_enabled(), form)  # torch's own function is watched
        if path in self.repeats:
            return self._answer(path, module, key, (args, kwargs))
        ins, tensors = self._tensors((args, kwargs))
        before = self._attributes(module)
        self._running.append(path)
        try:
            result = super().module_call(module, path, inner, args, kwargs)
        finally:
            self._running.pop()
        left = self._left(module, before)
        untouched = self._tensors((args, kwargs))[0] == ins and self._form((args, kwargs), {}) == form
        if left is None or not untouched or not _plain(result, _objects((args, kwargs))):
            self._done[key] = None
            return result
        outs = {id(t): (self.values.of(t), _Memory.of(t)) for t in _each_tensor((result, [v for *_, v in left]))}
        self._done[key] = _Answer((args, kwargs), ins, tuple(map(_Memory.of, tensors)), result, outs, left)
        return result

    def _answer(self, path: str, module: nn.Module, key: Any, arguments: Any) -> Any:
        answer = self._done.get(key)
        if answer is None:
            self.differ(path)
        assert answer is not None
        self.answered.add(path)
        here, tensors = self._tensors(arguments)
        # What a block returns stands for what every block alike to it returns, so only new arguments tell something new.
        if here != answer.ins and (key, here) not in self._seen:
            self._seen.add((key, here))
            self.tape.add(Pseudo.REPEAT, (here, answer.ins), {}, (), slot=(path, (self.templates[path],)))
        twins = _Twins(self, answer, tensors)
        for inner, name, value in answer.left:
            attributes = module.get_submodule(inner).__dict__
            held = attributes.get(name)
            if type(held) in _CONTAINERS and type(held) is type(value):
                _refill(held, twins.of(value))
            else:
                attributes[name] = twins.of(value)
        return twins.of(answer.result)

    def _tensors(self, tree: Any) -> tuple[tuple[Value, ...], tuple[Tensor, ...]]:
        found = {id(t): t for t in _each_tensor(tree)}
        return tuple(self.values.of(t) for t in found.values()), tuple(found.values())

    def _form(self, tree: Any, seen: dict[int, int]) -> Any:
        """Returns the form of a call's arguments: the facts known of each tensor and which are the same one, other plain values as
        they are.
        """
        if isinstance(tree, Tensor):
            value = self.values.of(tree)  # reading the tensor's own shape would go through the recorder's modes
            same = seen.setdefault(id(tree), len(seen))
            return value.shape, value.dtype, same, self._known(value)  # numbers that fill it: see `fills`
        if isinstance(tree, (tuple, list)):
            return type(tree), tuple([self._form(x, seen) for x in tree])
        if isinstance(tree, dict):
            return type(tree), tuple([(k, self._form(v, seen)) for k, v in tree.items()])
        if isinstance(tree, _BY_VALUE):
            return type(tree), int(tree) if isinstance(tree, int) else tree
        return id(tree)

    def _known(self, value: Value) -> Any:
        """Returns the numbers of a tensor that is known."""
        real = self.values.concrete.get(value.id)
        if real is None:
            return None
        key = id(real), real._version
        if key not in self._numbers:
            with self.tape.paused(), unset_fake_temporarily():
                numbers = real.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            self._numbers[key] = real, hash(numbers)
        return self._numbers[key][1]

    # what a call leaves behind ----------------------------------------------------------------------------------------------------

    def _attributes(self, module: nn.Module) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Returns every plain attribute inside of a block, with the items of those that are containers."""
        return {
            (path, name): (value, _items(value))
            for path, inner in module.named_modules()
            for name, value in inner.__dict__.items()
            if name not in _TABLES
        }

    def _left(self, module: nn.Module, before: Mapping[tuple[str, str], tuple[Any, Any]]) -> tuple[tuple[str, str, Any], ...] | None:
        """Returns the attributes that changed, None where the other blocks cannot be given the same."""
        after = self._attributes(module)
        if any(key not in after for key in before):
            return None
        left: list[tuple[str, str, Any]] = []
        for (path, name), (value, items) in after.items():
            old, kept = before.get((path, name), (None, None))
            if value is old and _unchanged(items, kept):
                continue
            if not _plain(value, set()) or (value is old and self._shared(module, path, name, value)):
                return None
            left.append((path, name, _refill(type(value)(), value) if items is not None else value))
        return tuple(left)

    def _shared(self, template: nn.Module, path: str, name: str, container: Any) -> bool:
        """True where another block has the very same container: an item that all of them append would be there once."""
        where = self.calls.paths[id(template)]
        blocks = (b for b, t in self.repeats.items() if t == where)
        return any(self.modules_at[b].get_submodule(path).__dict__.get(name) is container for b in blocks)


class _Twins:
    """Makes tensors for another block in place of those that its template made: own objects that mean the same value.

    A result that is a view of an argument becomes the same view of the block's own argument.
    """

    def __init__(self, recorder: BlockRecorder, answer: _Answer, arguments: tuple[Tensor, ...]) -> None:
        self.recorder, self.answer, self.arguments = recorder, answer, arguments
        self.bases: dict[Any, Tensor] = {}
        self.made: dict[int, Tensor] = {}

    def of(self, tree: Any) -> Any:
        """Returns `tree` with the twin of every tensor in it."""
        return flatten_result(tree, lambda _, t: self._twin(t))

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.made:
            value, memory = self.answer.outs[id(tensor)]
            with self.recorder.tape.paused(), torch._C.DisableTorchFunction(), torch.set_grad_enabled(memory.grad):
                twin = tensor.detach() if memory.storage is None else self._view(memory)
            self.made[id(tensor)] = twin
            self.recorder.values.stands_for(twin, value)
        return self.made[id(tensor)]

    def _view(self, memory: _Memory) -> Tensor:
        for theirs, own in zip(self.answer.lent, self.arguments, strict=True):
            if theirs.storage == memory.storage and own.dtype is memory.dtype and own.stride() == theirs.stride:
                return own.as_strided(memory.size, memory.stride, memory.offset - theirs.offset + own.storage_offset())
        alone = sum(other.storage == memory.storage for _, other in self.answer.outs.values()) == 1
        if alone and not memory.grad and memory.offset == 0:
            return self.recorder.fake.memo.empty(memory.size, memory.stride, memory.dtype)
        if memory.storage not in self.bases:
            self.bases[memory.storage] = torch.empty(memory.elements, dtype=memory.dtype, requires_grad=memory.grad)
        return self.bases[memory.storage].as_strided(memory.size, memory.stride, memory.offset)


def _each_tensor(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def note(_: Any, tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    flatten_result(tree, note)
    yield from found


def _objects(tree: Any) -> set[int]:
    """Returns the ids of items that are neither tensors nor walked into."""
    found: set[int] = set()
    flatten_result(tree, lambda _, t: t, lambda _, item: found.add(id(item)))
    return found


def _plain(tree: Any, known: set[int]) -> bool:
    """True for a nest of tensors and plain values, and of objects in `known`."""
    others: list[Any] = []
    flatten_result(tree, lambda _, t: t, lambda _, item: others.append(item))
    return all(isinstance(item, (*_BY_VALUE, slice)) or id(item) in known for item in others)


def _items(value: Any) -> Any:
    if type(value) is list:
        return list(value)
    return dict(value) if type(value) in (dict, OrderedDict) else None


def _unchanged(items: Any, before: Any) -> bool:
    if items is None or before is None:
        return items is before
    if len(items) != len(before):
        return False
    if isinstance(items, list):
        return all(a is b for a, b in zip(items, before, strict=True))
    return all(k in before and before[k] is v for k, v in items.items())


def _refill(container: Any, items: Any) -> Any:
    container.clear()
    container.extend(items) if isinstance(container, list) else container.update(items)
    return container
