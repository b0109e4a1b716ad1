"""Runs the distributed forms of operators that look across a sharded dim.

With `N` entries in all and `Σ` the sum over the ranks of the local sums, of each index once and without padding (see `statistics`):

    mean        local sum / N                        a partial sum (P)
    var         Σ (x − μ)² / (N − correction)         μ = Σ x / N; whole on every rank (R)
    norm        sqrt(Σ x²)                            R
    rms_norm    x · (Σ x² / N + ε)^(−1/2) · w         sharded like x (S)
    weight_norm v · g / sqrt(Σ v²)                    sharded like v (S)
    layer_norm  (x − μ) · (var + ε)^(−1/2) · w + b    S

A statistic used inside the sharded region is reduced forward and copied back in (`_statistic`): its gradient is a partial sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.errors import PlanError
from autotp.plan.layout import Layout
from autotp.plan.spec import DistributedForm
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import copy, reduce
from autotp.rewrite.operators.statistics import Across

Dims = int | Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Form:
    """A distributed form: the functions that it can replace, by `__name__`, and the function that runs instead.

    `run` gets the layouts of the local tensors by id, the entries that count in a statistic, the function's name, and its
    arguments. `forward` and `backward`: how many all-reduces of a number a token it runs on either way.
    """

    functions: frozenset[str]
    run: Callable[..., Any]
    forward: int = 0
    backward: int = 0


def run_form(
    form: DistributedForm,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    comm: Comm,
    layouts: Mapping[int, Layout],
    across: Across | None = None,
) -> Any:
    """Runs a distributed form for `func(*args, **kwargs)`.

    `across` says which entries count in a statistic; every local entry where it is None.

    Raises:
        PlanError: for an operator or an argument that the form does not know.
    """
    name = getattr(func, "__name__", str(func))
    across = Across(comm) if across is None else across
    try:
        if name not in FORMS[form].functions:
            raise TypeError(f"expected one of {', '.join(sorted(FORMS[form].functions))}")
        return FORMS[form].run(layouts, across, name, *args, **kwargs)
    except TypeError as error:
        raise PlanError(f"no distributed form ({form.value}) for this call of {name}: {error}") from error


def _statistic(x: Tensor, comm: Comm) -> Tensor:
    return copy(reduce(x, comm), comm)


def _lookup(
    layouts: Mapping[int, Layout],
    across: Across,
    name: str,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Returns rows of the local shard, with zeros for ids that other ranks hold: a partial sum."""
    layout, comm = layouts.get(id(weight)), across.comm
    if layout is None:
        raise PlanError("a sharded lookup reads a weight that is no parameter of the module which the plan lists")
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise PlanError("max_norm, scale_grad_by_freq and sparse gradients are not supported for a sharded embedding")
    ids, outside = local_ids(input, layout.owned_runs(comm.rank), layout.shape[0])
    y = F.embedding(ids, weight)
    if padding_idx is not None:  # the padding row gets no gradient
        if not -layout.shape[0] <= padding_idx < layout.shape[0]:
            raise AssertionError("Padding_idx must be within num_embeddings")  # as F.embedding
        y = torch.where((input == padding_idx % layout.shape[0]).unsqueeze(-1), y.detach(), y)
    return y if outside is None else y.masked_fill(outside.unsqueeze(-1), 0)


def local_ids(ids: Tensor, runs: Sequence[tuple[int, int]], rows: int) -> tuple[Tensor, Tensor | None]:
    """`ids` of a table of `rows` → (local ids, 0 where not held; mask of the ids not held, None where all are). Same shape both.

    `runs` may have padding. An id that the table does not have is refused by every rank, as one device does: on CPUs here, elsewhere by
    the lookup, which is given one that is in no part either.

    Raises:
        IndexError: as F.embedding.
    """
    dtype = ids.dtype
    if dtype is not torch.int64 and dtype is not torch.int32:
        F.embedding(ids, torch.empty(1, 1, device=ids.device))  # raises
    checked = type(ids) is Tensor and ids.is_cpu and ids.numel() > 0 and not is_dynamo_compiling()
    a, b = runs[0]
    if checked:
        least, most = torch.aminmax(ids)
        checked = type(least) is Tensor  # under a mode of fake tensors it is none
    if checked:
        low, high = int(least), int(most)
        if low < 0 or high >= rows:
            raise IndexError("index out of range in self")
        if 0 <= a <= low and high < b:
            return ids - a if a else ids, None
    if len(runs) == 1 and a >= 0:
        local, size = ids - a, b - a
        outside = (local < 0) | (local >= size)
        local = local.masked_fill(outside, 0)
    else:
        local, inside, size = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool), 0
        for a, b in runs:
            if a >= 0:
                here = (ids >= a) & (ids < b)
                local = torch.where(here, ids - (a - size), local)
                inside = inside | here
            size += b - a
        outside = ~inside
    return local if checked else local.masked_fill((ids < 0) | (ids >= rows), size), outside


def _axes(x: Tensor, dims: Dims) -> tuple[int, ...]:
    if dims is None or dims == [] or dims == ():
        return tuple(range(x.ndim))
    return (dims,) if isinstance(dims, int) else tuple(dims)


