"""Small models, torchao's configs that run on a CPU, and what is compared of a quantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import autotp
from autotp.api import parallelize_as
from autotp.plan.plan import Plan
from autotp.rewrite.parameters.quantized_form import is_quantized

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: layout → (config class of transformers, its arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("LlamaConfig", LLAMA),
    "biased": ("Qwen2Config", LLAMA),
    "concatenated": ("Phi3Config", {**LLAMA, "pad_token_id": 0}),
    "padded": ("LlamaConfig", {**LLAMA, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "vocab_size": 41}),
    "shared": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 1}),
    "tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "joint": ("GPTNeoXConfig", {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "use_parallel_residual": True}),
}
#: name → torchao's config: (class, arguments); names of enums and granularities are looked up, so that torchao is imported late.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("Int8WeightOnlyConfig", {}),
    "int8 of a tensor": ("Int8WeightOnlyConfig", {"granularity": ("PerTensor",)}),
    "int8 in groups": ("Int8WeightOnlyConfig", {"granularity": ("PerGroup", 8)}),
    "int8 dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
    "int8 dynamic of a tensor": ("Int8DynamicActivationInt8WeightConfig", {"granularity": ("PerTensor",)}),
    "int8 dynamic asymmetric": ("Int8DynamicActivationInt8WeightConfig", {"act_mapping_type": "ASYMMETRIC"}),
    "fp8": ("Float8WeightOnlyConfig", {}),
    "int4 in groups": ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4, "granularity": ("PerGroup", 32)}),
    "int4 asymmetric": (
        "IntxWeightOnlyConfig",
        {"weight_dtype": torch.int4, "granularity": ("PerAxis", 0), "mapping_type": "ASYMMETRIC"},
    ),
    "int4 dynamic": (
        "Int8DynamicActivationIntxWeightConfig",
        {"weight_dtype": torch.int4, "weight_granularity": ("PerGroup", 8)},
    ),
    "int4 rows dynamic": (
        "Int8DynamicActivationIntxWeightConfig",
        {"weight_dtype": torch.int4, "weight_granularity": ("PerAxis", 0)},
    ),
}
_PLANS: dict[tuple[str, int], Plan] = {}


def config(name: str) -> Any:
    """The config of torchao called `name`."""
    import torchao.quantization as ao

    kind, options = CONFIGS[name]
    made = {k: getattr(ao, v[0])(*v[1:]) if isinstance(v, tuple) else v for k, v in options.items()}
    made = {k: getattr(ao.MappingType, v) if isinstance(v, str) else v for k, v in made.items()}
    return getattr(ao, kind)(**made)


def quantized(model: nn.Module, name: str, chosen: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """The model, quantized by torchao on one device."""
    from torchao.quantization import quantize_

    quantize_(model, config(name), **({} if chosen is None else {"filter_fn": chosen}))
    return model


def build(kind: str, seed: int = 0) -> nn.Module:
    """The model in float32 and eval mode."""
    torch.manual_seed(seed)
    name, options = MODELS[kind]
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    return made.eval()


def parallel(model: nn.Module, kind: str, mesh: DeviceMesh) -> nn.Module:
    """The model over the mesh; one plan serves all models of a kind, quantized or not."""
    key = kind, mesh.size()
    if key in _PLANS:
        return parallelize_as(model, mesh, _PLANS[key])
    made = autotp.parallelize(model, mesh, check="graph")
    _PLANS[key] = autotp.plan_of(made)
    return made


def ids(seed: int = 1) -> Tensor:
    """Tokens."""
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(seed))


def inner(tensor: Any) -> dict[str, Tensor]:
    """The plain tensors that a tensor is made of."""
    if not is_quantized(tensor):
        return {"": tensor}
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def states_differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names under which two states differ in a bit, a shape, a class or an attribute of a quantized weight."""
    found = [n for n in {**a, **b} if n not in a or n not in b]
    for name in a.keys() & b.keys():
        x, y = inner(a[name]), inner(b[name])
        same = type(a[name]) is type(b[name]) and x.keys() == y.keys() and all(_same(x[n], y[n]) for n in x)
        if not same or (is_quantized(a[name]) and _attributes(a[name]) != _attributes(b[name])):
            found.append(name)
    return found


def _attributes(tensor: Any) -> dict[str, Any]:
    found = dict(tensor.__tensor_flatten__()[1])
    found["block_size"] = list(found["block_size"])  # a tuple becomes a list in a file
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    bits = partial(torch.Tensor.view, dtype=torch.uint8)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def nbytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    locals_ = {id(p): p._local_tensor if isinstance(p, DTensor) else p for p in model.parameters()}
    return sum(t.nbytes for p in locals_.values() for t in inner(p).values())


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry of `a`."""
    return float((a - b).abs().max() / a.abs().max())


class Mlp(nn.Module):
    """Two Linears: column- and row-parallel; `width` entries between them."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, width, bias), nn.Linear(width, 64, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[.., 64] → [.., 64]"""
        return self.down(torch.sigmoid(self.up(x)))


def mlp(width: int, seed: int = 0) -> Mlp:
    """An `Mlp` in eval mode; sigmoid of padding is not zero."""
    torch.manual_seed(seed)
    return Mlp(width).eval()


def parallel_mlp(model: Mlp, mesh: DeviceMesh) -> Mlp:
    """The `Mlp` over the mesh."""
    autotp.parallelize(model, mesh, example_inputs={"x": torch.randn(2, 3, 64)})
    assert {n for n, p in autotp.plan_of(model).params.items() if p.layout.dim is not None} >= {"up.weight", "down.weight"}
    return model


def whole(model: nn.Module) -> nn.Module:
    """A copy."""
    return copy.deepcopy(model)


def failure(work: Callable[[], Any]) -> str:
    """The text of the AutoTPError that `work` raises."""
    try:
        work()
    except autotp.AutoTPError as error:
        return str(error)
    return "nothing was raised"
