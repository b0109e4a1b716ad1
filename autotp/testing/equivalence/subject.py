"""What is tested: a model on one device, and a call of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import InputError
from autotp.numeric.copies import deep_copy
from autotp.numeric.exact import DOUBLE, SINGLE, Precision
from autotp.testing.outputs import tensors_of

#: Builds the model; a transformers config stands for the model of random weights that it describes.
Factory = Callable[[], nn.Module]
#: Keyword arguments of a call, positional ones, one tensor, or a function of the model that makes any of these.
Inputs = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor | Callable[[nn.Module], Any]


def twin(model: nn.Module) -> nn.Module:
    """A deep copy, hooks on parameters included: a copied parameter has lost them."""
    try:
        made = deep_copy(model)
    except Exception as error:  # a module may refuse in any way
        raise InputError(f"{type(model).__name__} cannot be copied, so nothing can be compared with it: {error}") from error
    for old, new in zip(model.parameters(), made.parameters(), strict=True):
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(hook)  # type: ignore[no-untyped-call]
        for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
            new.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return made


#: Changes to the arguments of a call, by keyword or position.
Changes = Mapping[str | int, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """`model` (in eval mode, in `precision`) and the arguments of one call.

    `given`: the caller chose the arguments. `more`: further calls by name.
    `leaves`: floating-point arguments can record gradients (not where the model changes them in place). `alone`: embeddings and
    Linears that none of these calls runs, each with an argument to call it with. `again`: makes the same model once more.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    precision: Precision
    given: bool
    more: Mapping[str, Changes] = field(default_factory=dict)
    leaves: bool = True
    alone: Mapping[str, Tensor] = field(default_factory=dict)
    again: Callable[[nn.Module], nn.Module] = twin

    def call(self, model: nn.Module, leaves: dict[str, Tensor] | None = None, name: str = "") -> Any:
        """The output of `model`, this one or a parallel copy, for the call `name` of `more` ("": the main one).

        `leaves` receives floating-point arguments, which then record gradients.
        """
        leaves = leaves if self.leaves else None
        changes = self.more[name] if name else {}
        args = tuple(fresh(changes.get(i, a), f"argument {i}", leaves) for i, a in enumerate(self.args))
        chosen = {**self.kwargs, **{n: v for n, v in changes.items() if isinstance(n, str)}}
        kwargs = {n: fresh(v, f"argument {n}", leaves) for n, v in chosen.items()}
        with self.precision.mode():
            return model(*args, **kwargs)

    def call_alone(self, model: nn.Module, path: str, leaves: dict[str, Tensor]) -> Any:
        """The output of one module of `alone`, called by itself; `leaves` receives a floating-point argument."""
        argument = fresh(self.alone[path], "argument", leaves)
        with self.precision.mode():
            return model.get_submodule(path)(argument)

    def example_inputs(self) -> dict[str, Any] | None:
        """The arguments by the names of `forward`, where the caller chose them."""
        if not self.given:
            return None
        names = list(inspect.signature(self.model.forward).parameters)
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


_HINT = "; dtype=torch.float32 may help, where an operator lacks float64"


