"""Rules of operators on neighbouring positions without weights: pools, resampling, patches. Examples and channels run in parallel."""

from __future__ import annotations

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.atoms import Dim
from autotp.axes.operators.table import Padded, rule
from autotp.trace.graph import Node, Value


@rule("avg_pool2d", "_adaptive_avg_pool2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", padded=Padded.ZERO)
@rule("max_pool2d_with_indices", "adaptive_max_pool2d", padded=Padded.ZERO)
def over_image(context: Context, node: Node) -> None:
    """The last two dims are mixed."""
    _pooled(context, node, 2)


@rule("avg_pool3d", "_adaptive_avg_pool3d", padded=Padded.ZERO)
@rule("max_pool3d_with_indices", "adaptive_max_pool3d", padded=Padded.ZERO)
def over_volume(context: Context, node: Node) -> None:
    """The last three dims are mixed."""
    _pooled(context, node, 3)


def _pooled(context: Context, node: Node, positions: int) -> None:
    """Averages are linear, the positions of largest numbers are results too."""
    x = node.args[0]
    for out in node.outputs:
        _positions(context, x, out, positions, context.of(x)[:-positions], positions)
    if "max" not in node.opname:
        context.linear([x])


def _positions(context: Context, x: Value, out: Value, last: int, kept: list[Dim], fresh: int) -> None:
    """Mix the `last` dims of x; the result has the dims `kept` and then `fresh` new ones."""
    for i in range(len(x.shape) - last, len(x.shape)):
        context.mix(x, i)
    known = context.dims.get(out.id)
    context.set(out, [*kept, *(known[-fresh:] if known else (atoms.new(n) for n in out.shape[-fresh:]))])


@rule("pixel_shuffle", padded=Padded.MOVED)
def pixel_shuffle(context: Context, node: Node) -> None:
    """x [..., c r r, h, w] → [..., c, h r, w r]."""
    _into_positions(context, node, -3, 2, "pixel_shuffle makes positions of it")


@rule("col2im", padded=Padded.ZERO)
def col2im(context: Context, node: Node) -> None:
    """x [b, c k k, patches] → [b, c, h, w]."""
    _into_positions(context, node, -2, 1, "fold makes positions of it")


@rule("pixel_unshuffle", padded=Padded.MOVED)
def pixel_unshuffle(context: Context, node: Node) -> None:
    """x [..., c, h r, w r] → [..., c r r, h, w]."""
    _of_positions(context, node, -3, 2, "pixel_unshuffle makes it of positions")


@rule("im2col", padded=Padded.ZERO)
def im2col(context: Context, node: Node) -> None:
    """x [b, c, h, w] → [b, c k k, patches]."""
    _of_positions(context, node, -2, 1, "unfold makes it of positions")


def _into_positions(context: Context, node: Node, dim: int, mixed: int, why: str) -> None:
    """The minor part of a dim of x goes into positions of an image, beside the `mixed` last dims."""
    x, out = node.args[0], node.outputs[0]
    dims = context.of(x)
    major, minor = atoms.split(dims[dim], [out.shape[-3], x.shape[dim] // out.shape[-3]])
    context.block(x, minor, why)
    _positions(context, x, out, mixed, [*dims[:dim], major], 2)
    context.linear([x])


def _of_positions(context: Context, node: Node, dim: int, fresh: int, why: str) -> None:
    """Positions of an image become the minor part of a dim of the result, beside its `fresh` last dims."""
    x, out = node.args[0], node.outputs[0]
    made = context.of(out)[dim]
    major, minor = atoms.split(made, [x.shape[-3], out.shape[dim] // x.shape[-3]])
    context.join(x, context.of(x)[-3], out, major)
    context.block(out, minor, why)
    _positions(context, x, out, 2, [*context.of(x)[:-3], made], fresh)
    context.linear([x])
