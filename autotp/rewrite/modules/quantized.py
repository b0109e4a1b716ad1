"""Runs Linears whose weight is quantized, where that takes more than reading the local weight.

torchao's operator computes with the local weight: it is linear in the input, so that copies, sums and gathers stand where they stood.
That ends where the input is quantized too, by a scale that each call finds in the input's largest entries (of a token, or of all).

    the input is whole              every rank finds the scale of the whole
    a rank's part, cut along K      the ranks compare their extremes first; `AcrossRanks` gives torchao the scale of the whole
    a summand, or not known         refused: the scale of a sum is no sum of scales
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.plan.spec import Shown
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.modules.classes import BASE, STATE
from autotp.rewrite.modules.linear import LinearRun
from autotp.rewrite.parameters.quantized import QuantizedDTensor
from autotp.rewrite.parameters.quantized_form import Form, is_quantized
from autotp.trace.reading import has_forward_of

_INTX = "torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor"
_INSTEAD = "quantize the weight alone (Int8WeightOnlyConfig, IntxWeightOnlyConfig), or keep it as it is (filter_fn)"


class AcrossRanks(LinearRun):
    """Runs a row-parallel Linear that quantizes its input by the scale that the whole input has."""

    __slots__ = ()

    def product(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Returns this rank's summand: of integers that are a slice of those of the whole input."""
        layout = self.weight.layout
        if layout is None or not is_quantized(weight):
            return super().product(x, weight, bias)
        if "act_quant_kwargs" in Form.of(weight, "the weight").attributes:
            return _int8(x, weight, bias, _extremes(x, layout, self.comm, per_token=_per_token(weight.act_quant_kwargs)))
        return _per_token_asymmetric(x, weight, bias, _extremes(x, layout, self.comm, per_token=True))


def _per_token(kwargs: Any) -> bool:
    return type(kwargs.granularity).__name__ != "PerTensor"


@torch.no_grad()
def _extremes(x: Tensor, layout: Layout, comm: Comm, *, per_token: bool) -> Tensor:
    """Returns the least and the largest entry of the whole input, of shape [.., 2] (of each token) or [1, …, 1, 2]. Collective."""
    real = x
    if layout.padding(comm.rank):  # entries of no index, which the weight ignores, must not make the scale
        real = x.clone()
        for a, b in layout.padding(comm.rank):
            real.narrow(-1, a, b - a).zero_()
    over = (-1,) if per_token else tuple(range(x.dim()))
    own = torch.cat([real.amin(over, keepdim=True), real.amax(over, keepdim=True)], -1)
    everyone = torch.stack(list(comm.all_gather(own)))
    return torch.cat([everyone[..., :1].amin(0), everyone[..., 1:].amax(0)], -1)


def _int8(x: Tensor, weight: Any, bias: Tensor | None, extremes: Tensor) -> Tensor:
    """The extremes stand for the input: they have its scale. torchao then takes the scale as it takes one that was found before."""
    kwargs, kind = weight.act_quant_kwargs, type(weight)
    found = kind.from_hp(extremes, granularity=kwargs.granularity, mapping_type=kwargs.mapping_type, reduce_range=kwargs.reduce_range)
    names, attributes = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names} | {"act_quant_scale": found.scale, "act_quant_zero_point": found.zero_point}
    return F.linear(x, kind.__tensor_unflatten__(inner, attributes, None, None), bias)


def _per_token_asymmetric(x: Tensor, weight: Any, bias: Tensor | None, extremes: Tensor) -> Tensor:
    """The extremes are rounded beside the input, as two more of its channels, and are left out of the product."""
    rounded = getattr(importlib.import_module(_INTX), "_apply_int8_act_asym_per_token_quant_dequant")  # noqa: B009  # private to torchao
    return F.linear(rounded(torch.cat([x, extremes], -1))[..., :-2], weight.dequantize(), bias)


def is_linear(module: nn.Module) -> bool:
    """True for a module that runs as `nn.Linear` does, rewritten or not."""
    return has_forward_of(getattr(type(module), BASE, type(module)), nn.Linear)


def settle(module: nn.Module, path: str, plan: Plan) -> None:
    """Have the Linear at `path`, whose weight has become quantized, find the scales of its input over the ranks.

    Raises:
        AutoTPError: names what cannot be done.
    """
    weight = module._parameters["weight"]
    assert isinstance(weight, QuantizedDTensor)
    form, layout = weight._form, weight._layout
    if not form.quantizes_activations or layout.tp == 1:
        return
    kinds = {b.shown for b in plan.boundaries.get(path, ()) if not b.result}
    cut = layout.dim == len(layout.shape) - 1
    if kinds - {Shown.PART, Shown.GRADIENT}:
        raise AutoTPError(
            f"{path} gets a summand of its input on each rank (or what no trace shows), whose scale is not that of the whole input: "
            f"{_INSTEAD}"
        )
    run: Any = module.__dict__.get(STATE)
    if not cut:
        if Shown.PART in kinds and form.attributes.get("act_quant_kwargs") and not _per_token(form.attributes["act_quant_kwargs"]):
            raise AutoTPError(f"{path} quantizes its input by one scale, and each rank has a part of the tokens' entries: {_INSTEAD}")
        return
    if form.kind.__name__ == "Float8Tensor":
        raise AutoTPError(
            f"{path} is row-parallel, and torchao's Float8Tensor takes no scale for its input: each rank would round its part by a scale "
            f"of its own. Use Float8WeightOnlyConfig there, or {_INSTEAD}"
        )
    if not isinstance(run, LinearRun):
        raise AutoTPError(f"{path} is row-parallel with code of its own around the product, and quantizes its input: {_INSTEAD}")
    run.__class__ = AcrossRanks
