"""Rules of Fourier transforms, windows, diagonals and samples of an image: they mix some dims, and leave the others alone."""

from __future__ import annotations

from collections.abc import Collection

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.atoms import Dim
from autotp.axes.operators.table import Padded, arg, dim_of, dims_of, rule
from autotp.trace.graph import Node, Value


def _left_alone(context: Context, x: Value, mixed: Collection[int]) -> list[Dim]:
    """Mixes dims of `x`, and returns the others."""
    for i in mixed:
        context.mix(x, i)
    context.linear([x])
    return [dim for i, dim in enumerate(context.of(x)) if i not in mixed]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c", padded=Padded.ZERO)
def fourier(context: Context, node: Node) -> None:
    """Transforms over some dims, in place of which frequencies stand, or the other way around."""
    x, out = node.args[0], node.outputs[0]
    mixed = dims_of(node.args[1], x)
    others = iter(_left_alone(context, x, mixed))
    context.set(out, [atoms.new(out.shape[i]) if i in mixed else next(others) for i in range(len(out.shape))])


@rule("unfold", padded=Padded.MOVED)
def windows(context: Context, node: Node) -> None:
    """x [..., n, ...] → [..., windows, ..., size]: runs of one dim, which may overlap."""
    x, out = node.args[0], node.outputs[0]
    d = dim_of(node.args[1], x) if x.shape else -1
    others = iter(_left_alone(context, x, [d] if x.shape else []))
    context.set(out, [*(atoms.new(out.shape[d]) if i == d else next(others) for i in range(len(x.shape))), atoms.new(out.shape[-1])])


@rule("diagonal", padded=Padded.MOVED)
def diagonal(context: Context, node: Node) -> None:
    """x [..., n, ..., n, ...] → [..., n]: places with the same index in two dims."""
    x, out = node.args[0], node.outputs[0]
    mixed = {dim_of(arg(node, 2, "dim1", 0), x), dim_of(arg(node, 3, "dim2", 1), x)}
    context.set(out, [*_left_alone(context, x, mixed), atoms.new(out.shape[-1])])


@rule("diag_embed", padded=Padded.ZERO)
def on_diagonal(context: Context, node: Node) -> None:
    """x [..., n] → [..., n, ..., n, ...], zero beside the diagonal."""
    x, out = node.args[0], node.outputs[0]
    made = {dim_of(arg(node, 2, "dim1", -2), out), dim_of(arg(node, 3, "dim2", -1), out)}
    others = iter(_left_alone(context, x, [len(x.shape) - 1]))
    context.set(out, [atoms.new(out.shape[i]) if i in made else next(others) for i in range(len(out.shape))])


@rule("grid_sampler_2d", "grid_sampler_3d", padded=Padded.ZERO)
def sampled(context: Context, node: Node) -> None:
    """x [n, channels, *places] at grid [n, *points, coordinates] → [n, channels, *points]."""
    x, grid = node.args[:2]
    batch, channels = _left_alone(context, x, range(2, len(x.shape)))
    context.mix(grid, len(grid.shape) - 1)
    own, *points, _ = context.of(grid)
    context.join(x, batch, grid, own)
    context.set(node.outputs[0], [batch, channels, *points])
