"""What cannot be quantized, or cannot be cut, is one error that says what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.plan.spec import Boundary, Shown
from tests.quantization.models import Mlp, apart, build, config, failure, ids, mlp, parallel, parallel_mlp, quantized, states_differing
from tests.support.ranks import Pool, mesh

pytest.importorskip("torchao")

X = {"x": torch.randn(2, 3, 64)}


class Twice(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Twice the product."""
        return 2 * F.linear(input, self.weight, self.bias)


class Odd(Mlp):
    """An `Mlp` with one."""

    def __init__(self) -> None:
        super().__init__(96)
        self.odd = Twice(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[.., 64] → [.., 64]"""
        return self.odd(super().forward(x))


class Codes(nn.Parameter):
    """As the parameters of bitsandbytes are: codes in a class of its own."""


class OfAKernel(nn.Module):
    """A layer of a library whose kernels are not here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Codes(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product of another kernel."""
        return F.linear(x, self.weight.to(x.dtype))


def packed() -> Any:
    """A weight as torchao's int4 kernel for GPUs has it, which a checkpoint may hold."""
    from torchao.quantization import Int4Tensor

    scale = torch.ones(2, 96, dtype=torch.bfloat16)
    return Int4Tensor(torch.zeros(96, 32, dtype=torch.uint8), scale, torch.zeros_like(scale), [1, 32], torch.Size((96, 64)))


def at_quantization() -> list[str]:
    """Refusals of `quantize_`; the model is as it was after each of them."""
    import torchao.quantization as ao

    model, alone = parallel(build("even"), "even", mesh()), build("even")
    odd = autotp.parallelize(Odd().eval(), mesh(), example_inputs=X)
    with torch.device("meta"):
        bare = autotp.parallelize(Mlp(96), mesh(), example_inputs=X, check="graph")
    found = [
        failure(lambda: autotp.quantize_(model, ao.Int4WeightOnlyConfig(group_size=32))),
        failure(lambda: autotp.quantize_(model, ao.Float8DynamicActivationFloat8WeightConfig())),
        failure(lambda: autotp.quantize_(model, ao.IntxWeightOnlyConfig(), lambda m, _: isinstance(m, nn.Embedding))),
        failure(lambda: autotp.quantize_(model, "int8")),
        failure(lambda: autotp.quantize_(model, ao.FqnToConfig({}), lambda m, _: True)),
        failure(lambda: autotp.quantize_(alone, config("int8"))),
        failure(lambda: autotp.quantize_(model, ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(48)))),
        failure(lambda: autotp.quantize_(odd, config("int8"))),
        failure(lambda: autotp.quantize_(bare, config("int8"))),
        failure(lambda: autotp.quantize_(model, config("int8" if torch.distributed.get_rank() else "fp8"))),
        failure(
            lambda: autotp.quantize_(
                model, config("int8"), lambda _, path: path.endswith("proj" if torch.distributed.get_rank() else "q_proj")
            )
        ),
    ]
    with torch.no_grad():
        same = apart(alone(ids()).logits, model(ids()).logits) <= 1e-6
    found.append(f"{same} {states_differing(alone.state_dict(), autotp.full_state_dict(model))}")
    return found


def test_quantize(pool: Pool) -> None:
    first, second = pool.run(at_quantization)
    assert first == second
    wanted = [
        "torchao cannot quantize model.layers.0.self_attn.q_proj here by Int4WeightOnlyConfig: Requires mslk",
        "here by Float8DynamicActivationFloat8WeightConfig: Float8 dynamic quantization requires CUDA",
        "model.embed_tokens, a Embedding, is to be quantized",
        "config: got str, wanted a config of torchao.quantization",
        "filter_fn: an FqnToConfig says itself which modules are quantized",
        "is not parallel: call autotp.parallelize(model, mesh) first",
        "torchao cannot quantize model.layers.0.self_attn.q_proj here by Int8WeightOnlyConfig: Last dimension of input 64",
        "odd, a Twice, is to be quantized, and autotp quantizes modules with the forward of nn.Linear: leave it out (filter_fn)",
        "up.weight is on the meta device: load the weights before quantize_",
        "the ranks quantize by other configs, or other modules",
        "the ranks quantize by other configs, or other modules",
        "True []",
    ]
    for got, part in zip(first, wanted, strict=True):
        assert part in got, got


def put_into_a_plain_one() -> list[str]:
    """Weights that quantize their input, put into a plain parallel model by everything but `quantize_`."""
    kind = "int8 dynamic"
    alone = quantized(mlp(96), kind)
    plain = lambda: parallel_mlp(mlp(96), mesh())  # noqa: E731
    good = plain()
    autotp.quantize_(good, config(kind))
    x, state = X["x"], good.state_dict()

    def assigned() -> None:
        model = plain()
        model.down.weight = good.down.weight
        model(x)

    with torch.no_grad():
        found = [
            failure(lambda: plain().load_state_dict(alone.state_dict(), assign=True)),
            failure(lambda: setattr(plain().up.weight, "data", alone.up.weight.data)),
            failure(assigned),
            failure(lambda: torch.func.functional_call(plain(), state, (x,))),
        ]
        model = plain()
        model.up.weight = nn.Parameter(model.up.weight.full_tensor())
        found.append(failure(lambda: autotp.quantize_(model, config("int8"))))
        control = plain()
        autotp.quantize_(control, config(kind))
        control.load_state_dict(state, assign=True)
        found.append(str(apart(alone(x), control(x)) <= 1e-6))
    return found


def test_weights_that_are_put_into_a_plain_model(pool: Pool) -> None:
    first, second = pool.run(put_into_a_plain_one)
    assert first == second
    wanted = ["call autotp.quantize_(model, config)"] * 4 + ["up.weight is a Parameter that was put there after parallelize", "True"]
    for got, part in zip(first, wanted, strict=True):
        assert part in got, got


def at_parallelize() -> list[str]:
    """Refusals of models that are quantized already."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    def with_linear(layer: nn.Module, **marks: Any) -> nn.Module:
        model = mlp(96)
        model.up = layer
        model.__dict__.update(marks)
        return model

    int4 = mlp(96)
    int4.up._parameters["weight"] = nn.Parameter(packed(), requires_grad=False)
    embedding = nn.Sequential(nn.Embedding(64, 64), mlp(96))
    embedding[0]._parameters["weight"] = nn.Parameter(quantized(nn.Linear(64, 64), "fp8").weight, requires_grad=False)
    parallelize = lambda model: autotp.parallelize(model, mesh(), example_inputs=X)  # noqa: E731
    return [
        failure(lambda: parallelize(int4)),
        failure(lambda: parallelize(with_linear(OfAKernel()))),
        failure(lambda: parallelize(with_linear(OfAKernel(), quantization_method="bitsandbytes"))),
        failure(lambda: parallelize(with_linear(FP8Linear(64, 96), quantization_method="fp8"))),
        failure(lambda: autotp.parallelize(embedding, mesh(), example_inputs={"input": ids()})),
    ]


def test_parallelize(pool: Pool) -> None:
    first, second = pool.run(at_parallelize)
    assert first == second
    wanted = [
        "up.weight is a Int4Tensor of torchao, which is packed for its kernel: no rank can hold a slice of it",
        "up.weight (OfAKernel) is quantized: a Codes of torch.int8",
        "up.weight (OfAKernel) is quantized by bitsandbytes: a Codes of torch.int8",
        "up.weight (FP8Linear) is quantized by fp8: a Parameter of torch.float8_e4m3fn",
        "0.weight, of a Embedding, is quantized",
    ]
    for got, part in zip(first, wanted, strict=True):
        assert part in got, got
    assert all("autotp.quantize_(model, config) after parallelize" in text for text in first[1:4])


def groups(rank_granule: int | None) -> Any:
    """96 entries in groups of 8 over 5 ranks: 20 each, which is no multiple of 8; 24 are."""
    model, alone = mlp(96), quantized(mlp(96), "int8 in groups")
    layouts = None
    if rank_granule is not None:
        layouts = {
            "families": [],
            "shard": ["i"],
            "granules": {"i": rank_granule},
            "column": {"up.weight": "i e", "up.bias": "i"},
            "row": {"down.weight": "e i", "down.bias": "e"},
        }
    autotp.parallelize(model, mesh(), example_inputs=X, recipe=layouts)
    said = failure(lambda: autotp.quantize_(model, config("int8 in groups")))
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        return said, apart(alone(x), model(x))


def test_groups_are_not_of_two_ranks(pool: Pool) -> None:
    for said, _ in pool.run(groups, None, world=5):
        assert "down.weight, a Int8Tensor, has blocks of 8 along its dim 1 of 96, and 5 ranks cut it inside of blocks (e i*)" in said
        assert "choose a group_size that divides each rank's 20 entries" in said and "`granules`" in said
    for said, error in pool.run(groups, 8, world=5):
        assert said == "nothing was raised" and error <= 1e-6


class Sums(nn.Module):
    """Three Linears, of which the last gets the sum of another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.last = nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., 64] → [.., 8]"""
        return self.last(self.down(torch.relu(self.up(x))))


def sums(seed: int = 0) -> Sums:
    """The model in eval mode."""
    torch.manual_seed(seed)
    return Sums().eval()


def inputs_that_are_quantized() -> list[Any]:
    """The equal case; then plans that say that the input of a Linear is not whole, and a kernel that takes no scale."""
    from torchao.quantization import Float8Tensor, Int8DynamicActivationInt8WeightConfig, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    alone = quantized(sums(), "int8 dynamic")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        model = autotp.parallelize(sums(), mesh(), example_inputs=X)
        autotp.quantize_(model, config("int8 dynamic"))
        found: list[Any] = [apart(alone(x), model(x)) <= 1e-6]

    def shown(kind: Shown, by: Any) -> str:
        model = autotp.parallelize(sums(), mesh(), example_inputs=X)
        plan = autotp.plan_of(model)
        plan = replace(plan, boundaries={**plan.boundaries, "up": (Boundary(False, ("input",), kind),)})
        model.__dict__["_autotp"] = replace(model.__dict__["_autotp"], plan=plan)
        said = failure(lambda: autotp.quantize_(model, by))
        with torch.no_grad():
            assert said == "nothing was raised" or apart(sums()(x), model(x)) <= 1e-6  # as it was
        return said

    by_tensor = Int8DynamicActivationInt8WeightConfig(granularity=[PerTensor(), PerTensor()])
    found += [shown(Shown.SUM, config("int8 dynamic")), shown(Shown.PART, config("int8 dynamic")), shown(Shown.PART, by_tensor)]
    found.append(shown(Shown.SUM, config("int8")))

    eight = mlp(96)
    for linear in (eight.up, eight.down):
        data = linear.weight.data.to(torch.float8_e4m3fn)
        options: dict[str, Any] = {"act_quant_kwargs": QuantizeTensorToFloat8Kwargs(), "dtype": torch.float32}
        weight = Float8Tensor(data, torch.ones(data.shape[0], 1), [1, data.shape[1]], **options)
        linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    found.append(failure(lambda: autotp.parallelize(eight, mesh(), example_inputs=X)))
    return found


def test_inputs_that_are_quantized(pool: Pool) -> None:
    first, second = pool.run(inputs_that_are_quantized)
    assert first == second
    equal, summand, part, part_by_tensor, weight_only, eight = first
    assert equal is True
    assert "up gets a summand of its input on each rank" in summand and "quantize the weight alone" in summand
    assert part == weight_only == "nothing was raised"
    assert "up quantizes its input by one scale, and each rank has a part" in part_by_tensor
    assert "down is row-parallel, and torchao's Float8Tensor takes no scale for its input" in eight
