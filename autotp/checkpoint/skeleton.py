"""Builds a transformers model whose parameters are nodes, with transformers' own loader on a checkpoint that has not been read.

`from_pretrained(None, state_dict=…)` of transformers runs on `Deferred` tensors. So its own code handles renamed keys, merged and
split tensors, dtypes, tied weights, computed buffers, missing and unexpected keys. The result has a node for each parameter, and
real tensors for those that no file holds.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autotp import targets
from autotp.checkpoint.deferred import Deferred, hollow, node_of
from autotp.checkpoint.nodes import Node, Read
from autotp.checkpoint.progress import without_theirs
from autotp.errors import CheckpointError, InputError

_LOGGERS = ("transformers.modeling_utils", "transformers.core_model_loading", "transformers.conversion_mapping")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, except for tensors that no file holds.

    nodes: parameter (by id) → the node of its entries. buffers: name → the same, for buffers that files hold.
    """

    model: nn.Module
    nodes: Mapping[int, Node]
    buffers: Mapping[str, Node]

    def fill_buffers(self, read: Callable[[str, Node], Tensor]) -> None:
        """Give the model the buffers that files hold: `read(name, node)`."""
        for name, node in self.buffers.items():
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._buffers[leaf] = read(name, node)


def load_config(directory: Path, overrides: Mapping[str, Any], model_class: Any = None) -> tuple[Any, dict[str, Any]]:
    """Returns the config in `directory` with `overrides`, and those of them that transformers' loader takes instead.

    `model_class`: one that has a config class of its own; else the config names its class.

    Raises:
        CheckpointError: no config, or one that transformers rejects. InputError: an override that nothing takes.
    """
    transformers = _transformers()
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json, so it is no checkpoint of transformers")
    try:
        kind = getattr(model_class, "config_class", None) or transformers.AutoConfig
        config, unused = kind.from_pretrained(directory, return_unused_kwargs=True, local_files_only=True, **overrides)
    except Exception as error:
        raise CheckpointError(f"{directory / 'config.json'}: transformers rejects it: {' '.join(str(error).split())}") from error
    passed = {k: v for k, v in unused.items() if k in ("attn_implementation", "experts_implementation", "trust_remote_code")}
    unknown = [k for k in unused if k not in passed]
    if unknown:
        hint = targets.near(unknown[0], config.to_dict())
        raise InputError(f"{unknown[0]}={unused[unknown[0]]!r}: {type(config).__name__} has no such value{hint}")
    return config, passed


def find_class(config: Any, directory: Path, wanted: Any, trusted: bool) -> Any:
    """Returns the model class: `wanted`, or the one that the Auto class `wanted` gives, or that of the config's architectures.

    Raises:
        InputError: `wanted` is no class of transformers, or an Auto class that has none for this config.
    """
    if wanted is not None and not (inspect.isclass(wanted) and callable(getattr(wanted, "from_pretrained", None))):
        raise InputError(f"model_class={wanted!r}: wanted a model class of transformers, or an Auto class such as AutoModelForCausalLM")
    remote: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    if trusted and remote:
        names = [config.architectures[0]] if config.architectures else []
        for auto, reference in remote.items():
            if auto.startswith("AutoModel") and (wanted.__name__ == auto if wanted is not None else reference.split(".")[-1] in names):
                return _transformers().dynamic_module_utils.get_class_from_dynamic_module(reference, directory)
    if wanted is None:
        return targets.model_class(config)
    mapping = getattr(wanted, "_model_mapping", None)
    if mapping is None:
        return wanted
    if type(config) not in mapping:
        raise InputError(f"model_class={wanted.__name__}: it has no model for {config.model_type}")
    found = mapping[type(config)]
    if not isinstance(found, list | tuple):
        return found
    return next((cls for cls in found if cls.__name__ in (config.architectures or ())), found[0])


