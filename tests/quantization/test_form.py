"""Cutting quantized weights, without ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.plan.expressions import Concat, Expr, Factor, Product
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.quantized_form import Form
from tests.quantization.models import quantized

pytest.importorskip("torchao")

NAMES = ("int8", "int8 of a tensor", "int8 in groups", "fp8", "int4 in groups", "int4 asymmetric")


def cut(size: int, granule: int = 1) -> Factor:
    """A dim that is cut."""
    return Factor("i", size, True, granule=granule)


#: how a dim of 96 is cut
DIMS: dict[str, tuple[Expr, int]] = {
    "evenly": (cut(96), 2),
    "inside of groups": (cut(96), 4),
    "with padding": (cut(96, 8), 5),
    "concatenated": (Concat((cut(64), Factor("k", 32, False))), 2),
    "by heads": (Product((Factor("h", 6, True), Factor("d", 16))), 4),
}


def forms(name: str, dim: int, how: str) -> tuple[Any, Layout]:
    """A weight of 96 × 96, and its layout."""
    torch.manual_seed(0)
    expr, tp = DIMS[how]
    whole = Factor("o", 96)
    return quantized(nn.Linear(96, 96), name).weight, Layout((96, 96), (expr, whole) if dim == 0 else (whole, expr), tp)


@pytest.mark.parametrize("how", list(DIMS))
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_part_stands_for_the_part_of_the_weight(name: str, dim: int, how: str) -> None:
    weight, layout = forms(name, dim, how)
    form = Form.of(weight, "weight")
    parts: list[Any] = [form.cut(weight, layout, rank, "weight") for rank in range(layout.tp)]
    for rank, part in enumerate(parts):
        assert type(part) is type(weight) and tuple(part.shape) == layout.local_shape
        assert torch.equal(part.dequantize(), layout.shard(weight.dequantize(), rank))
    names = weight.__tensor_flatten__()[0]

    def gather(own: Tensor) -> Sequence[Tensor]:
        name = next(n for n in names if any(_bits(getattr(p, n)) == _bits(own) and getattr(p, n).shape == own.shape for p in parts))
        return [getattr(p, name).view(own.dtype) for p in parts]

    again: Any = form.whole(parts[0], layout, gather)
    assert list(again.block_size) == list(weight.block_size)
    assert all(_bits(getattr(again, n)) == _bits(getattr(weight, n)) for n in names)


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_what_is_read_is_what_is_cut() -> None:
    """A rank reads the boxes that it needs, and gets the slices."""
    for name in NAMES:
        for how in DIMS:
            weight, layout = forms(name, 1, how)
            form, read = Form.of(weight, "weight"), 0

            for rank in range(layout.tp):

                def part(inner: str, found: Any) -> Tensor:
                    source: Tensor = getattr(weight, inner)  # noqa: B023

                    def box(box: Any) -> Tensor:
                        nonlocal read
                        piece = source[tuple(slice(a, b) for a, b in box)]
                        read += piece.nbytes
                        return piece

                    return found.read(box, tuple(source.shape))  # type: ignore[no-any-return]

                own: Any = form.local(layout, rank, "weight", part)
                wanted: Any = form.cut(weight, layout, rank, "weight")
                assert all(_bits(getattr(own, n)) == _bits(getattr(wanted, n)) for n in weight.__tensor_flatten__()[0])
            assert read <= 1.4 * form.nbytes * (1 if how != "concatenated" else 4 / 3), (name, how)


def test_small_blocks_are_refused() -> None:
    weight, _ = forms("int8 in groups", 1, "evenly")
    layout = Layout((96, 96), (Factor("o", 96), cut(96)), 5)
    with pytest.raises(AutoTPError, match="weight, a Int8Tensor, has blocks of 8 along its dim 1 of 96, and 5 ranks cut it inside"):
        Form.of(weight, "weight").cut(weight, layout, 0, "weight")


def test_blocks_of_kernels_for_8_bit_floats_keep_their_size() -> None:
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    data = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
    weight = Float8Tensor(data, torch.ones(2, 2), [32, 32], act_quant_kwargs=QuantizeTensorToFloat8Kwargs(), dtype=torch.float32)
    even, inside = (Layout((64, 64), (Factor("o", 64, True), Factor("i", 64)), tp) for tp in (2, 4))
    form = Form.of(weight, "weight")
    assert tuple(form.cut(weight, even, 1, "weight").scale.shape) == (1, 2)  # type: ignore[attr-defined]
    with pytest.raises(AutoTPError, match="blocks of 32 along its dim 0"):
        form.cut(weight, inside, 1, "weight")
