"""Computes a part of a deferred tensor from parts of its sources.

A *box* is an interval for each dim. A box of a result is pulled back through the operators,

    fill(op(x), box, out)  =  fill(x, pullback(op, box), view of out)

down to the boxes of the sources; no other entries are read. `pullback` is exact for operators that move entries: views, slices,
permutations, concatenation, splits. For operators that compute entry by entry the box stays itself. For all others the whole
operands are read, the operator runs, and the box is cut out of its result. So the result always equals that of torch on whole
tensors; the rules here decide only how much is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from autotp.checkpoint.nodes import Box, Memory, Node, Op, Read, overlay, sizes, whole_box

aten = torch.ops.aten


def value(node: Node, box: Box, read: Read, *, device: torch.device | str = "cpu") -> Tensor:
    """Returns the entries of `box`, in a tensor of their own."""
    out = torch.empty(sizes(box), dtype=node.dtype, device=device)
    fill(node, box, out, read)
    return out


def moves_only(node: Node) -> bool:
    """True where no operator computes with entries: they are moved, and cast."""
    return not isinstance(node, Op) or (node.func in _RULES and all(map(moves_only, node.operands())))


def fill(node: Node, box: Box, out: Tensor, read: Read) -> None:
    """Put the entries of `box` into `out` (of the box's shape; it may be a view, and on any device)."""
    if not out.numel():
        return
    if isinstance(node, Memory):
        out.copy_(_cut(node.tensor, box))
        return
    if not isinstance(node, Op):
        out.copy_(read(node, box))
        return
    if out.dtype != node.dtype:  # rounded to the node's dtype first
        out.copy_(value(node, box, read, device=out.device))
        return
    rule = _RULES.get(node.func)
    if rule is not None:
        rule(node, box, out, read)
    elif node.func is overlay and not node.args[2]:
        fill(node.args[1], box, out, read)
    elif node.func is not overlay and torch.Tag.pointwise in node.func.tags and node.index is None:
        _pointwise(node, box, out, read)
    else:
        _computed(node, box, out, read)


def _computed(node: Op, box: Box, out: Tensor, read: Read) -> None:
    """Runs the operator on whole operands."""

    def whole(x: Node) -> Tensor:
        return value(x, whole_box(x.shape), read, device=out.device)

    args, kwargs = tree_map_only(Node, whole, (node.args, dict(node.kwargs)))
    if "device" in kwargs:
        kwargs["device"] = out.device
    result = node.func(*args, **kwargs)
    out.copy_(_cut(result if node.index is None else result[node.index], box))


def _pointwise(node: Op, box: Box, out: Tensor, read: Read) -> None:
    """Runs the operator on the part of each operand that meets the box."""

    def part(x: Node) -> Tensor:
        inner = box[len(box) - len(x.shape) :]
        return value(x, tuple((0, 1) if n == 1 else i for n, i in zip(x.shape, inner, strict=True)), read, device=out.device)

    args, kwargs = tree_map_only(Node, part, (node.args, dict(node.kwargs)))
    out.copy_(node.func(*args, **kwargs))


def _cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(a, b) for a, b in box)]


def _same(node: Op, box: Box, out: Tensor, read: Read) -> None:
    fill(node.args[0], box, out, read)


def _cast(node: Op, box: Box, out: Tensor, read: Read) -> None:
    x = node.args[0]
    if isinstance(x, Op) and x.dtype != node.dtype:
        out.copy_(value(x, box, read, device=out.device))
    else:
        fill(x, box, out, read)  # a source is cast by the copy


def _permuted(node: Op, box: Box, out: Tensor, read: Read) -> None:
    x, ndim = node.args[0], len(node.shape)
    order = list(range(ndim))
    if node.func is aten.permute.default:
        order = [d % ndim for d in node.args[1]]
    elif ndim > 1:
        a, b = node.args[1:] if node.func is aten.transpose.int else (0, 1)
        order[a], order[b] = order[b], order[a]
    inverse = [order.index(d) for d in range(ndim)]
    fill(x, tuple(box[d] for d in inverse), out.permute(inverse), read)


def _sliced(node: Op, box: Box, out: Tensor, read: Read) -> None:
    x = node.args[0]
    given = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False)) | dict(node.kwargs)
    dim = given.get("dim", 0) % len(x.shape)
    start, _, step = slice(given.get("start"), given.get("end"), given.get("step", 1)).indices(x.shape[dim])
    a, b = box[dim]
    if step == 1:
        fill(x, _with(box, dim, (start + a, start + b)), out, read)
    else:
        inner = _with(box, dim, (start + a * step, start + (b - 1) * step + 1))
        out.copy_(value(x, inner, read, device=out.device)[(slice(None),) * dim + (slice(None, None, step),)])


def _split(node: Op, box: Box, out: Tensor, read: Read) -> None:
    x, size = node.args[0], node.args[1]
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dim, index = given % len(x.shape), node.index or 0
    offset = size * index if isinstance(size, int) else sum(size[:index])
    a, b = box[dim]
    fill(x, _with(box, dim, (offset + a, offset + b)), out, read)


def _selected(node: Op, box: Box, out: Tensor, read: Read) -> None:
    x = node.args[0]
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = given % len(x.shape)
    index = (node.args[2] if node.func is aten.select.int else node.index) % x.shape[dim]
    fill(x, (*box[:dim], (index, index + 1), *box[dim:]), out.unsqueeze(dim), read)


