"""A parameter of a parallel model that torchao quantized is a `QuantizedDTensor`.

It is a `LayoutDTensor` whose local tensor is torchao's: this rank's slices of the numbers, scales and zero points of the whole weight
(`autotp.rewrite.parameters.quantized_form`). Forwards read the local tensor, with which torchao's operators compute. Outside of them
the parameter can be read whole, copied, moved and loaded; nothing computes with it, and nothing trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import TensorMeta

from autotp.errors import AutoTPError
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, new_dtensor
from autotp.rewrite.parameters.make import as_dtensor, keep_attributes
from autotp.rewrite.parameters.quantized_form import Form, is_quantized

_aten = torch.ops.aten
_DETACHED = frozenset((_aten.detach.default, _aten.alias.default))
_COPIED = frozenset((_aten.clone.default, _aten._to_copy.default))


class QuantizedDTensor(LayoutDTensor):
    """A quantized weight that is laid out over ranks; its dtype is that in which it computes."""

    _form: Form

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        x = args[0] if args else None
        if isinstance(x, QuantizedDTensor):
            if func in _DETACHED:
                return x._placed(x._spec, x._local_tensor, x._layout)
            if func in _COPIED:
                return x._placed(x._spec, func(x._local_tensor, *args[1:], **(kwargs or {})), x._layout)
            if func is _aten.copy_.default:
                x._take(args[1])
                return x
        raise AutoTPError(
            f"{func} on a quantized weight of a parallel model: nothing changes it or computes with it outside of its module. Read it by "
            "full_tensor().dequantize(); load, change or merge weights before they are quantized (autotp.quantize_)"
        )

    def _take(self, source: Tensor) -> None:
        """Takes the values of a whole weight, or of one laid out alike, that is quantized in the same way."""
        if isinstance(source, LayoutDTensor):
            part: Any = source._local_tensor if isinstance(source, QuantizedDTensor) and source._form == self._form else None
        else:
            same = is_quantized(source) and Form.of(source, "the weight that is loaded") == self._form
            part = self._form.cut(source, self._layout, self._rank, "the weight that is loaded") if same else None
        if part is None:
            raise AutoTPError(
                f"a quantized weight ({self._form.kind.__name__} of shape {self._form.shape}) takes a weight that is quantized in the same "
                f"way, got {_said(source)}: load the weights before autotp.quantize_, or the state of a model that is quantized so"
            )
        self._local_tensor.copy_(part)

    @property
    def data(self) -> Any:
        """The tensor without its history; assigned: a whole weight, or one laid out alike, that is quantized in the same way.

        Raises:
            AutoTPError: for any other.
        """
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, QuantizedDTensor) and value._form == self._form:
            self._local_tensor, self._spec, self._layout = value._local_tensor, value._spec, value._layout
        else:
            self._take(value)

    def _placed(self, spec: Any, local: Tensor, layout: Layout) -> LayoutDTensor:
        return _made(spec, local, layout, self._form)

    def _cut(self, whole: Tensor) -> LayoutDTensor:
        if not is_quantized(whole) or Form.of(whole, "the weight that is loaded") != self._form:
            self._take(whole)  # raises
        return self._placed(self._spec, self._part(whole), self._layout)

    def _part(self, whole: Tensor) -> Tensor:
        return self._form.cut(whole, self._layout, self._rank, "the weight")

    def _whole(self) -> Tensor:
        """The whole weight, as torchao's tensor. Collective."""
        return self._form.whole(self._local_tensor, self._layout, self._comm.all_gather)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """Returns the whole weight as torchao's tensor, in the model's order and shape. Collective."""
        return self._whole()

    def to_local(self, *, grad_placements: Any = None) -> Tensor:
        """Returns this rank's part, as torchao's tensor."""
        return self._local_tensor

    def dequantize(self) -> Tensor:
        """Returns the whole weight in its dtype, not quantized. Collective."""
        whole: Any = self._whole()
        return whole.dequantize()  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        local: Any = self._local_tensor
        return int(local.qdata.data_ptr()) if getattr(self, "_is_param", False) else 0

    def _held(self) -> Tensor:
        raise AutoTPError(
            f"a quantized weight ({self._form.kind.__name__}) is not written by autotp.checkpoint.save or autotp.save_pretrained: save "
            "autotp.full_state_dict(model) with torch.save, or the adapters alone; load the weights and quantize them again "
            "(autotp.quantize_)"
        )

    def _sharded(self) -> Any:
        return self._held()

    def __tensor_flatten__(self) -> Any:
        inner, (spec, meta, *rest) = super().__tensor_flatten__()
        return inner, (spec, _Meta.made(meta, self._layout, self._form), *rest)

    @staticmethod
    def __tensor_unflatten__(inner_tensors: Any, flatten_spec: Any, outer_size: Any, outer_stride: Any) -> DTensor:
        made: Any = DTensor.__tensor_unflatten__(inner_tensors, flatten_spec, outer_size, outer_stride)  # type: ignore[no-untyped-call]
        return _rebuilt(made, flatten_spec[1].layout, flatten_spec[1].form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedDTensor({self._form.kind.__name__}, shape={tuple(self.shape)}, layout={self._layout})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        ordinary = new_dtensor(DTensor, self._local_tensor, self._spec, requires_grad=False)
        return _rebuilt, (ordinary, self._layout, self._form)


class _Meta(TensorMeta):
    """DTensor's size, stride and dtype, equal to those without a layout and a form."""

    layout: Layout
    form: Form

    @staticmethod
    def made(meta: TensorMeta, layout: Layout, form: Form) -> _Meta:
        made = _Meta(*meta)
        made.layout, made.form = layout, form
        return made


def _said(source: Tensor) -> str:
    kind = source._form.kind if isinstance(source, QuantizedDTensor) else type(source)
    return f"a {kind.__name__} of shape {tuple(source.shape)}, {source.dtype}"


def _made(spec: Any, local: Tensor, layout: Layout, form: Form) -> QuantizedDTensor:
    made: QuantizedDTensor = new_dtensor(QuantizedDTensor, local, spec, requires_grad=False)
    made._layout, made._form = layout, form
    return made


def _rebuilt(tensor: DTensor, layout: Layout, form: Form) -> QuantizedDTensor:
    return _made(tensor._spec, tensor._local_tensor, layout, form)


def quantized_param(local: Tensor, form: Form, layout: Layout, mesh: DeviceMesh, old: nn.Parameter | None = None) -> nn.Parameter:
    """Returns the parameter of one rank over `local`, its part of a weight of this form. It does not train.

    `old`: the parameter that it replaces, whose attributes it keeps.
    """
    ordinary = as_dtensor(local, layout, mesh)
    new = nn.Parameter(_made(ordinary._spec, local, layout, form), requires_grad=False)
    if old is not None:
        keep_attributes(old, new)
    return new


def cut_onto(mesh: DeviceMesh, otherwise: Callable[[str, nn.Parameter, Layout], nn.Parameter]) -> Callable[..., nn.Parameter]:
    """A `make_param` that slices weights that torchao quantized onto the 1-D `mesh`, and makes all others as `otherwise` does."""
    rank = mesh.get_local_rank()

    def make_param(name: str, old: nn.Parameter, layout: Layout) -> nn.Parameter:
        if not is_quantized(old):
            return otherwise(name, old, layout)
        form = Form.of(old, name)
        with torch.no_grad():
            return quantized_param(form.cut(old, layout, rank, name), form, layout, mesh, old)

    return make_param


# What `torch.load` must know to read one, beside torchao's classes.
torch.serialization.add_safe_globals([_rebuilt, Form])
