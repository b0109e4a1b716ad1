"""A tensor that is kept in parts, and the steps between it and its parts, each with its gradient.

    part     whole, in parts → this rank's part         gradient: of the part → in parts
    parted   this rank's part → whole, in parts         gradient: in parts, or whole → of the part
    whole    whole, in parts → plain, on every rank     gradient: whole → in parts

Gradients of such tensors are in parts too. Each backward is made of these steps, so second derivatives are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from autotp.errors import AutoTPError
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import copy, gather, own
from autotp.rewrite.collectives.split import Dealing


class Kind(Dealing, Protocol):
    """How a tensor is in parts. Tensors of equal kinds have parts that belong together."""

    @property
    def comm(self) -> Comm:
        """The group whose ranks hold the parts."""

    def received(self, grad: Tensor) -> Tensor:
        """The part of a gradient that is not in such parts itself."""


class InParts(Tensor):
    """The base of tensors in parts. A class of them says which operators run on parts, and what messages call them.

    noun, option: "logits", "loss_parallel=True".
    """

    _local_tensor: Tensor
    _kind: Any
    noun: ClassVar[str]
    option: ClassVar[str]
    #: Another tensor has the same memory on one device.
    shares = False
    #: Plain tensors that have the same memory on one device, each with its version; all that share it have one list.
    handed: list[tuple[Tensor, int]] | None = None

    @classmethod
    def of(cls, local: Tensor, kind: Any) -> Self:
        """Returns the tensor of which this rank holds `local`, without a gradient."""
        raise NotImplementedError

    def enter(self) -> Tensor:
        """Returns the plain whole tensor for a region: its gradient is a summand on each rank. Collective."""
        return copy(self.gathered(), self._kind.comm)

    def gathered(self) -> Tensor:
        """Returns the plain whole tensor, differentiable. Collective."""
        with torch._C.DisableTorchFunctionSubclass():
            return whole(self)

    def again(self, local: Tensor, kind: Any) -> InParts:
        """The tensor of this class of which this rank holds `local`."""
        return parted(type(self), kind, local)

    def forget(self) -> None:
        """Forget what was made of the values that it had."""

    @classmethod
    def way(cls, func: Any) -> Callable[..., Any] | None:
        """Returns the way to run an operator on parts, None where there is none."""
        raise NotImplementedError


#: Where a tensor in parts keeps its part, with its history.
PART = "_autotp_rows"
#: Set on one of which something was made by its part.
USED = "_autotp_used"


def version_of(tensor: Tensor) -> int:
    """The version of a tensor's memory; changes of an inference tensor are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def check_views(x: InParts) -> None:
    """Refuse to read `x` where a tensor that has its memory on one device was changed in place.

    Raises:
        AutoTPError: one was.
    """
    if x.handed and any(version_of(view) != version for view, version in x.handed):
        n = x.noun
        raise AutoTPError(
            f"a tensor that was made of {n} in parts ({x.option}) was changed in place; on one device the {n} have changed "
            f"too, and here they have not: write `{n} = {n}.clone()` first, or change {n}.full_tensor()"
        )


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: InParts) -> Tensor:
        ctx.kind = type(x), x._kind
        local = x._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cls, kind = ctx.kind
        return parted(cls, kind, grad)


class Parted(torch.autograd.Function):
    """See `parted`."""

    @staticmethod
    def forward(ctx: Any, cls: type[InParts], kind: Any, local: Tensor) -> InParts:
        ctx.kind = kind
        return cls.of(local, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, part_of_gradient(grad, ctx.kind)


def part_of_gradient(grad: Tensor, kind: Any) -> Tensor:
    """This rank's part of the gradient of a tensor of this kind; the gradient may be in parts, or whole."""
    if isinstance(grad, InParts) and grad._kind == kind:
        return part(grad)
    return kind.received(grad)  # type: ignore[no-any-return]


def part(x: InParts) -> Tensor:
    """This rank's part of `x`."""
    if x.handed:
        check_views(x)
    held: Tensor | None = x.__dict__.get(PART)
    if not torch.is_grad_enabled() or (held is None and not x.requires_grad):
        return x._local_tensor
    x.__dict__[USED] = True
    if held is None:
        held = x.__dict__[PART] = _Part.apply(x)  # type: ignore[no-untyped-call]
    return held


def parted(cls: type[InParts], kind: Any, local: Tensor) -> InParts:
    """The tensor of which this rank holds `local`."""
    if local.requires_grad and torch.is_grad_enabled():
        return Parted.apply(cls, kind, local)  # type: ignore[no-any-return, no-untyped-call]
    return cls.of(local, kind)


def whole(x: InParts) -> Tensor:
    """`x` as a plain tensor on every rank. Collective."""
    return gather(part(x), x._kind)


def own_part(x: Tensor, kind: Any) -> Tensor:
    """This rank's part of a plain whole tensor."""
    return own(x, kind)
