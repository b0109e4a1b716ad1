"""Quantized before or after `parallelize`: the numbers, scales and zero points are those of the whole model, and so is the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.rewrite.modules.linear import LinearRun
from autotp.rewrite.parameters.quantized import QuantizedDTensor
from autotp.rewrite.parameters.quantized_form import Cut
from tests.quantization.models import (
    CONFIGS,
    MODELS,
    apart,
    build,
    config,
    ids,
    mlp,
    nbytes,
    parallel,
    parallel_mlp,
    quantized,
    states_differing,
)
from tests.support.ranks import Pool, mesh
from tests.support.slow import in_turns

pytest.importorskip("torchao")

ORDERS = ("before", "after")


def beside_one_device(kind: str, name: str, order: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What differs from the model that torchao quantized on one device."""
    alone = quantized(build(kind).to(dtype), name)
    if order == "before":
        model = parallel(quantized(build(kind).to(dtype), name), kind, mesh())
    else:
        model = parallel(build(kind).to(dtype), kind, mesh())
        autotp.quantize_(model, config(name))
    with torch.no_grad():
        logits = apart(alone(ids()).logits, model(ids()).logits)
    weights = [p for p in model.parameters() if isinstance(p, QuantizedDTensor)]
    return {
        "state": states_differing(alone.state_dict(), autotp.full_state_dict(model)),
        "logits": logits,
        "cut": sum(p._layout.dim is not None for p in weights) / len(weights),
        "share": nbytes(model) / nbytes(alone),
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("int8 dynamic")])
def test_every_config(pool: Pool, name: str, order: str) -> None:
    for found in pool.run(beside_one_device, "even", name, order):
        assert found["state"] == []
        assert found["logits"] <= 1e-6  # float32, sums in another order
        assert found["cut"] == 1.0
        assert found["share"] < 0.53


@pytest.mark.parametrize(("kind", "world"), in_turns([k for k in MODELS if k != "even"], (2, 3)))
def test_every_layout(pool: Pool, kind: str, world: int) -> None:
    for name, order in (("int8", "before"), ("int4 asymmetric", "after")):
        for found in pool.run(beside_one_device, kind, name, order, world=world):
            assert found["state"] == []
            assert found["logits"] <= 1e-6


@pytest.mark.parametrize("kind", ["even", "padded", "concatenated"])
def test_8_bit_floats_in_double(pool: Pool, kind: str) -> None:
    for found in pool.run(beside_one_device, kind, "fp8", "after", torch.float64, world=3):
        assert found["state"] == []
        assert found["logits"] <= 1e-9


def test_in_bfloat16(pool: Pool) -> None:
    """The weights are equal; activations are rounded to 8 bits, in another order of sums."""
    for name in ("int8", "int4 in groups"):
        for found in pool.run(beside_one_device, "even", name, "after", torch.bfloat16):
            assert found["state"] == []
            assert found["logits"] <= 2**-5


@pytest.mark.parametrize(("tp", "most"), [(2, 0.52), (4, 0.31)])
def test_the_share_that_a_rank_holds(pool: Pool, tp: int, most: float) -> None:
    """The scales of row-parallel weights and the norms are on every rank."""
    for found in pool.run(beside_one_device, "even", "int8", "after", world=tp):
        assert 1 / tp <= found["share"] <= most


def in_double(name: str, order: str, width: int) -> dict[str, float]:
    """A quantized MLP beside one device, outputs and gradients of the input, in float64: torchao's weight is float32."""
    alone, model = quantized(mlp(width), name), mlp(width)
    if order == "before":
        parallel_mlp(quantized(model, name), mesh())
    else:
        parallel_mlp(model, mesh())
        autotp.quantize_(model, config(name))
    for one in (alone, model):
        for linear in (one.up, one.down):
            linear.bias.data = linear.bias.data.double()
    found: dict[str, float] = {}
    inputs = [torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2)]
    a, b = alone(inputs[0]), model(inputs[1])
    a.square().sum().backward(), b.square().sum().backward()
    found["output"] = apart(a, b)
    found["input"] = apart(*(x.grad for x in inputs))
    found["bias"] = apart(alone.up.bias.grad, autotp.full_grads(model)["up.bias"])
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [96, 98])
def test_in_double(pool: Pool, order: str, width: int) -> None:
    for name in ("int8", "int8 of a tensor"):
        for found in pool.run(in_double, name, order, width, world=2 if width == 96 else 3):
            assert max(found.values()) <= 1e-9, found


class Apart(LinearRun):
    """Rounds by the scale of a rank's own part."""

    __slots__ = ()

    def product(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """As one device would round it."""
        return torch.nn.functional.linear(x, weight, bias)


def dynamic(name: str, width: int, without: bool = False) -> tuple[float, list[str]]:
    """An MLP whose inputs are quantized in each call; `without`: each rank finds the scale of its own part."""
    alone, model = quantized(mlp(width), name), parallel_mlp(mlp(width), mesh())
    autotp.quantize_(model, config(name))
    kinds = [type(m.__dict__["_autotp"]).__name__ for m in (model.up, model.down)]
    if without:
        model.down.__dict__["_autotp"].__class__ = Apart
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return apart(alone(x), model(x)), kinds


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ["int8 dynamic", "int8 dynamic of a tensor", "int8 dynamic asymmetric", "int4 rows dynamic"])
def test_inputs_are_rounded_by_the_scale_of_the_whole_input(pool: Pool, name: str, world: int) -> None:
    width = 96 if world == 2 else 80  # 3 ranks hold padding, whose sigmoid is 1/2
    for error, kinds in pool.run(dynamic, name, width, world=world):
        assert kinds == ["LinearRun", "AcrossRanks"]
        assert error <= 1e-6
    for error, _ in pool.run(dynamic, name, width, True, world=world):
        assert error > 1e-4


