"""Says what travels with a request from rank 0 to the others, and what each rank has of its own.

| value | travels |
|---|---|
| plain values, containers, objects (a `GenerationConfig`, a logits processor) | as a pickle |
| a tensor | by its numbers, to the device where the other rank has the model |
| a result of an earlier request (a tensor, a cache) | by its number: each rank takes its own, which may hold that rank's part |
| a cache that holds nothing yet | as a pickle once, by its number from then on |
| a streamer | not at all: rank 0 has it |
| a cache that holds something, a module, a DTensor, a float that was changed after an earlier request | not at all: refused |

Rank 0 remembers results weakly. When it lets go of one, the others do with the next request.
"""

from __future__ import annotations

import io
import pickle
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.errors import InputError, sentence


@dataclass(frozen=True, slots=True)
class _Own:
    """Stands for what each rank has under `number`. `length`: how far rank 0's cache is filled, None for what is no cache."""

    number: int
    length: int | None


@dataclass(frozen=True, slots=True)
class _New:
    """Carries a cache that all ranks have under `number` from now on."""

    number: int
    value: Any


class Kept:
    """Knows on one rank the results of earlier requests, and the caches that were sent, by numbers that are the same on all ranks."""

    def __init__(self, *, leads: bool) -> None:
        self._leads = leads
        self._next = self._last = 0
        self._numbers: dict[int, tuple[int, int]] = {}  # rank 0: the object's id → its number and version
        self._values: dict[int, Any] = {}  # other ranks: number → value
        self._gone: deque[tuple[int, int]] = deque()  # rank 0: ids and numbers, appended whenever an object goes, in any thread
        self._dropped: list[int] = []

    def keep(self, result: Any) -> None:
        """Number what `result` is made of. Every rank keeps the same things in the same order."""
        self._last = self._next
        for value in _leaves(result):
            self._keep(value)

    def _keep(self, value: Any) -> int:
        number = self._next
        self._next = number + 1
        if self._leads:
            self._numbers[id(value)] = number, value._version if isinstance(value, Tensor) else 0
            weakref.finalize(value, self._gone.append, (id(value), number)).atexit = False
        else:
            self._values[number] = value
        return number

    def begin(self) -> tuple[int, list[int]]:
        """Returns the next number, and those that rank 0 has let go of; comes before `out`, as other objects may have their ids by now."""
        while self._gone:
            key, number = self._gone.popleft()
            if self._numbers.get(key, (None,))[0] == number:
                del self._numbers[key]
            self._dropped.append(number)
        return self._next, list(self._dropped)

    def end(self, begun: int, told: list[int], *, failed: bool) -> None:
        """Forget on rank 0 what a request that failed has numbered, or that the others were told of numbers."""
        if failed:
            self._numbers = {key: known for key, known in self._numbers.items() if known[0] < begun}
        else:
            self._dropped = [n for n in self._dropped if n not in set(told)]

    def follow(self, begun: int, dropped: list[int]) -> None:
        """Go on as rank 0 does, on another rank. Where the last results were not as many as on rank 0, none of them is kept."""
        if self._next != begun:
            dropped = [*dropped, *range(self._last, self._next)]
        for number in dropped:
            self._values.pop(number, None)
        self._next = self._last = begun

    def skip(self) -> None:
        """A request failed, on another rank: it has no results."""
        self._last = self._next

    def out(self, value: Any, where: str) -> Any:
        """Returns what stands for a value of rank 0 in a message.

        Raises:
            InputError: it may not travel.
        """
        if isinstance(value, Tensor | nn.Module) or _is_cache(value):
            known = self._numbers.get(id(value))
            if known is not None and not (isinstance(value, Tensor) and value._version != known[1]):
                return _Own(known[0], _length(value))
            if known is not None and isinstance(value, Tensor) and value.is_floating_point():
                raise InputError(f"{where} is a result of an earlier request, and was changed on rank 0 alone: change a clone of it")
            _refuse(value, where)
            return _New(self._keep(value), value) if _is_cache(value) else value
        if type(value) is dict:
            return {k: self.out(v, f"{where}[{k!r}]") for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.out(v, f"{where}[{i}]") for i, v in enumerate(value))
        return value

    def back(self, value: Any) -> Any:
        """Returns this rank's value for what stands for one in a message.

        Raises:
            InputError: rank 0 changed its cache by itself.
        """
        if isinstance(value, _New):
            self._next = value.number
            self._keep(value.value)
            return value.value
        if isinstance(value, _Own):
            if value.number not in self._values:
                raise InputError("a result of an earlier request is not on every rank: its function returned something else there")
            own = self._values[value.number]
            if value.length != _length(own):
                raise InputError(
                    f"a cache holds {value.length} positions on rank 0 and {_length(own)} on another rank: it was changed on rank 0 alone. "
                    "Change it on all ranks, in a function that server.run calls"
                )
            return own
        if type(value) is dict:
            return {k: self.back(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.back, value))
        return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor) or _is_cache(value):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _leaves(v)


def _is_cache(value: Any) -> bool:
    caches = sys.modules.get("transformers.cache_utils")
    return caches is not None and isinstance(value, caches.Cache)


def _length(value: Any) -> int | None:
    return int(value.get_seq_length()) if _is_cache(value) else None


def _refuse(value: Any, where: str) -> None:
    if isinstance(value, nn.Module):
        raise InputError(
            f"{where} is a module ({type(value).__name__}), which a request cannot carry: make it on every rank, in server.run"
        )
    if isinstance(value, DTensor):
        raise InputError(f"{where} is a DTensor, of which every rank has its part: read it in a function that server.run calls")
    if _is_cache(value) and _length(value):
        raise InputError(
            f"{where} is a {type(value).__name__} that already holds rank 0's part of keys and values: give a new one, or one that a "
            "request of this server returned"
        )


def pack(value: Any, where: str) -> bytes:
    """Returns `value` as bytes; tensors of other devices are marked.

    Raises:
        InputError: something in it cannot be sent.
    """
    file = io.BytesIO()
    try:
        _Packer(file, pickle.HIGHEST_PROTOCOL).dump(value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error.__cause__
    except Exception as error:  # what a pickle refuses, it refuses in many ways
        raise InputError(
            f"{where} cannot be sent to the other ranks: {sentence(error)} Functions and classes must be importable by name there"
        ) from error
    return file.getvalue()


def unpack(data: bytes, device: torch.device) -> Any:
    """Returns what was packed; tensors that were not on the CPU lie on `device`."""
    return _Unpacker(io.BytesIO(data), device).load()


class _Packer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, nn.Module | DTensor):
            _refuse(obj, "an object in it")
        if not isinstance(obj, Tensor):
            return None
        file = io.BytesIO()
        torch.save(obj.detach().clone().cpu(), file)
        return obj.device.type != "cpu", obj.requires_grad, file.getvalue()


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self._device = device

    def persistent_load(self, pid: Any) -> Tensor:
        moved, grad, data = pid
        tensor: Tensor = torch.load(io.BytesIO(data), weights_only=True)
        return tensor.to(self._device if moved else "cpu").requires_grad_(grad)
