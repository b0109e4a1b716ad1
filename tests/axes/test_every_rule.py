"""Every rule in the table against its operator: one small case for each that `test_rules` has none for.

The cases are `operator → (expression over parameters and buffers, parameters, buffers)`; `m`, `n` are drawn even sizes. `UNREACHABLE`
names the rules that no call from Python records, with the reason. What is claimed may be nothing (an operator that mixes everything):
then the case shows that nothing wrong is claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from autotp.axes.operators.table import OPERATORS
from autotp.trace.graph import Pseudo
from tests.axes.test_rules import CASES, LOUD, Draw, Operator, Subject

Made = tuple[Callable[..., Any], list[Tensor], list[Tensor]]
Case = Callable[[Draw, int, int], Made]


def unary(function: Callable[[Tensor], Any], low: float | None = None) -> Case:
    """`function` of one tensor, made positive from `low` up where that is given."""

    def made(d: Draw, m: int, n: int) -> Made:
        x = d.x(m, n)
        return function, [x if low is None else x.abs() + low], []

    return made


def binary(function: Callable[[Tensor, Tensor], Any], second: Callable[[Draw, int, int], Tensor] = lambda d, m, n: d.x(m, n)) -> Case:
    """`function` of two tensors, the second as drawn."""
    return lambda d, m, n: (function, [d.x(m, n), second(d, m, n)], [])


#: Gates of the recurrent operators.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(name: str) -> Case:
    """A recurrent layer, or one step of it, with its four parameters."""
    step, gates = name.endswith("_cell"), GATES[name.removesuffix("_cell")]
    states = 2 if gates == 4 else 1

    def layer(x: Tensor, *weights: Tensor) -> Any:
        h = [x.new_zeros(x.shape[0], weights[1].shape[1])] * states
        if step:
            return getattr(torch, name)(x, h if states > 1 else h[0], *weights)
        h = [each[None] for each in h]
        return getattr(torch, name)(x[None], h if states > 1 else h[0], list(weights), True, 1, 0.0, False, False, False)

    return lambda d, m, n: (layer, [d.x(m, n), d.x(gates * m, n), d.x(gates * m, m), d.x(gates * m), d.x(gates * m)], [])


def ternary(function: Callable[[Tensor, Tensor, Tensor], Any]) -> Case:
    """`function` of three tensors of one shape."""
    return lambda d, m, n: (function, [d.x(m, n), d.x(m, n), d.x(m, n)], [])


def changed(function: Callable[[Tensor], Any]) -> Case:
    """`function` changes a fresh tensor in place."""
    return unary(lambda x: (y := x * 1, function(y), y)[-1])


def masked(function: Callable[[Tensor, Tensor], Any]) -> Case:
    """`function` of a tensor and a mask that is a buffer."""
    return lambda d, m, n: (function, [d.x(m, n)], [d.mask(m, n)])


def fresh(function: Callable[[int, int], Tensor]) -> Case:
    """A tensor made of sizes meets a parameter."""
    return lambda d, m, n: (lambda x: x * function(m, n), [d.x(m, n)], [])


def indexed(function: Callable[..., Any]) -> Case:
    """`function` of a tensor, another and row numbers."""
    return lambda d, m, n: (function, [d.x(m, n), d.x(2, n)], [torch.arange(2)])


def image(function: Callable[[Tensor], Any], channels: int = 1) -> Case:
    """`function` of an image whose number of channels is a multiple of `channels`."""
    return lambda d, m, n: (function, [d.x(2, m * channels, 4, 4)], [])


def volume(function: Callable[[Tensor], Any]) -> Case:
    """`function` of a volume."""
    return lambda d, m, n: (function, [d.x(1, m, 4, 4, 4)], [])


MORE: dict[str, Case] = {
    # pooling
    "_adaptive_avg_pool2d": image(lambda x: F.adaptive_avg_pool2d(x, 3)),
    "_adaptive_avg_pool3d": volume(lambda x: F.adaptive_avg_pool3d(x, 3)),
    "_upsample_bicubic2d_aa": image(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)),
    "_upsample_bilinear2d_aa": image(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)),
    "adaptive_max_pool2d": image(lambda x: F.adaptive_max_pool2d(x, 3)),
    "adaptive_max_pool3d": volume(lambda x: F.adaptive_max_pool3d(x, 3)),
    "avg_pool2d": image(lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)),
    "avg_pool3d": volume(lambda x: F.avg_pool3d(x, 2)),
    "col2im": lambda d, m, n: ((lambda x: F.fold(x, 4, 2, stride=2)), [d.x(2, m * 4, 4)], []),
    "im2col": image(lambda x: F.unfold(x, 2, padding=1)),
    "instance_norm": lambda d, m, n: ((lambda x, w, b: F.instance_norm(x, weight=w, bias=b)), [d.x(2, m, 4), d.x(m), d.x(m)], []),
    "max_pool2d_with_indices": image(lambda x: F.max_pool2d(x, 3, stride=2, padding=1)),
    "max_pool3d_with_indices": volume(lambda x: F.max_pool3d(x, 2)),
    "pixel_shuffle": image(lambda x: F.pixel_shuffle(x, 2), channels=4),
    "pixel_unshuffle": image(lambda x: F.pixel_unshuffle(x, 2)),
    # elementwise
    "angle": unary(torch.angle),
    "atan": unary(torch.atan),
    "bitwise_and": masked(lambda x, mask: x * (mask & mask)),
    "bitwise_not": masked(lambda x, mask: x * ~mask),
    "bitwise_or": masked(lambda x, mask: x * (mask | ~mask)),
    "ceil": unary(torch.ceil),
    "clamp_max": unary(lambda x: x.clamp_max(0.1)),
    "clamp_min": unary(lambda x: x.clamp_min(0.1)),
    "cos": unary(torch.cos),
    "eq": binary(torch.eq),
    "erfc": unary(torch.erfc),
    "exp": unary(torch.exp),
    "exp2": unary(torch.exp2),
    "expm1": unary(torch.expm1),
    "floor": unary(torch.floor),
    "ge": binary(torch.ge),
    "gt": binary(torch.gt),
    "le": binary(torch.le),
    "logical_and": binary(torch.logical_and),
    "logical_or": binary(torch.logical_or),
    "lt": binary(torch.lt),
    "minimum": binary(torch.minimum),
    "ne": binary(torch.ne),
    "pow": unary(lambda x: x.pow(3)),
    "round": unary(torch.round),
    "sin": unary(torch.sin),
    "celu": unary(F.celu),
    "clip": unary(lambda x: x.clip(-1, 1)),
    "clone": unary(torch.clone),
    "detach": unary(lambda x: x.detach() * 2),
    "elu": unary(F.elu),
    "erf": unary(torch.erf),
    "gelu": unary(F.gelu),
    "hardshrink": unary(F.hardshrink),
    "hardsigmoid": unary(F.hardsigmoid),
    "hardswish": unary(F.hardswish),
    "hardtanh": unary(F.hardtanh),
    "isfinite": unary(torch.isfinite),
    "isinf": unary(torch.isinf),
    "isnan": unary(torch.isnan),
    "leaky_relu": unary(F.leaky_relu),
    "log_sigmoid": unary(F.logsigmoid),
    "logical_not": unary(torch.logical_not),
    "mish": unary(F.mish),
    "nan_to_num": unary(torch.nan_to_num),
    "positive": unary(torch.positive),
    "relu6": unary(F.relu6),
    "selu": unary(F.selu),
    "sigmoid": unary(torch.sigmoid),
    "sign": unary(torch.sign),
    "softplus": unary(F.softplus),
    "softshrink": unary(F.softshrink),
    "tanh": unary(torch.tanh),
    "threshold": unary(lambda x: F.threshold(x, 0.1, 20.0)),
    "to": unary(lambda x: x.to(torch.float32)),
    "real": unary(lambda x: torch.complex(x, x).real),
    "_conj": unary(lambda x: torch.complex(x, x).conj().imag),
    "resolve_conj": unary(lambda x: torch.complex(x, x).conj().resolve_conj().imag),
    "resolve_neg": unary(lambda x: torch.complex(x, x).conj().imag.resolve_neg()),
    "complex": binary(torch.complex),
    "polar": binary(torch.polar),
    "floor_divide": binary(torch.floor_divide),
    "multiply": binary(torch.multiply),
    "remainder": binary(torch.remainder),
    "true_divide": binary(torch.true_divide),
    "type_as": binary(lambda x, y: x.type_as(y)),
    "expand_as": binary(lambda x, y: x.expand_as(y), lambda d, m, n: d.x(3, m, n)),
    "addcdiv": ternary(lambda x, y, z: torch.addcdiv(x, y, z.abs() + 1)),
    "addcmul": ternary(torch.addcmul),
    "lerp": ternary(lambda x, y, z: torch.lerp(x, y, z)),
    # in place
    "add_": changed(lambda y: y.add_(1)),
    "sub_": changed(lambda y: y.sub_(y * 2)),
    "mul_": changed(lambda y: y.mul_(3)),
    "div_": changed(lambda y: y.div_(3)),
    "relu_": changed(lambda y: y.relu_()),
    "silu_": changed(lambda y: F.silu(y, inplace=True)),
    "zero_": changed(lambda y: y.zero_()),
    "fill_": changed(lambda y: y.fill_(2.0)),
    "copy_": binary(lambda x, y: (x * 1).copy_(y)),
    "cumsum_": changed(lambda y: y.cumsum_(-1)),
    "tril_": changed(lambda y: y.tril_()),
    "triu_": changed(lambda y: y.triu_()),
    "transpose_": changed(lambda y: y.transpose_(0, 1)),
    "squeeze_": unary(lambda x: (x * 1)[None].squeeze_(0)),
    "unsqueeze_": unary(lambda x: (x * 1).unsqueeze_(1)),
    "detach_": unary(lambda x: (x * 1).detach_()),
    "masked_fill_": masked(lambda x, mask: (x * 1).masked_fill_(mask, 0.0)),
    "bitwise_and_": masked(lambda x, mask: x * mask.clone().bitwise_and_(mask)),
    "index_add_": indexed(lambda x, y, i: (x * 1).index_add_(0, i, y)),
    "index_copy_": indexed(lambda x, y, i: (x * 1).index_copy_(0, i, y)),
    "index_copy": indexed(lambda x, y, i: x.index_copy(0, i, y)),
    "index_put": indexed(lambda x, y, i: x.index_put((i,), y)),
    "index_put_": indexed(lambda x, y, i: (x * 1).index_put_((i,), y)),
    "_index_put_impl_": indexed(lambda x, y, i: torch._index_put_impl_(x * 1, (i,), y)),
    "_unsafe_index": indexed(lambda x, y, i: torch.ops.aten._unsafe_index(x, [i]) + y),
    "scatter_": indexed(lambda x, y, i: (x * 1).scatter_(0, i[:, None].expand(2, x.shape[1]), y)),
    "scatter_add_": indexed(lambda x, y, i: (x * 1).scatter_add_(0, i[:, None].expand(2, x.shape[1]), y)),
    "scatter_reduce": indexed(lambda x, y, i: x.scatter_reduce(0, i[:, None].expand(2, x.shape[1]), y, "amax")),
    "masked_scatter": masked(lambda x, mask: x.masked_scatter(mask, x * 2)),
    "masked_scatter_": masked(lambda x, mask: (x * 1).masked_scatter_(mask, x * 2)),
    # shapes
    "adjoint": unary(lambda x: x.adjoint()),
    "mH": unary(lambda x: x.mH),
    "matrix_H": unary(lambda x: x.H),
    "numpy_T": unary(lambda x: x.T),
    "t": unary(torch.t),
    "swapaxes": unary(lambda x: x.swapaxes(0, 1)),
    "alias": unary(torch.ops.aten.alias),
    "broadcast_to": lambda d, m, n: (lambda x: x.broadcast_to(3, m, n), [d.x(m, n)], []),
    "concat": binary(lambda x, y: torch.concat([x, y], -1)),
    "concatenate": binary(lambda x, y: torch.concatenate([x, y], 0)),
    "constant_pad_nd": unary(lambda x: torch.constant_pad_nd(x, (1, 1))),
    "select_copy": unary(lambda x: torch.select_copy(x, 0, 0)),
    "slice_copy": unary(lambda x: torch.slice_copy(x, 0, 0, 1)),
    "view_copy": lambda d, m, n: (lambda x: torch.view_copy(x, (n, m)), [d.x(m, n)], []),
    "_unsafe_view": lambda d, m, n: (lambda x: torch.ops.aten._unsafe_view(x, [m * n]), [d.x(m, n)], []),
    "tensor_split": unary(lambda x: x.tensor_split(2, -1)),
    "unsafe_chunk": unary(lambda x: torch.unsafe_chunk(x, 2, -1)),
    "unsafe_split": unary(lambda x: torch.unsafe_split(x, x.shape[-1] // 2, -1)),
    "take_along_dim": lambda d, m, n: (lambda x, i: x.take_along_dim(i, 0), [d.x(m, n)], [d.ids(m, m, n)]),
    "_to_copy": unary(lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32)),
    "lift_fresh": unary(lambda x: x * torch.ops.aten.lift_fresh(torch.ones(1, dtype=x.dtype))),
    "lift_fresh_copy": unary(lambda x: x * torch.ops.aten.lift_fresh_copy(torch.ones(1, dtype=x.dtype))),
    # sums, extremes, order
    "all": unary(lambda x: (x > 0).all(-1)),
    "any": unary(lambda x: (x > 0).any(0)),
    "amin": unary(lambda x: x.amin(-1)),
    "argmax": unary(lambda x: x.argmax(-1)),
    "min": unary(lambda x: x.min(-1).values),
    "count_nonzero": unary(lambda x: x.count_nonzero(-1)),
    "nansum": unary(lambda x: x.nansum(-1)),
    "norm": unary(lambda x: torch.ops.aten.norm(x, 2, [-1])),
    "prod": unary(lambda x: x.prod(-1)),
    "std": unary(lambda x: x.std(-1)),
    "std_mean": unary(lambda x: torch.std_mean(x, -1)),
    "var_mean": unary(lambda x: torch.var_mean(x, -1)),
    "cummax": unary(lambda x: x.cummax(-1).values),
    "logcumsumexp": unary(lambda x: x.logcumsumexp(-1)),
    "median": unary(lambda x: x.median(-1).values),
    "mode": unary(lambda x: x.mode(-1).values),
    "nanmedian": unary(lambda x: x.nanmedian(-1).values),
    "kthvalue": unary(lambda x: x.kthvalue(1, -1).values),
    "aminmax": unary(lambda x: x.aminmax(dim=0).max),
    # windows, frequencies, samples
    "unfold": lambda d, m, n: (lambda x: x.unfold(1, 2, 1), [d.x(m, 4, n)], []),
    "_fft_r2c": lambda d, m, n: (lambda x: torch.fft.rfft(x, dim=1).real, [d.x(m, 5, n)], []),
    "_fft_c2r": lambda d, m, n: (lambda x: torch.fft.irfft(x, n=6, dim=1), [d.x(m, 4, n)], []),
    "_fft_c2c": lambda d, m, n: (lambda x: torch.view_as_real(torch.fft.fft2(x, dim=(1, 2))), [d.x(m, 2, 3, n)], []),
    "diagonal": lambda d, m, n: (lambda x: x.diagonal(1, -1, 0), [d.x(4, m, n, 3)], []),
    "diag_embed": lambda d, m, n: (lambda x: x.diag_embed(1, 0, -1), [d.x(m, n, 3)], []),
    "grid_sampler_2d": lambda d, m, n: (lambda x, g: F.grid_sample(x, g, align_corners=False), [d.x(m, n, 3, 4), d.x(m, 2, 5, 2)], []),
    "grid_sampler_3d": lambda d, m, n: (lambda x, g: F.grid_sample(x, g, align_corners=True), [d.x(m, n, 2, 3, 2), d.x(m, 2, 2, 2, 3)], []),
    "msort": unary(torch.msort),
    "isin": binary(lambda x, y: torch.isin(x, torch.cat([y[:, :1], x[:, -1:]], -1).flatten()), lambda d, m, n: d.x(m, n)),
    **{f"{name}{cell}": recurrent(f"{name}{cell}") for name in GATES for cell in ("", "_cell")},
    "_softmax": unary(lambda x: torch._softmax(x, -1, False)),
    "_log_softmax": unary(lambda x: torch._log_softmax(x, -1, False)),
    "fft_fft": unary(lambda x: torch.fft.fft(x).real),
    "fft_ifft": unary(lambda x: torch.fft.ifft(x).real),
    # products
    "mm": binary(torch.mm, lambda d, m, n: d.x(n, 3)),
    "mv": binary(torch.mv, lambda d, m, n: d.x(n)),
    "dot": lambda d, m, n: (torch.dot, [d.x(n), d.x(n)], []),
    "vdot": lambda d, m, n: (torch.vdot, [d.x(n), d.x(n)], []),
    "_grouped_mm": lambda d, m, n: (lambda x, w: torch._grouped_mm(x.float(), w.float()), [d.x(2, 4, 8), d.x(2, 8, 16)], []),
    "linalg_solve": lambda d, m, n: (lambda x, y: torch.linalg.solve(x + 9 * torch.eye(m, dtype=x.dtype), y), [d.x(m, m), d.x(m, n)], []),
    "convolution": lambda d, m, n: (
        lambda x, w: torch.ops.aten.convolution(x, w, None, [1], [0], [1], False, [0], 1), [d.x(2, m, 5), d.x(n, m, 2)], []
    ),
    "_convolution": lambda d, m, n: (
        lambda x, w: torch.ops.aten._convolution(x, w, None, [1], [0], [1], False, [0], 1, False, False, False, False),
        [d.x(2, m, 5), d.x(n, m, 2)],
        [],
    ),
    "conv3d": lambda d, m, n: (F.conv3d, [d.x(1, m, 3, 3, 3), d.x(n, m, 2, 2, 2)], []),
    "conv_transpose3d": lambda d, m, n: (F.conv_transpose3d, [d.x(1, m, 3, 3, 3), d.x(m, n, 2, 2, 2)], []),
    "batch_norm": lambda d, m, n: (
        lambda x, w, b: F.batch_norm(x, torch.zeros(n, dtype=x.dtype), torch.ones(n, dtype=x.dtype), w, b), [d.x(m, n), d.x(n), d.x(n)], []
    ),
    # losses
    "l1_loss": binary(F.l1_loss),
    "mse_loss": binary(F.mse_loss),
    "smooth_l1_loss": binary(F.smooth_l1_loss),
    "huber_loss": binary(lambda x, y: F.huber_loss(x, y, reduction="none")),
    "binary_cross_entropy": binary(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), reduction="none")),
    "kl_div": binary(lambda x, y: F.kl_div(x, y.softmax(-1), reduction="batchmean")),
    "binary_cross_entropy_with_logits": binary(lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid())),
    "cross_entropy_loss": lambda d, m, n: (F.cross_entropy, [d.x(m, n)], [d.ids(n, m)]),
    "nll_loss": lambda d, m, n: (lambda x, i: torch.ops.aten.nll_loss(x.log_softmax(-1), i), [d.x(m, n)], [d.ids(n, m)]),
    "nll_loss_nd": lambda d, m, n: (lambda x, i: F.nll_loss(x.log_softmax(1), i), [d.x(m, n, 3)], [d.ids(n, m, 3)]),
    # constants
    "arange": fresh(lambda m, n: torch.arange(n)),
    "eye": fresh(torch.eye),
    "full_like": unary(lambda x: x + torch.full_like(x, 2.0)),
    "hann_window": fresh(lambda m, n: torch.hann_window(n)),
    "linspace": fresh(lambda m, n: torch.linspace(0, 1, n)),
    "new_full": unary(lambda x: x + x.new_full(x.shape, 2.0)),
    "new_zeros": unary(lambda x: x + x.new_zeros(x.shape)),
    "ones": fresh(torch.ones),
    "ones_like": unary(lambda x: x + torch.ones_like(x)),
    "zeros": fresh(torch.zeros),
    "scalar_tensor": unary(lambda x: x + torch.scalar_tensor(2.0)),
    "triu": unary(torch.triu),
    "tril_indices": fresh(lambda m, n: torch.tril_indices(n, n)[0][:1]),
    "triu_indices": fresh(lambda m, n: torch.triu_indices(n, n)[0][:1]),
    "dropout": unary(lambda x: F.dropout(x, 0.5, False)),
}  # fmt: skip


def short(function: Callable[..., Any]) -> Case:
    """`function` of a tensor [m, n], rows of fewer entries than its dim and as many indices; the indices are shared out too, or whole."""

    def made(d: Draw, m: int, n: int) -> Made:
        n = max(n, 4)
        rows, index = d.x(m, n // 2), d.ids(m, m, n // 2)
        return (function, [d.x(m, n), rows, index], []) if d.yes() else (function, [d.x(m, n), rows], [index])

    return made


def placed(function: Callable[..., Any]) -> Case:
    """`function` of a tensor [m, n], row numbers and as many rows; the row numbers are shared out too, or whole."""

    def made(d: Draw, m: int, n: int) -> Made:
        rows, index = d.x(2, n), torch.arange(2)
        return (function, [d.x(m, n), rows, index], []) if d.yes() else (function, [d.x(m, n), rows], [index])

    return made


def assigned(x: Tensor, places: Any, values: Tensor) -> Tensor:
    """`x` with other values at some places."""
    x = x * 1
    x[places] = values
    return x


#: Forms of operators that a rule may take for the usual one: operator, then what is special.
FORMS: dict[str, Case] = {
    "gather short": short(lambda x, y, i: x.gather(0, i) + y),
    "gather long rows": short(lambda x, y, i: y.gather(1, i.clamp(max=y.shape[1] - 1)) + x.sum()),
    "scatter short": short(lambda x, y, i: x.scatter(0, i, y)),
    "scatter number": short(lambda x, y, i: x.scatter(0, i, 2.0) + y.sum()),
    "scatter longer source": short(lambda x, y, i: y.scatter(0, i, x)),
    "scatter_ short": short(lambda x, y, i: (x * 1).scatter_(0, i, y)),
    "scatter_add short": short(lambda x, y, i: x.scatter_add(0, i, y)),
    "scatter_add longer source": short(lambda x, y, i: y.scatter_add(0, i, x)),
    "scatter_reduce short": short(lambda x, y, i: x.scatter_reduce(0, i, y, "sum")),
    "take_along_dim one column": short(lambda x, y, i: x.take_along_dim(i[:, :1], 0) + y.sum()),
    "take_along_dim of one column": short(lambda x, y, i: x[:, :1].take_along_dim(i, 0) + y),
    "take_along_dim of all": short(lambda x, y, i: x.take_along_dim(i.flatten()) + y.sum()),
    "index_add placed": placed(lambda x, y, i: x.index_add(0, i, y)),
    "index_copy placed": placed(lambda x, y, i: x.index_copy(0, i, y)),
    "index_put placed": placed(lambda x, y, i: x.index_put((i,), y)),
    "index_put one number": placed(lambda x, y, i: x.index_put((i,), y[0, 0])),
    "index_put apart": lambda d, m, n: (lambda x, y, i: assigned(x, (i, slice(None), i), y), [d.x(m, n, 4), d.x(2, n)], [torch.arange(2)]),
    "index_put masked": lambda d, m, n: (lambda x, v, k: assigned(x, (slice(None), k), v), [d.x(3, m, n), d.x(1)], [d.mask(m, n)]),
    "index masked": lambda d, m, n: (lambda x, k: x[:, k].sum(1), [d.x(3, m, n)], [torch.ones(m, n, dtype=torch.bool)]),
    "index_select placed": placed(lambda x, y, i: x.index_select(0, i) + y),
    "narrow from the end": unary(lambda x: torch.cat([x.narrow(1, -2, 2), x.narrow(1, -2, 1)], -1)),
    "var_mean of all": unary(lambda x: torch.var_mean(x, False)),
    "nansum": unary(lambda x: x.nansum(-1)),
    "pad negative": unary(lambda x: F.pad(x, (-1, 1))),
    "pad circular": lambda d, m, n: (lambda x: F.pad(x, (1, 1), mode="circular"), [d.x(1, m, n)], []),
    "tensor_split at": lambda d, m, n: (lambda x: x.tensor_split((1, 3), -1), [d.x(m, n + 4)], []),
    "einsum diagonal": lambda d, m, n: (lambda x: torch.einsum("bii->bi", x), [d.x(m, n, n)], []),
    "batch_norm training": lambda d, m, n: (
        lambda x, w: F.batch_norm(x, None, None, w, None, True), [d.x(m, n, 3), d.x(n)], []
    ),
    "unfold of the last dim": unary(lambda x: x.unfold(1, 2, 1)),
    "unfold of a number": unary(lambda x: x.sum().unfold(0, 1, 1)),
    "diagonal of a matrix": unary(lambda x: x.diagonal()),
    "mse_loss of elements": binary(lambda x, y: F.mse_loss(x, y, reduction="none")),
    "binary_cross_entropy_with_logits of elements": ternary(
        lambda x, y, w: F.binary_cross_entropy_with_logits(x, y.sigmoid(), w, reduction="none")
    ),
    "binary_cross_entropy with weights": ternary(lambda x, y, w: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), w)),
    "rfftn": lambda d, m, n: (lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2)), s=(3, 4), dim=(1, 2)), [d.x(m, 3, 4, n)], []),
    "a convolution by frequencies": lambda d, m, n: (
        lambda x, k: torch.fft.irfft(torch.fft.rfft(x, n=8, dim=1) * torch.fft.rfft(k, n=8, dim=0), n=8, dim=1),
        [d.x(m, 4, n), d.x(4, n)],
        [],
    ),
    "index_fill": lambda d, m, n: (lambda x, i: x.index_fill(1, i, 2.0), [d.x(m, n)], [torch.arange(2)]),
    "take": lambda d, m, n: (lambda x, i: x.take(i), [d.x(m, n)], [torch.arange(2)]),
    "put": lambda d, m, n: (lambda x, i: x.put(i, torch.ones(2, dtype=x.dtype)), [d.x(m, n)], [torch.arange(2)]),
    "searchsorted": binary(lambda x, y: torch.searchsorted(x.sort(-1).values, y)),
    "histc": unary(lambda x: x.histc(4)),
    "causal": lambda d, m, n: (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [d.x(2, m, n), d.x(2, 3, n), d.x(2, 3, 4)], []
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    @settings(max_examples=6, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        d = Draw(data)
        subject = Subject.of(Operator(*FORMS[name](d, d.n(), d.n())), name == "tensor_split at")
        subject.claims()
        subject.check_linear(d.generator)

    examples()


#: Rules that no case reaches, and why.
UNREACHABLE: dict[str, str] = {
    **dict.fromkeys(
        (
            "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "rand", "rand_like", "randint", "randint_like",
            "randn", "randn_like", "randperm", "rrelu", "uniform_",
        ),
        "random: parts of a rank cannot be compared with the whole; tests/rewrite/test_rng.py",
    ),
    **dict.fromkeys(("empty", "empty_like", "new_empty"), "what is in them is nobody's: there is nothing to compare"),
}  # fmt: skip


def recorded(subject: Subject) -> set[str]:
    return {n.opname for n in subject.space.graph.nodes if not isinstance(n.op, Pseudo)}


@pytest.mark.parametrize("name", MORE)
def test_rule(name: str) -> None:
    @settings(max_examples=2, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        d = Draw(data)
        subject = Subject.of(Operator(*MORE[name](d, d.n(), d.n())), name in ("tensor_split", "unsafe_chunk", "unsafe_split"))
        assert name in recorded(subject), sorted(recorded(subject))
        subject.claims()
        subject.check_linear(d.generator)

    examples()


def recorded_by(name: str) -> set[str]:
    """Operators that a few examples of a case of `test_rules` are made of."""
    seen: set[str] = set()

    @settings(
        max_examples=6, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        seen.update(recorded(Subject.of(Operator(*CASES[name](Draw(data))), name in LOUD)))

    examples()
    return seen


@pytest.mark.sweep
def test_every_rule_has_a_case() -> None:
    seen = set(MORE).union(*map(recorded_by, CASES))
    ruled = {name for name in OPERATORS if isinstance(name, str)}
    assert ruled - seen - set(UNREACHABLE) == set()
    assert not set(UNREACHABLE) - ruled


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x.renorm(2, 0, 1.0),
        lambda x, y: torch.rot90(x),
        lambda x, y: x.diff(dim=0),
        lambda x, y: x.kthvalue(1, -1).values,
        lambda x, y: x.nanmedian(-1).values,
        lambda x, y: (x * 1).addbmm_(y[None], x[None]),
        lambda x, y: torch.isin(x, y),
        lambda x, y: F.grouped_mm(x[None].float(), y[None].float()).sum(0),
    ],
)
def test_what_once_had_a_wrong_rule_or_has_none(function: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    Subject.of(Operator(function, [x, y], [])).claims()