def fresh(value: Any, path: str, leaves: dict[str, Tensor] | None) -> Any:
    """A copy that the model may change."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        if leaves is not None and value.is_floating_point():
            leaves[path] = value.requires_grad_()
        return value
    if isinstance(value, Mapping):
        return {k: fresh(v, f"{path}.{k}", leaves) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(fresh(v, f"{path}[{i}]", leaves) for i, v in enumerate(value))
    return value


def precision_of(dtype: torch.dtype) -> Precision:
    """How finely a comparison in `dtype` tells.

    Raises:
        InputError: another dtype than float64 and float32.
    """
    found = {p.dtype: p for p in (DOUBLE, SINGLE)}.get(dtype)
    if found is None:
        raise InputError(f"dtype is {dtype}, wanted torch.float64 or torch.float32: in narrower types rounding hides what is wrong")
    return found


def make_subject(factory: Any, inputs: Inputs | None, dtype: torch.dtype, seed: int, more: Mapping[str, Changes] | None = None) -> Subject:
    """Build the model once, in `dtype`, and find a call of it that runs. `more` are further calls; None finds those of a guessed one.

    Parameters that hold one value (zero biases, norms of ones) get small noise: they would hide what is done to them.

    Raises:
        InputError: no model, a model on the meta device, no inputs for it, inputs on which it does not run or gives NaN.
    """
    precision = precision_of(dtype)
    torch.manual_seed(seed)
    model = _build(factory).to(device="cpu", dtype=dtype).eval()
    _enliven(model, seed)
    args, kwargs = _arguments(model, inputs, precision, seed)
    subject = Subject(model, _cast(args, dtype), _cast(kwargs, dtype), precision, inputs is not None)
    trial = replace(subject, model=twin(model))  # calls may leave something on the model
    _try(trial)
    trial = replace(trial, leaves=_records(trial))
    if more is None:
        more = _further(trial) if inputs is None else {}
    trial = replace(trial, more=more)
    return replace(trial, model=model, alone=_uncalled(trial))


def _build(factory: Any) -> nn.Module:
    if isinstance(factory, nn.Module):
        raise InputError(f"factory is a {type(factory).__name__}; wanted a function that builds it: lambda: model")
    if hasattr(factory, "model_type"):
        from autotp.testing.tiny.models import tiny_model

        made: nn.Module = tiny_model(factory)
        return made
    if not callable(factory):
        raise InputError(f"factory is {factory!r}, wanted a function that builds an nn.Module, or a transformers config")
    model: object = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"the factory returned {type(model).__name__}, wanted an nn.Module")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise InputError(f"the factory built {type(model).__name__} on the meta device; its weights are needed here")
    if any(hasattr(m, "_autotp") for m in model.modules()):
        raise InputError(f"the factory built a {type(model).__name__} that is parallel already; wanted the model of one device")
    return model


def _enliven(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))


def _arguments(model: nn.Module, inputs: Any, precision: Precision, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None:
        return (), _own_inputs(model, precision, seed)
    made = inputs(model) if callable(inputs) and not isinstance(inputs, Tensor) else inputs
    if isinstance(made, Mapping):
        return (), dict(made)
    if isinstance(made, Tensor):
        return (made,), {}
    if isinstance(made, tuple | list):
        return tuple(made), {}
    raise InputError(f"inputs are {type(made).__name__}; wanted keyword arguments in a mapping, positional ones in a tuple, or a tensor")


def _own_inputs(model: nn.Module, precision: Precision, seed: int) -> dict[str, Any]:
    if not hasattr(model, "config") or not hasattr(model, "main_input_name"):
        raise InputError(f"{type(model).__name__} is no transformers model, so its inputs cannot be guessed: pass inputs=")
    from autotp.testing.inputs import training_inputs

    with precision.mode():
        try:
            return training_inputs(model, seed=seed)
        except InputError as error:
            raise InputError(f"{error}{_HINT if precision is DOUBLE else ''}") from error


def _further(subject: Subject) -> dict[str, Changes]:
    """More calls of a transformers model: everything that it can return, and padding, which takes other paths through attention."""
    model: Any = subject.model
    names = inspect.signature(model.forward).parameters
    everything: dict[str | int, Any] = {"output_hidden_states": True}
    if getattr(model.config, "_attn_implementation", None) == "eager":
        everything["output_attentions"] = True
    further: dict[str, Changes] = {"with hidden states": everything}
    ids = subject.kwargs.get("input_ids")
    if ids is not None and ids.dim() == 2 and ids.shape[1] > 3 and "attention_mask" in names:
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        further["with padding"] = {"attention_mask": mask}
    labels = subject.kwargs.get("labels")
    if labels is not None and labels.dim() == 2 and labels.shape[1] > 3:
        # one call for both, as padding is not learned; without a mask, or where the model knows only one of them, by itself
        further["with labels left out"] = {**further.get("with padding", {}), "labels": _left_out(labels)}
    trial = replace(subject, more=further)
    runs = {name: changes for name, changes in further.items() if _runs(partial(trial.call, trial.model, name=name))}
    if {"with padding", "with labels left out"} <= set(runs):
        runs["with padding"] = runs.pop("with labels left out")
    return runs


def with_one_row_more(subject: Subject) -> Subject:
    """Adds a call with one index more in dim 0, mostly the batch, of each tensor that has as many as the first.

    Where that runs, it has one index less in dim 1, mostly the tokens, of each tensor that has as many as the first one, too.
    """
    given: dict[str | int, Any] = dict(enumerate(subject.args))
    given.update(subject.kwargs.items())
    first = next((t for t in tensors_of(list(given.values())).values() if t.dim()), None)
    if first is None or not len(first):
        return subject
    rows, tokens = first.shape[0], first.shape[1] if first.dim() > 1 else 0

    def changed(value: Any, less: int) -> Any:
        if isinstance(value, Tensor):
            if less and value.dim() > 1 and value.shape[1] == tokens:
                value = value[:, :-less]
            return torch.cat([value, value[:1]]) if value.dim() and value.shape[0] == rows else value
        if isinstance(value, Mapping):
            return {k: changed(v, less) for k, v in value.items()}
        return type(value)([changed(v, less) for v in value]) if type(value) in (tuple, list) else value

    for name, less in (("with one token less and one row more", 1), ("with one row more", 0))[tokens < 3 :]:
        found = replace(subject, more={**subject.more, name: {n: changed(v, less) for n, v in given.items()}})
        if _runs(partial(found.call, twin(found.model), name=name)):
            return found
    return subject


def _left_out(labels: Tensor) -> Tensor:
    """Labels of which the first two are -100: no target, a loss passes over them."""
    labels = labels.clone()
    labels[0, :2] = -100
    return labels


def _uncalled(subject: Subject) -> dict[str, Tensor]:
    """The embeddings and Linears that no call runs, with an argument for each that it takes.

    A user may call one: the input embedding of an encoder-decoder model, whose halves have tables of their own that are tied to it.
    """
    modules = {path: (m, argument) for path, m in subject.model.named_modules() if path and (argument := _argument(subject, m)) is not None}
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: ran.add(module)) for m, _ in modules.values()]
    try:
        for name in ("", *subject.more):
            torch.manual_seed(0)
            subject.call(subject.model, name=name)
    except Exception:  # whoever watches the outputs makes the same calls, and says what is wrong
        return {}
    finally:
        for handle in handles:
            handle.remove()
    trial = replace(subject, alone={path: argument for path, (m, argument) in modules.items() if m not in ran})
    return {path: a for path, a in trial.alone.items() if _runs(partial(trial.call_alone, trial.model, path, {}))}


def _argument(subject: Subject, module: nn.Module) -> Tensor | None:
    """What an embedding or a Linear may be called with: every id, or random rows; None for any other module."""
    if module._modules or all(p is None for p in module._parameters.values()):
        return None
    if isinstance(module, nn.Embedding):
        return torch.arange(module.num_embeddings).unsqueeze(0)
    if isinstance(module, nn.Linear):
        return torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(0), dtype=subject.precision.dtype)
    return None


def _runs(call: Callable[[], Any]) -> bool:
    try:
        output = call()
    except Exception:  # the model itself does not know this
        return False
    return not any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors_of(output).values())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device="cpu", dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def _records(subject: Subject) -> bool:
    try:
        subject.call(subject.model, {})
    except RuntimeError:  # an argument that is changed in place cannot be a leaf
        return False
    return True


def _try(subject: Subject) -> None:
    kind = type(subject.model).__name__
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            output = subject.call(subject.model)
    except Exception as error:  # a model may refuse its arguments in any way
        hint = _HINT if subject.precision is DOUBLE else ""
        raise InputError(
            f"{kind} itself does not run on these inputs in {subject.precision.dtype}: {type(error).__name__}: {error}{hint}"
        ) from error
    nan = [path for path, t in tensors_of(output).items() if t.is_floating_point() and bool(t.isnan().any())]
    if nan:
        raise InputError(f"{kind} itself gives NaN in {', '.join(nan)}: nothing could be shown with these weights and inputs")
