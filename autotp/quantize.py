"""`autotp.quantize_` quantizes the Linears of a parallel model by torchao, as torchao quantizes those of one device.

One weight at a time is gathered, quantized whole by torchao itself, and sliced again (`autotp.rewrite.parameters.quantized_form`). So
the numbers of the ranks are slices of those that one device would have, whatever the config does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from autotp.agree import agree
from autotp.errors import AutoTPError, InputError, PlanError, sentence
from autotp.parallel_state import state_of
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.modules.quantized import is_linear, settle
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.quantized import QuantizedDTensor, quantized_param
from autotp.rewrite.parameters.quantized_form import Form, is_quantized

Filter = Callable[[nn.Module, str], bool]


def quantize_(model: nn.Module, config: Any, filter_fn: Filter | None = None) -> None:
    """Quantize the Linears of a parallel model in place, as `torchao.quantization.quantize_` does on one device. Collective.

    Each rank gets its slices of the numbers and scales that the whole weights have. The weights do not train afterwards; what is put
    beside them (LoRA) does.

    Args:
        model: as `parallelize` or `from_pretrained` made it, with real weights.
        config: a config of torchao (`Int8WeightOnlyConfig()`, …) or its `FqnToConfig`.
        filter_fn: (module, its path) → whether it is quantized; None: torchao's own choice, each Linear.

    Raises:
        AutoTPError: the same on every rank, with the model as it was: torchao refuses the weight here, or no rank can hold a slice of
            what it makes. InputError: no config of torchao. PlanError: `model` is not parallel, or sharded by FSDP.
    """
    state_of(model)
    torchao = _torchao()
    if not isinstance(config, importlib.import_module("torchao.core.config").AOBaseConfig):
        raise InputError(f"config: got {type(config).__name__}, wanted a config of torchao.quantization such as Int8WeightOnlyConfig()")
    if filter_fn is not None and isinstance(config, torchao.FqnToConfig):
        raise InputError("filter_fn: an FqnToConfig says itself which modules are quantized")
    quantize_by(model, config, filter_fn)


def quantize_by(model: nn.Module, config: Any, filter_fn: Filter | None) -> None:
    """Does what `quantize_` does, for arguments that were checked. An `FqnToConfig` may have a `filter_fn` beside it. Collective."""
    state, torchao = state_of(model), _torchao()
    state.comm.ask()
    group = state.comm.group if isinstance(state.comm, GroupComm) else None
    if group is None:
        _on_one_rank(torchao, model, config, filter_fn)
        return
    chosen = agree(group, lambda: list(_chosen(torchao, model, config, filter_fn)))
    _same_everywhere(group, config, [path for path, _ in chosen])
    made: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, module in chosen:
        if (new := _quantized(torchao, module, path, config, group)) is not None:
            made.append((module, path, new))
    before = [(module, module._parameters["weight"]) for module, _, _ in made]

    def install() -> None:
        for module, path, new in made:
            module._parameters["weight"] = new
            settle(module, path, state.plan)

    try:
        agree(group, install)
    except BaseException:
        for module, weight in before:
            module._parameters["weight"] = weight
        raise


def _same_everywhere(group: dist.ProcessGroup, config: Any, paths: list[str]) -> None:
    """Raise where the ranks would do different things. Collective.

    Raises:
        InputError: on every rank.
    """
    own = f"{type(config).__name__} {config!r}", paths
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    for rank, (text, others) in enumerate(everyone):
        if (text, others) != everyone[0]:
            odd = sorted({*others} ^ {*everyone[0][1]})
            what = f"{odd[0]} and {len(odd) - 1} more" if odd else f"{text[:100]} and {everyone[0][0][:100]}"
            raise InputError(f"the ranks quantize by other configs, or other modules, on rank {rank} than on rank 0: {what}")


def _torchao() -> Any:
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise InputError(
            f"autotp.quantize_ needs torchao, which cannot be imported ({error}): pip install 'autotp[quantization]'"
        ) from error


def _by_torchao(torchao: Any, model: nn.Module, config: Any, filter_fn: Filter | None, name: str) -> None:
    """Runs torchao's own function; what it raises becomes one error that names the module."""
    options = {"filter_fn": filter_fn} if filter_fn is not None or isinstance(config, torchao.FqnToConfig) else {}
    try:
        torchao.quantize_(model, config, **options)
    except AutoTPError:
        raise
    except Exception as error:  # asserts, imports and kernels that are missing
        raise AutoTPError(
            f"torchao cannot quantize {name} here by {type(config).__name__}: "
            f"{sentence(' '.join(str(error).split()) or type(error).__name__)} "
            "Take a config for this device and dtype, or leave the module out (filter_fn)"
        ) from error