def whole_model_dynamic() -> tuple[float, float]:
    """The logits beside one device; and how far one unit in the last place of the embedding moves those of one device."""
    alone, model = quantized(build("even"), "int8 dynamic"), parallel(build("even"), "even", mesh())
    autotp.quantize_(model, config("int8 dynamic"))
    with torch.no_grad():
        wanted, got = alone(ids()).logits, model(ids()).logits
        table = alone.get_input_embeddings().weight  # type: ignore[operator]
        table.copy_(torch.nextafter(table, torch.full_like(table, torch.inf)))
        moved = alone(ids()).logits
    return apart(wanted, got), apart(wanted, moved)


def test_a_whole_model_with_dynamic_inputs_differs_by_single_steps_of_them(pool: Pool) -> None:
    """A sum in another order may round an input to the next integer: the model's own answer to a nudge is as large."""
    for error, own in pool.run(whole_model_dynamic):
        assert error <= 3 * own


class Wrong:
    """Mistakes in slices that the tests above must see."""

    @staticmethod
    def scale(self: Any, inner: str, layout: Any, rank: int, name: str) -> Cut:
        """Every rank gets the scales of rank 0."""
        return _cut(self, inner, layout, 0 if inner == "scale" else rank, name)

    @staticmethod
    def zero(self: Any, inner: str, layout: Any, rank: int, name: str) -> Cut:
        """Every rank gets the zero points of rank 0."""
        return _cut(self, inner, layout, 0 if inner == "zero_point" else rank, name)


def _cut(self: Any, *args: Any) -> Cut:
    return Wrong.kept(self, *args)  # type: ignore[attr-defined, no-any-return]


def with_mistake(which: str, name: str) -> float:
    """The error of the logits when slices are wrong."""
    from autotp.rewrite.parameters.quantized_form import Form

    Wrong.kept = kept = Form._cut  # type: ignore[attr-defined]
    Form._cut = getattr(Wrong, which)  # type: ignore[method-assign]
    try:
        return float(beside_one_device("even", name, "after")["logits"])
    finally:
        Form._cut = kept  # type: ignore[method-assign]


@pytest.mark.parametrize(("which", "name"), [("scale", "int8"), ("zero", "int4 asymmetric")])
def test_a_slice_of_another_rank_is_seen(pool: Pool, which: str, name: str) -> None:
    assert max(pool.run(with_mistake, which, name)) > 1e-4


def padded_zero_points(clear: bool) -> float:
    """A row-parallel weight with padding and zero points; `clear`: padding stands for zero."""
    from autotp.rewrite.parameters import quantized_form

    kept = quantized_form._clear
    if not clear:
        quantized_form._clear = lambda *_: None
    try:
        alone, model = quantized(mlp(80), "int4 asymmetric"), parallel_mlp(mlp(80), mesh())
        autotp.quantize_(model, config("int4 asymmetric"))
    finally:
        quantized_form._clear = kept
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return apart(alone(x), model(x))


def test_padding_is_the_zero_point(pool: Pool) -> None:
    assert max(pool.run(padded_zero_points, True, world=3)) <= 1e-6
    assert max(pool.run(padded_zero_points, False, world=3)) > 1e-4


def named() -> list[Any]:
    """FqnToConfig and filters choose as torchao does."""
    from torchao.quantization import FqnToConfig, quantize_

    by_name = FqnToConfig(
        {"re:.*q_proj": config("int8"), "model.layers.1.mlp.up_proj": config("fp8"), "_default": config("int4 asymmetric")}
    )
    alone, model = build("even"), parallel(build("even"), "even", mesh())
    quantize_(alone, by_name, filter_fn=None)
    autotp.quantize_(model, by_name)
    found: list[Any] = states_differing(alone.state_dict(), autotp.full_state_dict(model))

    def in_mlp(module: nn.Module, path: str) -> bool:
        return path.endswith("_proj") and ".mlp." in path

    some, model = quantized(build("even"), "int8", in_mlp), parallel(build("even"), "even", mesh())
    autotp.quantize_(model, config("int8"), in_mlp)
    return found + states_differing(some.state_dict(), autotp.full_state_dict(model))


def test_modules_are_chosen_as_torchao_chooses_them(pool: Pool) -> None:
    assert pool.run(named) == [[], []]


class Attention(nn.Module):
    """torch's own attention, whose output projection torchao leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 32] → the same."""
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def left_out() -> list[str]:
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    alone = Attention().eval()
    torch.manual_seed(0)
    model = autotp.parallelize(Attention().eval(), mesh(), example_inputs={"x": torch.randn(2, 3, 32)})
    quantize_(alone, config("int8"))
    autotp.quantize_(model, config("int8"))
    return states_differing(alone.state_dict(), autotp.full_state_dict(model))


def test_what_torchao_leaves_out_stays(pool: Pool) -> None:
    assert pool.run(left_out) == [[], []]
