"""Reads checkpoints of transformers whose weights torchao quantized, and quantizes plain ones while they are loaded.

transformers writes the inner tensors of a quantized weight `q_proj.weight` under names of their own (`q_proj._weight_qdata`,
`q_proj._weight_scale`), and their class and attributes as JSON into the metadata of the safetensors file. Here they become one node
again, by the name of the weight, which transformers' loader moves to its parameter. A rank reads the slices of each inner tensor
that its layout names.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotp.checkpoint.files import FileTensor, open_file
from autotp.checkpoint.nodes import Node, Op, Read, sources, uncast
from autotp.checkpoint.skeleton import Skeleton
from autotp.errors import CheckpointError, InputError
from autotp.plan.layout import Layout
from autotp.quantize import quantize_by
from autotp.rewrite.modules.quantized import is_linear
from autotp.rewrite.parameters.quantized_form import Form

_OURS = "torchao"
#: Methods of which transformers can make plain weights, by the class of their config.
_BACK = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig"}


@dataclass(frozen=True, slots=True, eq=False)
class Quantized(Node):
    """A quantized weight in files: its form, and the tensors in the files by inner name."""

    form: Form
    inner: Mapping[str, FileTensor]

    def part(self, name: str, layout: Layout, rank: int, read: Read, device: torch.device) -> Tensor:
        """Returns the rank's part, on `device`; reads what the rank holds."""

        def inner(inner: str, cut: Any) -> Tensor:
            source = self.inner[inner]
            made: Tensor = cut.read(lambda box: read(source, box), source.shape)
            return made.to(device)

        return self.form.local(layout, rank, name, inner)


def method_of(config: Any) -> Any:
    """Returns what a config of transformers says of quantization, by an object or a dict; None for plain weights."""
    text = getattr(config, "get_text_config", lambda: config)()
    return getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)


def _name(method: Any) -> str:
    name = method.get("quant_method") if isinstance(method, Mapping) else getattr(method, "quant_method", method)
    return str(getattr(name, "value", name))


def refuse_other(method: Any, where: str) -> None:
    """Refuse a checkpoint that something else than torchao quantized.

    Raises:
        CheckpointError: it is one; says what to load instead.
    """
    if (name := _name(method)) == _OURS:
        return
    way = "load the checkpoint that is not quantized, with quantization_config=TorchAoConfig(…)"
    if name in _BACK:
        way += f", or write plain weights once: from_pretrained(path, quantization_config={_BACK[name]}(dequantize=True)) of transformers"
    raise CheckpointError(f"{where}: the checkpoint is quantized ({name}); autotp loads plain weights and those of torchao: {way}")


def refuse_any(method: Any, where: str) -> None:
    """Refuse a quantized checkpoint where plain weights alone can be cut into files of ranks.

    Raises:
        CheckpointError: it is one.
    """
    if method is not None:
        refuse_other(method, where)
        raise CheckpointError(
            f"{where}: the checkpoint is quantized ({_OURS}), and is not cut ahead: autotp.from_pretrained reads it by slices"
        )


def taken(config: Any, directory: Path) -> Any:
    """Takes the word on quantization out of `config`, and returns transformers' object for it; None for plain weights.

    Raises:
        CheckpointError: something else than torchao quantized the checkpoint, or torchao is not there.
    """
    method = method_of(config)
    if method is None:
        return None
    refuse_other(method, str(directory))
    try:
        found = importlib.import_module("transformers").TorchAoConfig.from_dict(method) if isinstance(method, Mapping) else method
    except Exception as error:
        raise CheckpointError(f"{directory / 'config.json'}: torchao does not take its quantization_config: {_plain(error)}") from error
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return found


