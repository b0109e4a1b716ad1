"""Models whose weights are quantized when they become parallel: the plan is that of plain weights, and the rank's part a slice.

A plan depends on shapes, not on how a weight is stored. So plain weights stand in the place of quantized ones while it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autotp.errors import AutoTPError, PlanError
from autotp.examine import TWIN_FROM
from autotp.hugging_face import is_hugging_face
from autotp.numeric.check import too_large
from autotp.plan.plan import Plan
from autotp.rewrite.modules.quantized import is_linear, settle
from autotp.rewrite.parameters.quantized import QuantizedDTensor
from autotp.rewrite.parameters.quantized_form import Form, is_quantized

#: dtypes of codes, which only the kernel that goes with them reads.
_CODES = frozenset((torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu))


def refuse_codes(model: nn.Module) -> None:
    """Raise where a quantized weight cannot be cut: its module computes with codes by a kernel of its own, or is no Linear.

    Raises:
        AutoTPError: names the weight.
    """
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if is_quantized(p):
                Form.of(p, f"{path}.{name}" if path else name)
                _refuse_place(module, path, name)
        method = next((m.__dict__["quantization_method"] for m in (module, model) if "quantization_method" in m.__dict__), None)
        codes = [(n, p) for n, p in module._parameters.items() if p is not None and p.dtype in _CODES]
        if method is not None:  # whose kernels may read buffers
            codes += [(n, b) for n, b in module._buffers.items() if b is not None and b.ndim > 1 and not b.is_floating_point()]
        found = next(((n, t) for n, t in codes if t.ndim > 1 and not is_quantized(t)), None)
        if found is not None:
            name, tensor = found
            by = f" by {getattr(method, 'value', method)}" if method is not None else ""
            raise PlanError(
                f"{path}.{name} ({type(module).__qualname__}) is quantized{by}: a {type(tensor).__name__} of {tensor.dtype}, which a "
                "kernel of its own reads, and which autotp cannot cut. Load plain weights (dequantize=True in the config, where it has "
                "that), and quantize by torchao: autotp.quantize_(model, config) after parallelize"
            )


def settle_all(model: nn.Module, plan: Plan) -> None:
    """Settles every Linear whose weight was quantized before the model became parallel.

    Raises:
        AutoTPError: a module cannot compute with its part of a quantized weight.
    """
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if isinstance(p, QuantizedDTensor):
                _refuse_place(module, path, name)
                settle(module, path, plan)


def _refuse_place(module: nn.Module, path: str, name: str) -> None:
    if name != "weight" or not is_linear(module):
        raise AutoTPError(
            f"{f'{path}.{name}' if path else name}, of a {type(module).__qualname__}, is quantized, and autotp cuts quantized weights of "
            "modules with the forward of nn.Linear: quantize without it (filter_fn)"
        )


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Puts plain weights of the same shapes in the place of quantized ones while a plan is made: it depends on shapes alone.

    Where the check of numbers runs the model itself they have the values of the quantized ones; else they are on the meta device.
    """
    found = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if is_quantized(p)]
    elements = sum(p.numel() for p in model.parameters())
    bare = bool(too_large(model, 1)) or (is_hugging_face(model) and elements > TWIN_FROM)
    made: dict[int, nn.Parameter] = {}
    try:
        for module, name, p in found:
            if id(p) not in made:
                made[id(p)] = nn.Parameter(_plain(p, bare), requires_grad=bool(p is not None and p.requires_grad))
            module._parameters[name] = made[id(p)]
        yield
    finally:
        for module, name, p in found:
            module._parameters[name] = p


def _plain(p: Any, bare: bool) -> torch.Tensor:
    if bare or p.is_meta or not hasattr(p, "dequantize"):
        return torch.empty(p.shape, dtype=p.dtype, device="meta")
    with torch.no_grad():
        return p.dequantize()  # type: ignore[no-any-return]
