"""Maps tensors to their `Value`, and stores the numbers that are known of them.

A tensor is one value until it is written in place. From then on it is another one, and so are its aliases. Small integer and
constant tensors are computed for real beside the fake run, so that branches on masks and positions go the way they go for the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from autotp.trace.fills import filled
from autotp.trace.graph import Node, Origin, Value
from autotp.trace.storage import storage_of
from autotp.trace.tape import Tape

SMALL = 65536


def _references(tensors: dict[int, Tensor], key: int) -> tuple[int, int]:
    """Counts the references to a tensor in a dict: Python's, and those of torch to what is behind it."""
    tensor = tensors[key]
    return getrefcount(tensor), tensor._use_count()  # type: ignore[attr-defined]


def _of_two_dicts() -> tuple[int, int]:
    """Returns the references to a tensor that two dicts hold and nobody else, as this version of Python counts them."""
    first, second = {0: torch.empty(())}, {}
    second[0] = first[0]
    return _references(second, 0)


_UNHELD = _of_two_dicts()


def small(tensor: Tensor) -> bool:
    """True for tensors that are kept as real numbers beside their fake."""
    return tensor.numel() <= SMALL and not isinstance(tensor, FakeTensor)


class Copies:
    """Makes copies of real tensors that operators may write into: those of the model and of its caller are not touched.

    Tensors that share memory still do so in their copies.
    """

    def __init__(self) -> None:
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Returns a copy of `tensor` on the CPU."""
        with unset_fake_temporarily(), torch.no_grad():
            tensor = tensor.detach()
            plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
            if not plain or tensor.is_conj() or tensor.is_neg() or tensor.untyped_storage().nbytes() > 16 * SMALL:
                return tensor.cpu().clone()
            key = tensor.untyped_storage()._cdata
            if key not in self._storages:
                self._storages[key] = tensor, tensor.new_empty(0, dtype=torch.uint8).set_(tensor.untyped_storage().clone())  # type: ignore[no-untyped-call]
            _, copied = self._storages[key]
            return tensor.new_empty(0).set_(copied.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Values:
    """The table of one recorder.

    It calls `read(tensor, value)` when code uses a parameter, and `missed(tensor)` when code uses a tensor never seen before.
    """

    def __init__(self, tape: Tape, read: Callable[[Tensor, Value], None], missed: Callable[[Tensor], None]) -> None:
        self.params: dict[str, Value] = {}
        self.buffers: dict[str, Value] = {}
        self.fills: dict[int, float] = {}  # value id → the one number that it is filled with
        self.concrete: dict[int, Tensor] = {}  # value id → real tensor
        self.drawn: dict[int, Tensor] = {}  # value id → numbers chosen for this run, which say nothing of other runs
        self._tape, self._read, self._missed = tape, read, missed
        self._of: dict[int, Value] = {}  # id(tensor) → value
        self._before: list[tuple[int, int, Value | None]] = []  # (number of nodes, id(tensor), its value) before each change of `_of`
        self._lent: dict[int, tuple[Value, Value]] = {}  # id of the model's own tensor → its value, and that of the result that it is
        self._alive: dict[int, Tensor] = {}  # by id: no id is used twice
        self._aliases: dict[int, dict[int, Tensor]] = {}  # storage → the tensors in it that code may still read, by id
        self._copies = Copies()
        self._count = 0

    # which value --------------------------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Value:
        """Returns the current value of `tensor`; a tensor never seen before is a constant."""
        known = self._of.get(id(tensor))
        if known is not None:
            if known.origin is Origin.PARAM:
                self._read(tensor, known)
            return known
        self._missed(tensor)
        value = self.bind(tensor, Origin.CONST)
        real = tensor.constant if isinstance(tensor, FakeTensor) else tensor
        if real is not None and real.device.type != "meta" and small(real):
            self.know(value, real)
        return value

    def known(self, item: Any) -> Value | None:
        """Returns the value of `item`, where it is a tensor that has one, without calling `read` or `missed`."""
        return self._of.get(id(item))

    def bind(self, tensor: Tensor, origin: Origin, name: str = "") -> Value:
        """Makes a new value for `tensor` (a tensor that was written in place gets a fresh one each time)."""
        value = self._new(tuple(tensor.shape), tensor.dtype, origin, name)
        self.stands_for(tensor, value)
        return value

    def stands_for(self, tensor: Tensor, value: Value) -> None:
        """Notes that `tensor` is another object for `value`."""
        self._set(tensor, value)
        self._alive[id(tensor)] = tensor
        if isinstance(tensor, FakeTensor):
            self._aliases.setdefault(storage_of(tensor), {})[id(tensor)] = tensor

    def made(self, tensor: Tensor, written: bool) -> Value:
        """Makes the value of a result. An operator may return its argument (a `to` that changes nothing), such as a parameter.

        That is then the result for the rest of the call, and itself again in the next one: see `renew`.
        """
        before = None if written else self._of.get(id(tensor))
        value = self.bind(tensor, Origin.NODE)
        if before is not None:
            own, last = self._lent.get(id(tensor), (before, before))
            if last is before and own.origin in (Origin.PARAM, Origin.BUFFER):
                self._lent[id(tensor)] = own, value
        return value

    def renew(self) -> None:
        """Let the model's own tensors that operators returned be themselves again, but for those that were written since."""
        for key, (own, last) in self._lent.items():
            if self._of.get(key) is last:
                self._of[key] = own
        self._lent.clear()

    def adopt(self, tensor: Tensor, node: Node) -> None:
        """Notes the result of a factory function, which is another Python object than the dispatcher's: it stands for the same value."""
        if len(node.outputs) == 1 and node.outputs[0].shape == tuple(tensor.shape):
            self.stands_for(tensor, node.outputs[0])

    def shows(self, shown: Tensor, name: str) -> None:
        """Notes that an attribute gives `shown` for the parameter `name`."""
        self._set(shown, self.params[name])
        self._alive[id(shown)] = shown

    def written(self, target: Tensor, new: Value) -> Iterator[tuple[Value, Value]]:
        """`target` was changed in place and is `new`: (value before, value after) of every alias of its storage, one after the other.

        Each is noted before the next one is looked at. An alias that nobody else holds is left out from now on: a loop that fills a
        tensor row by row makes a view of each row, and would otherwise give all rows before it a new value at each step.
        """
        self.fills.pop(new.id, None)
        if self._of.get(id(target)) is not new:
            self._set(target, new)
        if not isinstance(target, FakeTensor):
            return
        aliases = self._aliases.get(storage_of(target), {})
        for key in [*aliases]:
            if aliases[key] is not target and _references(aliases, key) == _UNHELD:  # by `_alive` and `_aliases` alone
                del aliases[key]
                continue
            alias = aliases[key]
            if alias is target:
                continue
            before = self.of(alias)
            if before.origin in (Origin.PARAM,):
                continue
            exact = self.concrete.get(before.id) if new.id in self.concrete else None
            after = self._new(before.shape, before.dtype, Origin.NODE)
            self._set(alias, after)
            if exact is not None:
                self.concrete[after.id] = exact
            if before.id in self.drawn and new.id in self.drawn:
                self.drawn[after.id] = self.drawn[before.id]
            yield before, after

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, origin: Origin, name: str = "") -> Value:
        value = Value(self._count, shape, dtype, origin, name)
        self._count += 1
        return value

    def _set(self, tensor: Tensor, value: Value) -> None:
        if value.origin not in (Origin.PARAM, Origin.BUFFER):  # those stay whatever is rewound
            self._before.append((len(self._tape.nodes), id(tensor), self._of.get(id(tensor))))
        self._of[id(tensor)] = value

    def rewind(self, mark: int) -> None:
        """Forget the values that the nodes after the first `mark` ones made.

        An operator may return its argument (a `to` that changes nothing): a buffer is then itself again.
        """
        while self._before and self._before[-1][0] >= mark:
            _, key, value = self._before.pop()
            if value is None:
                del self._of[key]
            else:
                self._of[key] = value

    # which numbers ------------------------------------------------------------------------------------------------------------

    def know(self, value: Value, real: Tensor) -> None:
        """Notes that the numbers of `value` are those of `real`, of which a copy is kept: operators may write into it."""
        with self._tape.paused():
            self.concrete[value.id] = self._copies.of(real)

    def real_of(self, tensor: Tensor) -> Tensor | None:
        """Returns the numbers of `tensor`, those that are chosen too; None where there are none."""
        value = self.of(tensor)
        found = self.concrete.get(value.id)
        return self.drawn.get(value.id) if found is None else found

    def is_drawn(self, tensor: Tensor) -> bool:
        """Returns whether the numbers of `tensor` are only chosen."""
        value = self.of(tensor)
        return value.id in self.drawn and value.id not in self.concrete

    def taint(self, tensor: Tensor) -> None:
        """Notes that chosen numbers are written into `tensor`: what shares its memory is no longer known, but chosen."""
        held = self.concrete.get(self.of(tensor).id)
        if held is not None:
            storage = storage_of(held)
            for key in [k for k, t in self.concrete.items() if storage_of(t) == storage]:
                self.drawn[key] = self.concrete.pop(key)

    def alike(self, before: Value, after: Value) -> None:
        """Copies the facts known of the numbers of `before` to `after`."""
        if before.id in self.concrete:
            self.concrete[after.id] = self.concrete[before.id]
        if before.id in self.fills:
            self.fills[after.id] = self.fills[before.id]

    def forget(self, tensor: Tensor) -> None:
        """Notes that `tensor` is overwritten with unknown data: it and its aliases are no longer known."""
        for numbers in (self.concrete, self.drawn):
            gone = numbers.pop(self.of(tensor).id, None)
            if gone is not None:
                storage = storage_of(gone)
                for key in [k for k, t in numbers.items() if storage_of(t) == storage]:
                    del numbers[key]

    def note_fill(self, node: Node) -> None:
        """Note the number that the results of `node` are filled with, if it is one."""
        number = filled(node, self.fills)
        if number is not None:
            for out in node.outputs:
                self.fills[out.id] = number
