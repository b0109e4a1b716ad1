"""Refuses calls of a served model past its server: their collectives would meet those of another request."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.errors import AutoTPError, InputError
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor

_METHODS = ("all_reduce_", "all_gather", "all_gather_rows", "reduce_scatter", "all_to_all", "broadcast_")
_NOBODY, _NEXT = 0, -1


class Guard:
    """Lets one thread at a time run collectives of a model, and none between requests. In place from the start to `remove`."""

    def __init__(self, comm: GroupComm, parameters: Iterable[Tensor]) -> None:
        if _METHODS[0] in vars(comm):
            raise InputError("the model is served already: leave the other `with autotp.serve(model)` first")
        self._comm, self._owner, self._more = comm, _NOBODY, _NOBODY
        self._parameters = [p for p in parameters if isinstance(p, LayoutDTensor)]
        self.watch(comm)
        for p in self._parameters:
            p.guarded_by = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return self

    def watch(self, comm: GroupComm) -> None:
        """Have a group's collectives ask this guard."""
        comm.ask = self.ask  # type: ignore[method-assign]
        for name in _METHODS:
            setattr(comm, name, functools.partial(self._checked, getattr(comm, name)))

    def remove(self) -> None:
        """Let everybody call the model again."""
        for name in ("ask", *_METHODS):
            vars(self._comm).pop(name, None)
        for p in self._parameters:
            p.guarded_by = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lets this thread call the model."""
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = self._more = _NOBODY

    def hand_over(self) -> None:
        """Lets the next other thread that calls the model do so, as long as this request runs."""
        self._more = _NEXT

    def _checked(self, collective: Callable[..., Any], tensor: Tensor, *counts: Any) -> Any:
        if not is_dynamo_compiling():
            self.ask()
        return collective(tensor, *counts)

    def ask(self) -> None:
        """Raise where this thread has no request."""
        own = threading.get_ident()
        if self._more == _NEXT and own != self._owner:
            self._more = own
        if own not in (self._owner, self._more):
            raise AutoTPError(
                "the model is served, and was used past its server: the other ranks carry out requests, one at a time. Call server(…) or "
                "server.generate(…); what reads or changes weights (full_tensor, full_state_dict, quantize_, adapters) goes into a "
                "function for server.run(function, …)"
            )