def _plain(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def joined(tensors: Mapping[str, FileTensor], directory: Path) -> dict[str, Node]:
    """Returns the tensors of a checkpoint by key, the inner tensors of each quantized weight as one.

    Raises:
        CheckpointError: the metadata do not fit the tensors, or name a class whose slices are not known.
    """
    try:
        made_of = importlib.import_module("torchao.prototype.safetensors.safetensors_utils").object_from_dict
    except ImportError as error:
        raise CheckpointError(
            f"{directory}: quantized by torchao, which cannot be imported ({error}): pip install 'autotp[quantization]'"
        ) from error
    metadata: dict[str, str] = {}
    for file in dict.fromkeys(t.file for t in tensors.values()):
        metadata.update(open_file(file).metadata() or {})
    found: dict[str, Node] = dict(tensors)
    for key, text in metadata.items():
        said = _said(text)
        if said is None:
            continue
        module, _, leaf = key.rpartition(".")
        names = {inner: f"{module}._{leaf}_{inner}" for inner in said["_tensor_data_names"]}
        if lost := [name for name in names.values() if name not in tensors]:
            raise CheckpointError(f"{directory}: {key} is quantized, and {lost[0]} is in no file")
        inner = {name: tensors[stored] for name, stored in names.items()}
        hollow = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in inner.items()}
        try:
            whole = made_of({**said, "_data": {**said["_data"], **hollow}})
        except Exception as error:
            raise CheckpointError(f"{directory}: torchao cannot read {key}: {_plain(error)}") from error
        found[key] = Quantized(tuple(whole.shape), whole.dtype, Form.of(whole, key), inner)
        for stored in names.values():
            del found[stored]
    return found


def _said(text: str) -> Any:
    """Returns what the metadata say of a quantized weight, None where they say something else."""
    try:
        said = json.loads(text)
    except ValueError:
        return None
    return said if isinstance(said, dict) and said.get("_tensor_data_names") and isinstance(said.get("_data"), dict) else None


def settled(skeleton: Skeleton, directory: Path) -> Skeleton:
    """Returns the skeleton with each quantized weight as it is in the files; transformers' changes of dtype are left out, as it does.

    Raises:
        CheckpointError: transformers' loader computes with a quantized weight (merges it with others, say).
    """
    nodes = dict(skeleton.nodes)
    for name, p in skeleton.model.named_parameters():
        node = nodes.get(id(p))
        if node is None or not any(isinstance(s, Quantized) for s in sources(node)):
            continue
        plain = uncast(node)
        if not isinstance(plain, Quantized):
            step = node.func if isinstance(node, Op) else node
            raise CheckpointError(f"{directory}: {name} is made of quantized weights by {step} while it is loaded; quantize after loading")
        nodes[id(p)] = plain
        p.requires_grad_(False)
    return Skeleton(skeleton.model, nodes, skeleton.buffers)


def mark(model: nn.Module, found: Any, *, loaded: bool) -> None:
    """Puts on the model what transformers puts on one that it quantized. `loaded`: quantized in the files."""
    model.__dict__.update(hf_quantizer=_quantizer(found, loaded), is_quantized=True, quantization_method=found.quant_method)
    model.config.quantization_config = found  # type: ignore[union-attr]


def _quantizer(found: Any, loaded: bool) -> Any:
    kind = importlib.import_module("transformers.quantizers.quantizer_torchao").TorchAoHfQuantizer
    return kind(found, pre_quantized=loaded)


def checked(found: Any) -> Any:
    """Returns the argument `quantization_config`, if autotp can follow it.

    Raises:
        InputError: it cannot.
    """
    if found is None:
        return None
    name = _name(found)
    if name != _OURS:
        raise InputError(
            f"quantization_config=: got {type(found).__name__} ({name}), and autotp quantizes by torchao alone: "
            "quantization_config=TorchAoConfig(Int8WeightOnlyConfig())"
        )
    try:
        found = importlib.import_module("transformers").TorchAoConfig.from_dict(found) if isinstance(found, Mapping) else found
    except Exception as error:
        raise InputError(f"quantization_config=: torchao does not take it: {_plain(error)}") from error
    if found.include_input_output_embeddings or found.untie_embedding_weights:
        raise InputError(
            "quantization_config=: include_input_output_embeddings and untie_embedding_weights: autotp quantizes Linears alone"
        )
    return found


def quantize_loaded(model: Any, found: Any) -> None:
    """Quantizes a parallel model as transformers does while it loads one on one device: not the head, not tied weights. Collective.

    Raises:
        AutoTPError: as `quantize_`.
    """
    quantizer = _quantizer(found, False)
    quantizer._process_model_before_weight_loading(model)
    config = found.get_apply_tensor_subclass()
    quantize_by(model, config, lambda module, path: is_linear(module) and quantizer.param_needs_quantization(model, f"{path}.weight"))
    mark(model, found, loaded=False)
