"""Runs the work of one rank for `verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from autotp import targets
from autotp.errors import InputError
from autotp.numeric.copies import deep_copy
from autotp.numeric.exact import DOUBLE, SINGLE, Precision, largest, relative_error
from autotp.plan.layout import Layout
from autotp.recipe.recipe import Recipe
from autotp.testing.equivalence.module_calls import recorded
from autotp.testing.equivalence.observe import weighted
from autotp.testing.outputs import tensors_of

#: Parallelizes the model in place; returns the layout of each of its parameters.
Parallelizer = Callable[[nn.Module, DeviceMesh, "Mapping[str, Any] | None"], Mapping[str, Layout]]
NEW_TOKENS = 8


def with_autotp(model: nn.Module, mesh: DeviceMesh, inputs: Mapping[str, Any] | None, recipe: Recipe | None = None) -> Mapping[str, Layout]:
    """The parallelizer under test when no other is given."""
    import autotp

    parallel = autotp.parallelize(model, mesh, recipe=recipe, example_inputs=inputs)
    return {name: param.layout for name, param in autotp.plan_of(parallel).params.items()}


def check_rank(emit: Callable[[Any], None], job: Mapping[str, Any]) -> dict[str, Any]:
    """Build, parallelize, run and compare; plain numbers come back, module outputs go to files in `job["folder"]`."""
    import transformers

    transformers.logging.set_verbosity_error()
    rank, folder = dist.get_rank(), Path(job["folder"])
    emit("building the model")
    reference, inputs, precision = _subject(job)
    parallel = deep_copy(reference)
    emit("running it on one rank")
    with precision.mode(), recorded(reference) as record:
        wanted = _run(reference, inputs)
    if rank == 0:
        torch.save(record, folder / "reference.pt")
    emit("parallelizing it")
    mesh = init_device_mesh("cpu", (job["tp"],), mesh_dim_names=("tp",))
    example = None if job["inputs"] is None else inputs
    layouts = job["parallelizer"](parallel, mesh, example)
    emit("running it on all ranks")
    try:
        with precision.mode(), recorded(parallel) as record:
            got = _run(parallel, inputs)
    finally:
        torch.save(record, folder / f"rank{rank}.pt")
    emit("comparing")
    result: dict[str, Any] = {
        "model": type(reference).__name__,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "tolerance": precision.tolerance,
        "parameters": sum(p.numel() for p in reference.parameters()),
        "local_share": _local_share(reference, layouts),
        "outputs": {name: relative_error(got[name], value) if name in got else float("inf") for name, value in wanted.items()},
        "gradients": _gradients(reference, parallel, layouts, rank, precision.floor),
        "nan": [name for name, value in wanted.items() if value.is_floating_point() and value.isnan().any()],
        "tokens": None,
    }
    if _can_generate(reference, inputs):
        emit("generating")
        with precision.mode():
            result["tokens"] = [_generate(model, inputs) for model in (reference, parallel)]
    return result


def _subject(job: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any], Precision]:
    """The model, the keyword arguments of a call, and the finest arithmetic in which it runs."""
    try:
        return _subject_in(job, DOUBLE)
    except InputError:
        raise
    except Exception:  # which error says that an operator lacks float64 depends on the operator
        return _subject_in(job, SINGLE)


def _subject_in(job: Mapping[str, Any], precision: Precision) -> tuple[nn.Module, dict[str, Any], Precision]:
    from autotp.testing.tiny.models import randomise

    torch.set_default_dtype(precision.dtype)
    torch.manual_seed(job["seed"])
    model = targets.build(targets.load(job["target"]), device="cpu").to(precision.dtype).eval()
    randomise(model, seed=job["seed"])
    for tensor in (*model.parameters(), *model.buffers()):  # a factory need not be deterministic
        dist.broadcast(tensor.data, 0)
    inputs = _inputs(model, job, precision)
    with precision.mode(), torch.no_grad():
        model(**inputs)
    return model, inputs, precision


def _inputs(model: nn.Module, job: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    from transformers import PreTrainedModel

    if job["inputs"] is not None:
        given = job["inputs"] if isinstance(job["inputs"], Mapping) else targets.inputs_of(job["inputs"])
        if not isinstance(given, Mapping):
            raise InputError(f"inputs {job['inputs']}: verify compares one call, wanted its keyword arguments, got {type(given).__name__}")
        inputs = dict(given)
    elif isinstance(model, PreTrainedModel):
        inputs = _model_inputs(model, precision)
    else:
        kind = type(model).__name__
        raise InputError(f"target {job['target']}: {kind} is no transformers model, so name its inputs: --inputs module:callable")
    floats = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {**inputs, **{name: value.to(precision.dtype) for name, value in floats.items()}}


def _model_inputs(model: Any, precision: Precision) -> dict[str, Any]:
    """Returns the inputs of a transformers model, with labels where it generates."""
    from autotp.testing.inputs import training_inputs

    try:
        with precision.mode():
            return training_inputs(model)
    except InputError as error:
        raise RuntimeError(str(error)) from error  # perhaps in another precision


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the output by path; gradients of a fixed random projection of them are left in the parameters."""
    model.zero_grad()
    found = tensors_of(model(**inputs))
    total = weighted(found)
    if total is not None:
        total.backward()  # type: ignore[no-untyped-call]
    return {name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach() for name, tensor in found.items()}


def _local_share(model: nn.Module, layouts: Mapping[str, Layout]) -> float:
    """Elements of one rank's shards over those of `model`; tied parameters count once."""
    local = whole = 0
    for name, param in model.named_parameters():
        whole += param.numel()
        local += prod(layouts[name].local_shape) if name in layouts else param.numel()
    return local / whole if whole else 1.0


def _gradients(reference: nn.Module, parallel: nn.Module, layouts: Mapping[str, Layout], rank: int, floor: float) -> dict[str, float]:
    """Error of this rank's part of each gradient; parameters that neither model reaches are left out.

    The parts of all ranks cover the parameter, so nothing needs to be gathered.
    """
    errors: dict[str, float] = {}
    others = dict(parallel.named_parameters())
    least = floor * max((largest(param.grad) for param in reference.parameters() if param.grad is not None), default=0.0)
    for name, param in reference.named_parameters():
        grad = others[name].grad if name in others else None
        if param.grad is None and grad is None:
            continue
        if param.grad is None or grad is None:
            present = param.grad if grad is None else grad  # no gradient and a zero one say the same
            errors[name] = float("inf") if present is not None and present.count_nonzero() else 0.0
            continue
        layout, local = layouts.get(name), grad.to_local() if isinstance(grad, DTensor) else grad
        wanted = param.grad if layout is None else layout.shard(param.grad, rank)
        errors[name] = relative_error(local, wanted, scale=max(largest(param.grad), least))
    return errors


def _can_generate(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and model.can_generate() and model.main_input_name in inputs


def _generate(model: Any, inputs: Mapping[str, Any]) -> list[list[int]] | str:
    """Greedy continuation of the first rows; the text of the error where the model itself cannot."""
    dropped = {"labels", "use_cache", "decoder_input_ids"}
    arguments = {name: value for name, value in inputs.items() if name not in dropped}
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        arguments["decoder_start_token_id"] = 0
    try:
        with torch.no_grad():
            tokens = model.generate(**arguments, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found: list[list[int]] = tokens.tolist()
    return found