def known_class(path: str) -> Any:
    """Returns the model class at `path` (module and name) in transformers; None elsewhere: code of a checkpoint is not imported by name."""
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] != "transformers":
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def build(
    directory: Path,
    tensors: Mapping[str, Node],
    read: Read | None,
    *,
    config: Any,
    cls: Any,
    dtype: Any,
    options: Mapping[str, Any],
    report: bool,
) -> Skeleton:
    """Let transformers load `tensors` (by their keys in the checkpoint) into a `cls`.

    Args:
        read: for the few values that are needed at once: whether two tensors that ought to be tied are equal.
        dtype: as transformers takes it; None: the config's, else that of the first tensor.
        options: further keywords of transformers' `from_pretrained`.
        report: whether missing and unexpected keys are logged here, as transformers does.

    Raises:
        CheckpointError: transformers' own message, or tensors of the wrong shape.
    """
    given = {key: Deferred(node, read) for key, node in tensors.items()}
    with _own_words(report) as said:
        try:
            model = cls.from_pretrained(
                None,
                config=config,
                state_dict=given,
                dtype="auto" if dtype is None else dtype,
                generation_config=_generation_config(directory),
                **options,
            )
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{directory}: transformers cannot load it as {cls.__name__}: {_reason(error, said)}") from error
    model.config.name_or_path = model.name_or_path = str(directory)
    if options.get("trust_remote_code") and hasattr(model, "load_custom_generate"):
        with suppress(OSError):  # the checkpoint has none
            custom = model.load_custom_generate(directory, trust_remote_code=True)
            model.generate = partial(custom, model=model)
    return Skeleton(model, *_hollowed(model))


def _generation_config(directory: Path) -> Any:
    """Returns the checkpoint's generation config, from a file of its own or its config, as transformers looks for it."""
    config = _transformers().GenerationConfig
    try:
        try:
            return config.from_pretrained(directory, local_files_only=True)
        except OSError:
            return config.from_pretrained(directory, config_file_name="config.json", _from_model_config=True, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{directory / 'generation_config.json'}: {_plain(str(error))}") from error


def _hollowed(model: nn.Module) -> tuple[dict[int, Node], dict[str, Node]]:
    """Puts meta tensors in the place of deferred ones (tied ones stay one); returns the nodes of parameters by id, of buffers by name."""
    nodes: dict[int, Node] = {}
    buffers: dict[str, Node] = {}
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if isinstance(p, Deferred):
                if id(p) not in made:
                    made[id(p)] = new = nn.Parameter(hollow(p), requires_grad=p.requires_grad)
                    new.__dict__.update({k: v for k, v in vars(p).items() if k not in ("_own", "_read", "_viewed", "_views", "_is_param")})
                    nodes[id(new)] = _node(p, name)
                module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            if isinstance(b, Deferred):
                buffers[f"{path}.{name}" if path else name] = _node(b, name)
                module._buffers[name] = hollow(b)
    return nodes, buffers


def _node(tensor: Deferred, name: str) -> Node:
    node = node_of(tensor)
    if node.shape != tuple(tensor.shape) or node.dtype != tensor.dtype:
        raise CheckpointError(f"{name}: its values were exchanged while it was loaded; that is not supported")
    return node


@contextmanager
def _own_words(report: bool) -> Iterator[list[str]]:
    """Collects transformers' log; it is shown only where `report`."""
    said: list[str] = []

    class Listen(logging.Filter):
        def __init__(self, level: int) -> None:
            super().__init__()
            self.level = level

        def filter(self, record: logging.LogRecord) -> bool:
            said.append(record.getMessage())
            return report and record.levelno >= self.level

    with ExitStack() as stack:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            listen = Listen(logger.getEffectiveLevel())
            stack.callback(logger.setLevel, logger.level)
            # An error of transformers points to what it logs as a warning. A level of exactly WARNING would make it check its own tp plans.
            logger.setLevel(min(listen.level, logging.WARNING - 1))
            logger.addFilter(listen)
            stack.callback(logger.removeFilter, listen)
        stack.enter_context(without_theirs())
        yield said


def _reason(error: Exception, said: Sequence[str]) -> str:
    """Returns transformers' error, or, where that points to its report, the report's text on tensors that do not fit."""
    rows = [_plain(row) for text in said for row in text.splitlines()]
    wrong = [row for row in rows if "MISMATCH" in row or "CONVERSION" in row]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}" if wrong else _plain(str(error))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("loading checkpoints needs transformers, which is not installed: pip install 'autotp[hf]'") from error
    return transformers
