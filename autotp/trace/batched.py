"""Records calls of `torch.vmap` over activations: nothing inside is seen, so all that goes in stays whole, and what comes out is new.

Inside of a vmap the tensors are wrappers, which cannot be told apart. The operators there are run, and not recorded: each tensor of the
model that they use is noted as one that escapes. A vmap of constants alone, as transformers makes masks with, gives constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import apis
from torch.utils._pytree import tree_leaves

from autotp.trace.graph import Origin, Pseudo, Value
from autotp.trace.tape import Tape
from autotp.trace.values import Values

_apis: Any = apis


class Batches:
    """The calls of vmap of one recorder. `used`: the activations that the one that runs has used so far; None outside of any."""

    def __init__(self, tape: Tape, values: Values) -> None:
        self.used: dict[int, Value] | None = None
        self._tape, self._values = tape, values

    def take(self, value: Value, written: bool) -> None:
        """Notes that an operator inside of a transform of torch.func uses an activation.

        Raises:
            RuntimeError: the transform is no vmap, or the operator writes into it.
        """
        if self.used is None:
            raise RuntimeError("a transform of torch.func over activations, other than vmap, cannot be traced")
        if written:
            raise RuntimeError("a vmap that writes into activations cannot be traced")
        self.used[value.id] = value

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, calls of vmap are recorded."""
        run = _apis.vmap_impl

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._tape.quiet or self.used is not None or torch._C._are_functorch_transforms_active():
                return run(*args, **kwargs)
            self.used = {}
            try:
                result = run(*args, **kwargs)
                used = tuple(self.used.values())
            finally:
                self.used = None
            return self._made(used, result) if used else result

        _apis.vmap_impl = recorded
        try:
            yield
        finally:
            _apis.vmap_impl = run

    def _made(self, used: tuple[Value, ...], result: Any) -> Any:
        """Notes the results of a vmap that used activations."""
        tensors = {id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)}
        outputs = tuple(self._values.bind(t, Origin.NODE) for t in tensors.values())
        self._tape.add(Pseudo.BATCHED, used, {}, outputs)
        return result