def _root(total: Tensor) -> Tensor:
    """Returns √total, whose gradient is 0 where it is 0, as that of torch's own norms and deviations."""
    zero = total == 0
    return total.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _mean(
    layouts: Mapping[int, Layout],
    across: Across,
    name: str,
    input: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if across.expr is None:  # equal parts
        return torch.mean(input, _axes(input, dim), keepdim, dtype=dtype) / across.comm.size
    x = input if dtype is None else input.to(dtype)
    axes = _axes(x, dim)
    return across.owned(x).sum(axes, keepdim=keepdim) / across.count(x, axes)


def _distributed_var(x: Tensor, dims: Dims, correction: float, keepdim: bool, across: Across) -> Tensor:
    axes, comm = _axes(x, dims), across.comm
    count = across.count(x, axes)
    centre = _statistic(across.owned(x).sum(axes, keepdim=True), comm) / count
    total = reduce(across.owned(x - centre).square().sum(axes, keepdim=keepdim), comm)
    return total / (count - correction)


def _var(
    layouts: Mapping[int, Layout],
    across: Across,
    name: str,
    input: Tensor,
    dim: Dims | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1.0 if unbiased is None or unbiased else 0.0
    value = _distributed_var(input, dim, correction, keepdim, across)
    return _root(value) if name == "std" else value


def _norm(layouts: Mapping[int, Layout], across: Across, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    order_name = "p" if name == "norm" else "ord"
    names = (order_name, "dim", "keepdim", "dtype") if name != "norm" else ("p", "dim", "keepdim", "out", "dtype")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    order = given.get(order_name, 2)
    if order not in (2, 2.0, None, "fro"):
        raise TypeError(f"only the 2-norm is known, got order {order}")
    dim, dtype = given.get("dim"), given.get("dtype")
    x = x if dtype is None else x.to(dtype)
    axes = _axes(x, dim)
    across.count(x, axes)  # checks them
    return _root(reduce(across.owned(x).square().sum(axes, keepdim=bool(given.get("keepdim", False))), across.comm))


def _working(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _normalised(x: Tensor, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the dims that a norm is over; like the operator, it takes no other shape than that of `x`."""
    own = tuple(x.shape[x.ndim - len(normalized_shape) :])
    if own != tuple(normalized_shape):
        raise PlanError(f"a norm over {list(normalized_shape)} got a local tensor that ends in {list(own)}")
    return tuple(range(x.ndim - len(own), x.ndim))


def _dtype(norm: Any, x: Tensor, weight: Tensor | None) -> torch.dtype:
    """Returns the dtype of torch's norm. Under autocast, and with weights in another dtype, it differs from that of the norm's products."""
    if (weight is None or weight.dtype == x.dtype) and not torch._C._is_any_autocast_enabled():
        return x.dtype
    with torch.no_grad():
        given: torch.dtype = norm(x.new_ones(1), (1,), None if weight is None else weight.new_ones(1)).dtype
    return given


def _rms_norm(
    layouts: Mapping[int, Layout],
    across: Across,
    name: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    x = _working(input)
    axes = _normalised(x, normalized_shape)
    mean_square = _statistic(across.owned(x).square().sum(axes, keepdim=True), across.comm) / across.count(x, axes)
    y = (x * torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps))).to(input.dtype)
    return (y if weight is None else y * weight).to(_dtype(F.rms_norm, input, weight))


def _weight_norm(layouts: Mapping[int, Layout], across: Across, name: str, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    x = _working(v)
    axes = tuple(i for i in range(x.ndim) if i != dim)
    across.count(x, axes)  # checks them
    total = _statistic(across.owned(x).square().sum(axes, keepdim=dim != -1), across.comm)
    return (x * (g.to(x.dtype) / _root(total))).to(v.dtype)


def _layer_norm(
    layouts: Mapping[int, Layout],
    across: Across,
    name: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    x = _working(input)
    axes, comm = _normalised(x, normalized_shape), across.comm
    count = across.count(x, axes)
    centred = x - _statistic(across.owned(x).sum(axes, keepdim=True), comm) / count
    variance = _statistic(across.owned(centred).square().sum(axes, keepdim=True), comm) / count
    y = centred * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(_dtype(F.layer_norm, input, weight))


#: One row a form. A new one needs a member of `DistributedForm`, a row here, and the rule of an operator that asks for it.
FORMS: Mapping[DistributedForm, Form] = MappingProxyType(
    {
        DistributedForm.LOOKUP: Form(frozenset(("embedding",)), _lookup),
        DistributedForm.MEAN: Form(frozenset(("mean",)), _mean),
        DistributedForm.VAR: Form(frozenset(("var", "std")), _var, forward=2, backward=1),
        DistributedForm.VECTOR_NORM: Form(  # 2-norms
            frozenset(("norm", "linalg_vector_norm", "linalg_norm", "vector_norm", "frobenius_norm")), _norm, forward=1
        ),
        DistributedForm.RMS_NORM: Form(frozenset(("rms_norm",)), _rms_norm, forward=1, backward=1),
        DistributedForm.WEIGHT_NORM: Form(frozenset(("_weight_norm",)), _weight_norm, forward=1, backward=1),
        DistributedForm.LAYER_NORM: Form(frozenset(("layer_norm",)), _layer_norm, forward=2, backward=2),
    }
)