def _on_one_rank(torchao: Any, model: nn.Module, config: Any, filter_fn: Filter | None) -> None:
    if not isinstance(config, torchao.FqnToConfig) or filter_fn is None:
        _by_torchao(torchao, model, config, filter_fn, "the model")
        return
    for path, module in list(model.named_modules()):
        if filter_fn(module, path):
            _by_torchao(torchao, _tree(path, module), config, None, path)


def _chosen(torchao: Any, model: nn.Module, config: Any, filter_fn: Filter | None) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that torchao would quantize, by path.

    Raises:
        AutoTPError: one of them cannot be.
    """
    seen: set[int] = set()
    chosen = filter_fn or _chooses(torchao, config)
    for path, module in model.named_modules():
        if not chosen(module, path):
            continue
        weight = module._parameters.get("weight")
        if weight is None or not is_linear(module):
            raise AutoTPError(
                f"{path or 'the model'}, a {type(module).__qualname__}, is to be quantized, and autotp quantizes modules with the forward "
                "of nn.Linear: leave it out (filter_fn)"
            )
        if is_quantized(weight) or isinstance(weight, QuantizedDTensor):
            raise AutoTPError(f"{path} is quantized already ({weight!r}): leave it out (filter_fn)"[:600])
        if not isinstance(weight, DTensor):
            raise PlanError(
                f"{path}.weight is a {type(weight).__name__} that was put there after parallelize: copy_ its numbers into the parameter "
                "that was there, or leave the module out (filter_fn)"
            )
        if type(weight) is not LayoutDTensor:
            raise PlanError(
                f"{path}.weight is a {type(weight).__name__}: quantize before FSDP shards the model, and leave quantized modules out of it"
            )
        if weight.is_meta:
            raise InputError(f"{path}.weight is on the meta device: load the weights before quantize_")
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def _chooses(torchao: Any, config: Any) -> Filter:
    """Returns torchao's own choice of modules: each Linear but that of `nn.MultiheadAttention`; those that a config names."""

    def linear(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)

    if not isinstance(config, torchao.FqnToConfig):
        return linear
    rest = "_default" in config.fqn_to_config

    def named(module: nn.Module, path: str) -> bool:
        names = (path, f"{path}.weight")
        return any(torchao.fqn_matches_fqn_config(name, config) for name in names) or (rest and linear(module, path))

    return named


def _quantized(torchao: Any, module: Any, path: str, config: Any, group: Any) -> nn.Parameter | None:
    """Returns the rank's quantized weight of one Linear; None where torchao leaves it as it is. Collective."""
    old: Any = module._parameters["weight"]
    layout, mesh = old._layout, old._spec.mesh
    with torch.no_grad():
        whole = old.detach()._whole()

    def work() -> nn.Parameter | None:
        tree, linear = _alone(path, module, whole)
        torchao_filter: Filter | None = None if isinstance(config, torchao.FqnToConfig) else (lambda m, _: m is linear)
        with torch.no_grad():
            _by_torchao(torchao, tree, config, torchao_filter, path)
        now = tree.get_submodule(path)
        weight = now._parameters.get("weight")
        if now is not linear or weight is None or (module._parameters.get("bias") is not None and linear.bias is None):
            raise AutoTPError(
                f"{type(config).__name__} changes {path} itself, not its weight alone (it is a {type(now).__qualname__} afterwards): "
                "quantize before parallelize, or take another config"
            )
        if not is_quantized(weight):
            return None
        form = Form.of(weight, f"{path}.weight")
        return quantized_param(form.cut(weight, layout, mesh.get_local_rank(), f"{path}.weight"), form, layout, mesh, old)

    return agree(group, work)


def _alone(path: str, module: Any, whole: torch.Tensor) -> tuple[nn.Module, nn.Linear]:
    """Returns a tree of modules with one Linear, at the path that it has in the model: configs name modules by path."""
    kind = NonDynamicallyQuantizableLinear if isinstance(module, NonDynamicallyQuantizableLinear) else nn.Linear
    linear = kind(whole.shape[1], whole.shape[0], bias=module._parameters.get("bias") is not None, device="meta", dtype=whole.dtype)
    linear.weight = nn.Parameter(whole, requires_grad=False)
    return _tree(path, linear), linear


def _tree(path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    tree = at = nn.Module()
    *above, leaf = path.split(".")
    for name in above:
        inner = nn.Module()
        at.add_module(name, inner)
        at = inner
    at.add_module(leaf, module)
    return tree
