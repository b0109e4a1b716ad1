"""Hands operators on the PreDispatch key straight to the mode that records them.

torch finds the mode of that key anew in each call of an operator, and flattens the arguments before it calls the mode. In a trace that
costs as much as a remembered result. An operator that the mode has met is handed to it by an entry in the operator's own table of
kernels instead, which is taken out again when the recording ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload, mode_stack_state_for_pre_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

_KEY = DispatchKey.PreDispatch


class Direct:
    """The entries for one mode. `record(operator, args, kwargs)`: what the mode does with a call."""

    def __init__(self, mode: TorchDispatchMode, record: Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self._mode, self._record = mode, record
        self._met: dict[OpOverload, Callable[..., Any]] = {}
        self._on = False

    @contextmanager
    def handing(self) -> Iterator[None]:
        """Hands operators over inside."""
        self._on = True
        for func, entry in self._met.items():
            func._dispatch_cache.setdefault(_KEY, entry)
        try:
            yield
        finally:
            self._on = False
            for func, entry in self._met.items():
                if func._dispatch_cache.get(_KEY) is entry:
                    del func._dispatch_cache[_KEY]

    def met(self, func: Any) -> None:
        """Notes that the mode was called with `func`: the next calls come straight from the dispatcher."""
        if self._on and type(func) is OpOverload and func not in self._met:
            self._met[func] = entry = partial(self._call, func)
            func._dispatch_cache.setdefault(_KEY, entry)

    def _call(self, func: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        stack = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
        if stack._schema_check_mode is not self._mode or torch._C._dispatch_tls_is_dispatch_key_excluded(DispatchKey.Python):
            return self._usual(func, args, kwargs)
        stack._schema_check_mode = None
        torch._C._dispatch_tls_set_dispatch_key_included(_KEY, False)
        try:
            return self._record(func, args, kwargs)
        finally:
            stack._schema_check_mode = self._mode
            torch._C._dispatch_tls_set_dispatch_key_included(_KEY, True)

    def _usual(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns what torch makes of the call."""
        entry = func._dispatch_cache.pop(_KEY)
        try:
            kernel = func._get_dispatch(_KEY)
        finally:
            func._dispatch_cache[_KEY] = entry
        return func._op_dk(kernel, *args, **kwargs) if isinstance(kernel, DispatchKey) else kernel(*args, **kwargs)