def _concatenated(node: Op, box: Box, out: Tensor, read: Read) -> None:
    parts = node.args[0]
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(node.shape)
    lo, hi = box[dim]
    start = 0
    for part in parts:
        if len(part.shape) != len(node.shape):  # an empty tensor of one dim is left out, as torch does
            continue
        end = start + part.shape[dim]
        a, b = max(lo, start), min(hi, end)
        if a < b:
            fill(part, _with(box, dim, (a - start, b - start)), out.narrow(dim, a - lo, b - a), read)
        start = end


def _stacked(node: Op, box: Box, out: Tensor, read: Read) -> None:
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(node.shape)
    a, b = box[dim]
    for i in range(a, b):
        fill(node.args[0][i], (*box[:dim], *box[dim + 1 :]), out.select(dim, i - a), read)


def _viewed(node: Op, box: Box, out: Tensor, read: Read) -> None:
    """Fills the box of a view, which joins or splits neighbouring dims.

    A box that is not one before the view is read in the smallest box that holds it.
    """
    x = node.args[0]
    before: list[tuple[int, int]] = []
    after: list[tuple[int, int]] = []
    for shape_in, shape_out, part in _groups(x.shape, node.shape, box):
        if shape_in == shape_out:
            before += part
            after += part
            continue
        lo, hi = _flat(shape_out, part)
        while True:
            (box_in, lo, hi), last = _enclosing(shape_in, lo, hi), (lo, hi)
            box_out, lo, hi = _enclosing(shape_out, lo, hi)
            if (lo, hi) == last:
                break
        before += box_in
        after += box_out
    if tuple(after) == box and out.is_contiguous():
        fill(x, tuple(before), out.view(sizes(tuple(before))), read)
        return
    inner = tuple((a - c, b - c) for (a, b), (c, _) in zip(box, after, strict=True))
    out.copy_(_cut(value(x, tuple(before), read, device=out.device).view(sizes(tuple(after))), inner))


def _groups(before: Sequence[int], after: Sequence[int], box: Box) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Box]]:
    """Yields the smallest groups of neighbouring dims that hold as many entries before as after, and the box of each."""
    i = j = 0
    while i < len(before) or j < len(after):
        k, m = min(i + 1, len(before)), min(j + 1, len(after))
        while (left := prod(before[i:k])) != (right := prod(after[j:m])):
            if left < right:
                k += 1
            else:
                m += 1
        yield tuple(before[i:k]), tuple(after[j:m]), box[j:m]
        i, j = k, m


def _flat(shape: Sequence[int], box: Box) -> tuple[int, int]:
    """Returns the first entry of `box` and the one after the last, counted in a row-major `shape`."""
    lo = hi = 0
    for n, (a, b) in zip(shape, box, strict=True):
        lo, hi = lo * n + a, hi * n + b - 1
    return lo, hi + 1


def _enclosing(shape: Sequence[int], lo: int, hi: int) -> tuple[Box, int, int]:
    """Returns the smallest box that is a run of a row-major `shape` and holds entries `lo` to `hi`; and its run."""
    box: list[tuple[int, int]] = []
    base = 0
    for dim, _ in enumerate(shape):
        minor = prod(shape[dim + 1 :])
        a, b = (lo - base) // minor, -((base - hi) // minor)
        box.append((a, b))
        if b - a > 1:
            box += whole_box(shape[dim + 1 :])
            return tuple(box), base + a * minor, base + b * minor
        base += a * minor
    return tuple(box), base, base + 1


def _unsqueezed(node: Op, box: Box, out: Tensor, read: Read) -> None:
    dim = node.args[1] % len(node.shape)
    fill(node.args[0], (*box[:dim], *box[dim + 1 :]), out.squeeze(dim), read)


def _squeezed(node: Op, box: Box, out: Tensor, read: Read) -> None:
    x = node.args[0]
    if node.func is aten.squeeze.default:
        dims = range(len(x.shape))
    else:
        given = node.args[1]
        dims = [d % max(len(x.shape), 1) for d in ([given] if isinstance(given, int) else given)]  # type: ignore[assignment]
    inner = list(box)
    for dim in sorted(d for d in dims if x.shape and x.shape[d] == 1):
        inner.insert(dim, (0, 1))
        out = out.unsqueeze(dim)
    fill(x, tuple(inner), out, read)


def _with(box: Box, dim: int, interval: tuple[int, int]) -> Box:
    return (*box[:dim], interval, *box[dim + 1 :])


_Rule = Callable[[Op, Box, Tensor, Read], None]
_RULES: Mapping[Any, _Rule] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.lift_fresh.default: _same,
    aten._to_copy.default: _cast,
    aten.t.default: _permuted,
    aten.transpose.int: _permuted,
    aten.permute.default: _permuted,
    aten.slice.Tensor: _sliced,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.select.int: _selected,
    aten.unbind.int: _selected,
    aten.cat.default: _concatenated,
    aten.stack.default: _stacked,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.unsqueeze.default: _unsqueezed,
    aten.squeeze.default: _squeezed,
    aten.squeeze.dim: _squeezed,
    aten.squeeze.dims: _squeezed,
}
