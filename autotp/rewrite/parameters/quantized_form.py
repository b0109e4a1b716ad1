"""Cuts a quantized weight: the numbers, scales and zero points of a rank are slices of those of the whole.

A torchao weight of shape ``(N, K)`` is made of plain *inner* tensors: integers (or 8-bit floats) of that shape, and scales and zero
points with one entry for each *block* of them, of shape ``(N / n, K / k)``. A cut along a dim goes through all of them:

    the block covers the dim (``k = K``: one scale a row)    every rank keeps the scale
    a rank's runs end where blocks end                       scales are cut as the numbers are
    a run ends inside of a block                             blocks become smaller, by whole factors, and repeat the scale

So a rank computes with the very numbers of the whole, and its blocks are never of two ranks. Padding stands for zero: its numbers are
the zero point.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, NoReturn

import torch
from torch import Tensor

from autotp.errors import AutoTPError
from autotp.plan.layout import Interval, Layout, take

#: torchao's classes whose numbers, scales and zero points lie as said above; others are packed for a kernel.
CLASSES = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
#: Blocks that would become smaller than this hold more scales than numbers.
LEAST_BLOCK = 8
_DATA, _ZERO = "qdata", "zero_point"
#: Of activations, not of the weight: one number for all of them, or one for each input channel.
_OF_ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale")


def is_quantized(tensor: object) -> bool:
    """True for a weight that torchao quantized; torchao is not imported for the question."""
    utils = sys.modules.get("torchao.utils")
    return utils is not None and isinstance(tensor, utils.TorchAOBaseTensor)


def refuse_quantized(module: str, name: str) -> NoReturn:
    """Refuse a quantized weight that someone puts into a parallel module.

    Raises:
        AutoTPError: always.
    """
    raise AutoTPError(
        f"{name} of a parallel {module} is to become a quantized weight (torchao.quantization.quantize_), of which no part is known: call "
        "autotp.quantize_(model, config), or quantize before parallelize"
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's part of an inner tensor: `runs` of dim `dim` of the tensor with each entry repeated; None: all of it."""

    dim: int | None = None
    runs: tuple[Interval, ...] = ()
    repeat: int = 1

    def of(self, inner: Tensor) -> Tensor:
        """Returns the part of `inner`, in memory of its own."""
        if self.dim is None:
            return inner.clone()
        return take(_repeated(inner, self.dim, self.repeat), self.dim, self.runs).clone(memory_format=torch.contiguous_format)

    def read(self, box: Callable[[tuple[Interval, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
        """Returns the part of an inner tensor of `shape` that `box` reads boxes of: no more than this rank needs, run by run."""
        whole = [(0, n) for n in shape]
        if self.dim is None:
            return box(tuple(whole)).clone()
        parts: list[Tensor] = []
        for a, b in self.runs:
            if a < 0:
                parts.append(torch.zeros(()).expand([b - a if i == self.dim else n for i, n in enumerate(shape)]))
                continue
            lo, hi = a // self.repeat, -(-b // self.repeat)
            found = _repeated(box((*whole[: self.dim], (lo, hi), *whole[self.dim + 1 :])), self.dim, self.repeat)
            parts.append(found.narrow(self.dim, a - lo * self.repeat, b - a))
        dtype = next(p.dtype for p, (a, _) in zip(parts, self.runs, strict=True) if a >= 0) if any(a >= 0 for a, _ in self.runs) else None
        return torch.cat([p.to(dtype) if dtype is not None else p for p in parts], self.dim).contiguous()


@dataclass(frozen=True)
class Form:
    """A quantized weight without its entries: torchao's class, the shapes and dtypes of its inner tensors, its other attributes."""

    kind: Any
    inner: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    attributes: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Any, name: str) -> Form:
        """Returns the form of a weight, whose parameter is called `name`.

        Raises:
            AutoTPError: it is packed for a kernel, so that it has no slices.
        """
        names, attributes = tensor.__tensor_flatten__()
        inner = {n: (tuple(getattr(tensor, n).shape), getattr(tensor, n).dtype) for n in names}
        return cls.made(type(tensor), inner, attributes, tuple(tensor.shape), tensor.dtype, name)

    @classmethod
    def made(
        cls,
        kind: Any,
        inner: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        attributes: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        name: str,
    ) -> Form:
        """Returns the form of these parts; see `of`."""
        if kind.__name__ not in CLASSES or inner[_DATA][0] != shape:
            raise AutoTPError(
                f"{name} is a {kind.__name__} of torchao, which is packed for its kernel: no rank can hold a slice of it. Quantize the "
                f"parallel model with a config that gives one of {', '.join(CLASSES)} (for 4 bits: IntxWeightOnlyConfig(torch.int4, "
                "PerGroup(32))), or load the weights that are not quantized"
            )
        return cls(kind, dict(inner), dict(attributes), shape, dtype)

    @property
    def quantizes_activations(self) -> bool:
        """True where the input is quantized too, by numbers that are found in each call."""
        found = self.attributes.get("act_quant_kwargs") or self.attributes.get("activation_quantization")
        return found is not None and "act_quant_scale" not in self.inner

    @property
    def nbytes(self) -> int:
        """Bytes of the whole weight."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.inner.values())

    def cuts(self, layout: Layout, rank: int, name: str) -> dict[str, Cut]:
        """Returns how each inner tensor is cut for `rank`.

        Raises:
            AutoTPError: blocks would become too small; names the parameter `name`.
        """
        return {n: self._cut(n, layout, rank, name) for n in self.inner}

    def _cut(self, inner: str, layout: Layout, rank: int, name: str) -> Cut:
        dim, shape = layout.dim, self.inner[inner][0]
        if dim is None:
            return Cut()
        whole = layout.shape[dim]
        if inner in _OF_ACTIVATIONS:
            if torch.Size(shape).numel() == 1 or dim != len(self.shape) - 1:
                return Cut()
            if shape[-1] == whole:
                return Cut(len(shape) - 1, layout.runs(rank))
        if len(shape) == len(self.shape):
            extent = shape[dim]
            if extent == whole:
                return Cut(dim, layout.runs(rank))
            if extent == 1:
                return Cut()
            if whole % extent == 0:
                block = whole // extent
                own = _aligned(layout, block)
                if own < min(block, LEAST_BLOCK) or (own < block and not self._may_shrink):
                    raise AutoTPError(
                        f"{name}, a {self.kind.__name__}, has blocks of {block} along its dim {dim} of {whole}, and {layout.tp} ranks cut "
                        f"it inside of blocks ({layout}): choose a group_size that divides each rank's {layout.local_shape[dim]} entries "
                        f"or one scale a row (PerRow, PerAxis(0)), keep the weight as it is (filter_fn), or give parallelize a recipe with "
                        f"`granules` of {block}"
                    )
                return Cut(dim, tuple((a // own, b // own) for a, b in layout.runs(rank)), block // own)
        raise AutoTPError(
            f"{name}, a {self.kind.__name__} of shape {self.shape}, has {inner} of shape {shape}, which no rule cuts along dim {dim}: keep "
            "the weight as it is (filter_fn)"
        )

    @property
    def _may_shrink(self) -> bool:
        """True where any size of blocks computes alike; kernels for 8-bit floats know certain sizes only."""
        return self.kind.__name__ != "Float8Tensor" or self.attributes.get("act_quant_kwargs") is None

    def local(self, layout: Layout, rank: int, name: str, part: Callable[[str, Cut], Tensor]) -> Tensor:
        """Returns the weight of `rank`, whose inner tensors `part` gives by name and cut."""
        inner = {n: part(n, cut) for n, cut in self.cuts(layout, rank, name).items()}
        inner = {n: t.to(self.inner[n][1]) for n, t in inner.items()}
        if layout.dim is not None and _ZERO in inner:
            _clear(inner[_DATA], inner[_ZERO], layout.dim, layout.padding(rank))
        return self._built(inner, layout.local_shape)

    def _built(self, inner: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        attributes = dict(self.attributes)
        if "block_size" in attributes and len(attributes["block_size"]) == len(shape):
            scale = inner["scale"]
            sizes = [n // m for n, m in zip(shape, scale.shape, strict=True)]
            attributes["block_size"] = type(attributes["block_size"])(sizes)
        made: Tensor = self.kind.__tensor_unflatten__(dict(inner), attributes, None, None)
        return made

    def cut(self, tensor: Any, layout: Layout, rank: int, name: str) -> Tensor:
        """Returns the part of `rank` of the whole weight `tensor`."""
        return self.local(layout, rank, name, lambda inner, cut: cut.of(getattr(tensor, inner)))

    def whole(self, local: Any, layout: Layout, gather: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        """Returns the whole weight, of which `local` is this rank's; `gather` gives the tensors of all ranks."""
        inner: dict[str, Tensor] = {}
        for name, (shape, _) in self.inner.items():
            own = getattr(local, name)
            cuts = [self._cut(name, layout, rank, "the weight") for rank in range(layout.tp)]
            dim = cuts[0].dim
            inner[name] = own.clone() if dim is None else _joined(_gathered(own, gather), shape, dim, cuts)
        return self._built(inner, self.shape)


def _repeated(inner: Tensor, dim: int, times: int) -> Tensor:
    return inner if times == 1 else _as_bytes(inner, lambda t: t.repeat_interleave(times, dim))


def _as_bytes(tensor: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs `work`, which moves entries, on a tensor of a dtype that few operators know."""
    return work(tensor.view(torch.uint8)).view(tensor.dtype) if tensor.dtype.itemsize == 1 else work(tensor)


def _gathered(own: Tensor, gather: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    if own.dtype.itemsize != 1:
        return list(gather(own.contiguous()))
    return [t.view(own.dtype) for t in gather(own.contiguous().view(torch.uint8))]


def _joined(parts: Sequence[Tensor], shape: tuple[int, ...], dim: int, cuts: Sequence[Cut]) -> Tensor:
    repeat = cuts[0].repeat
    full = parts[0].new_empty([n * repeat if i == dim else n for i, n in enumerate(shape)])
    for part, cut in zip(parts, cuts, strict=True):
        at = 0
        for a, b in cut.runs:
            if a >= 0:
                full.narrow(dim, a, b - a).copy_(part.narrow(dim, at, b - a))
            at += b - a
    return full if repeat == 1 else full.narrow(dim, 0, full.shape[dim])[(*[slice(None)] * dim, slice(None, None, repeat))].contiguous()


def _clear(data: Tensor, zero: Tensor, dim: int, padding: Sequence[Interval]) -> None:
    """Writes the zero points to the numbers that are padding, so that they stand for zero."""
    if not padding or not bool(zero.any()):
        return
    for i, (n, m) in enumerate(zip(data.shape, zero.shape, strict=True)):
        zero = zero.repeat_interleave(n // m, i)
    for a, b in padding:
        data.narrow(dim, a, b - a).copy_(zero.narrow(dim, a, b - a))


@lru_cache(maxsize=1024)
def _aligned(layout: Layout, block: int) -> int:
    """Returns the largest divisor of `block` at whose multiples every rank's runs begin and end, in the whole and in its part."""
    for edge in _edges(layout):
        block = gcd(block, edge)
    return block


def _edges(layout: Layout) -> Iterator[int]:
    for rank in range(layout.tp):
        at = 0
        for a, b in layout.runs(rank):
            yield from (at, a, b)
            at += b - a
        yield at
