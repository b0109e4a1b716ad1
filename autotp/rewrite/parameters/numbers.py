"""Defines how tensors that are laid out over ranks act for code outside of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch.distributed.tensor import DTensor

from autotp.errors import AutoTPError


class Numbers(DTensor):
    """A DTensor whose numbers, outside of torch, are those of the whole tensor. Reading them is collective.

    operate: runs an operator on tensors that are laid out over ranks. As it makes such tensors itself, their classes cannot name it: the
        package puts it here, before anyone can import this module.
    """

    operate: ClassVar[Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]]

    def numpy(self, *, force: bool = False) -> Any:
        """Returns the whole tensor as an array. One that was put together is read-only: a write to it would reach no part."""
        whole = self.full_tensor()
        array = whole.numpy(force=force)
        if not all(p.is_replicate() for p in self._spec.placements):
            array.flags.writeable = False
        return array

    def __dlpack__(self, **options: Any) -> Any:
        raise AutoTPError("a tensor that is laid out over ranks has no memory of its own to be shared: share that of full_tensor()")

    def data_ptr(self) -> int:
        """Returns the address of a parameter's part on this rank, by which accelerate tells parameters apart.

        It is 0 for any other tensor, as for every DTensor: torch takes it as the sign that a tensor has no memory to be copied from.
        """
        return self._local_tensor.data_ptr() if getattr(self, "_is_param", False) else 0

    def share_memory_(self) -> Numbers:
        """Moves this rank's part to shared memory."""
        self._local_tensor.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """True where this rank's part is in shared memory."""
        return bool(self._local_tensor.is_shared())  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        """Returns the whole tensor as nested lists."""
        return self.full_tensor().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else super().__format__(spec)  # type: ignore[no-untyped-call]
