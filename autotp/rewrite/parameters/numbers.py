"""Defines how tensors that are laid out over ranks act for code outside of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autotp.errors import AutoTPError
from autotp.rewrite.parameters.laying import Local, Whole
from autotp.rewrite.transforms import refuse_transforms


class Numbers(DTensor):
    """A DTensor whose numbers, outside of torch, are those of the whole tensor. Reading them is collective.

    operate: runs an operator on tensors that are laid out over ranks. As it makes such tensors itself, their classes cannot name it: the
        package puts it here, before anyone can import this module.
    """

    operate: ClassVar[Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]]

    def _whole(self) -> Tensor:
        """The plain whole tensor; the local tensor itself where every rank holds all. Collective."""
        raise NotImplementedError

    def _laid(self, whole: Tensor) -> Tensor:
        """A gradient, plain and whole on every rank, laid out as this is."""
        raise NotImplementedError

    def _of_local(self, local: Tensor) -> Tensor:
        """The tensor, laid out as this is, of which every rank has `local`."""
        raise NotImplementedError

    def _told(self) -> str:
        """What this is, for errors."""
        raise NotImplementedError

    def full_tensor(self, *, grad_placements: Sequence[Any] | None = None) -> Tensor:
        """Returns the whole tensor in the model's order and shape, differentiable. Collective."""
        if grad_placements is not None:
            raise AutoTPError(f"full_tensor(grad_placements=…) of {self._told()} takes gradients that are whole only")
        refuse_transforms()
        return Whole.apply(self)  # type: ignore[no-any-return, no-untyped-call]

    def to_local(self, *, grad_placements: Sequence[Any] | None = None) -> Tensor:
        """Returns this rank's part, differentiable."""
        if grad_placements is None and not self.is_leaf and torch.is_grad_enabled():
            return Local.apply(self)  # type: ignore[no-any-return, no-untyped-call]
        return super().to_local(grad_placements=grad_placements)

    def redistribute(self, device_mesh: Any = None, placements: Sequence[Any] | None = None, **options: Any) -> DTensor:
        """Returns the whole tensor in the model's order and shape for `Replicate`. Collective.

        Raises:
            AutoTPError: for other placements than its own and `Replicate`.
        """
        wanted = tuple(placements or ())
        if wanted == tuple(self._spec.placements):
            return self
        if device_mesh not in (None, self._spec.mesh) or not all(p.is_replicate() for p in wanted) or not wanted:
            raise AutoTPError(f"{self._told()} can be made whole, not placed as {wanted}")
        return DTensor.from_local(self.full_tensor(), self._spec.mesh, wanted, run_check=False)

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
