"""Finds the module that a TARGET names.

A target is one of

    path/to/dir, path/to/config.json    a config of Hugging Face form
    llama                               a model type of transformers: its default config
    package.module:callable             called without arguments, returns an `nn.Module`
    a config object, an `nn.Module`     itself

Nothing is ever downloaded. transformers is imported only for the targets that need it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from autotp.errors import InputError
from autotp.textfile import is_file, read_text, reason

#: More ranks than any tensor-parallel group has, more layers and classes than any model, more modules than the largest mixtures of experts.
MOST_RANKS = 1024
MOST_LAYERS = 1000
MOST_LABELS = 1_000_000
MOST_MODULES = 200_000

#: The Auto mappings tried in order for a config that names no class; the name of the mapping in transformers.
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


#: Fields that count what is made one by one → the most of it that is taken: `num_hidden_layers`, `n_layer`, `depths`; classes.
_COUNTS = {re.compile("layers$|^n_layer$|^num_layer$|(^|_)depths?$"): MOST_LAYERS, re.compile("^num_labels$"): MOST_LABELS}


def resolve(target: object) -> nn.Module:
    """The module that `target` stands for; on the meta device, without weights, unless it already is a module.

    Raises:
        InputError: `target` names nothing, or what it names cannot be built.
    """
    return target if isinstance(target, nn.Module) else build(load(target), device="meta")


def load(target: object) -> Any:
    """The config or module factory that `target` names; configs, factories and modules are themselves.

    Raises:
        InputError: `target` names nothing; the message lists near names.
    """
    if not isinstance(target, str | os.PathLike):
        if isinstance(target, nn.Module) or callable(target) or _is_config(target):
            return target
        raise InputError(f"target: got {type(target).__name__}, wanted a path, a model type, package.module:callable, a config or a module")
    text = os.fspath(target)
    if not isinstance(text, str):
        raise InputError(f"target: got a path in {type(text).__name__}, wanted one in str")
    if not text.strip():
        raise InputError(f"target: got {text!r}, wanted a path, a model type, package.module:callable, a config or a module")
    path = Path(text)
    if is_file(path) or is_file(path / "config.json"):
        return _load_config(path if is_file(path) else path / "config.json")
    if ":" in text and os.sep not in text:
        return _load_callable(text)
    return _load_model_type(text)


def check_ranks(tp: int) -> None:
    """Refuse numbers of ranks that no group has and no axis fills: a plan says what each of them holds.

    Raises:
        InputError: more than `MOST_RANKS`.
    """
    if tp > MOST_RANKS:
        raise InputError(f"tp is {tp}, wanted at most {MOST_RANKS}: no model has axes that fill so many ranks")


def build(loaded: Any, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The module of what `load` returned, on `device`, in `dtype` (float32 where None).

    Raises:
        InputError: the class cannot be built from its config, or the callable fails or returns something else.
    """
    if isinstance(loaded, nn.Module):
        return loaded
    name = getattr(loaded, "__name__", type(loaded).__name__)
    try:
        with torch.device(device):
            module = _build_config(loaded) if _is_config(loaded) else loaded()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"target {name}: building it failed with {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"target {name}: returned {type(module).__name__}, wanted an nn.Module")
    return module if dtype is None else module.to(dtype)


def inputs_of(source: str) -> Any:
    """What the callable named by `source` returns: the keyword arguments of a call, or several of them.

    Raises:
        InputError: it names nothing, or fails.
    """
    try:
        return load(source)()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"inputs {source}: making them failed with {type(error).__name__}: {' '.join(str(error).split())}") from error


def model_class(config: Any) -> Any:
    """The transformers class for `config`.

    Its first known `architectures` entry, else what the first Auto mapping that holds it says, else a class beside the
    config's own that takes it (parts of a larger model are in no mapping).
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    heads = [name for name in _HEADS if hasattr(modeling_auto, name)]
    if config.is_encoder_decoder:
        heads.sort(key=lambda name: "SEQ" not in name)
    elif not getattr(config, "is_decoder", False):
        heads.sort(key=lambda name: "MASKED_LM" not in name)  # encoders are in the mapping of causal models too
    for head in heads:
        mapping = getattr(modeling_auto, head)
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, list | tuple) else found
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    beside: list[Any] = [cls for cls in vars(module).values() if inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)]
    for cls in beside:
        if cls.config_class is type(config) and not cls.__name__.endswith("PreTrainedModel"):
            return cls
    raise InputError(f"target {config.model_type}: transformers has no model class for {type(config).__name__}")


def _build_config(config: Any) -> nn.Module:
    if problems := list(_absurd(vars(config))):
        raise InputError(f"target {config.model_type}: {'; '.join(problems)}")
    made = 0

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > MOST_MODULES:
            raise InputError(f"target {config.model_type}: its config asks for more than {MOST_MODULES} modules; {_largest(config)}")

    watch = register_module_module_registration_hook(count)
    try:
        module: nn.Module = model_class(config)._from_config(config, dtype=torch.float32)
    finally:
        watch.remove()
    return module.eval()


def _absurd(fields: Mapping[str, Any], where: str = "", depth: int = 0) -> Iterator[str]:
    """Numbers of layers and labels that no model has: building as many would not end."""
    for name, value in fields.items():
        path = f"{where}{name}"
        nested = vars(value) if _is_config(value) else value
        if isinstance(nested, Mapping) and depth < 4:
            yield from _absurd(nested, f"{path}.", depth + 1)
        most = next((most for names, most in _COUNTS.items() if names.search(path.rpartition(".")[2])), None)
        for item in value if isinstance(value, list | tuple) else (value,):
            if most is not None and isinstance(item, int) and item > most:
                yield f"{path} is {item}, wanted at most {most}"


def _largest(config: Any) -> str:
    """The largest whole number of a config, as a likely cause."""
    found = {name: value for name, value in vars(config).items() if isinstance(value, int) and "token" not in name}
    name = max(found, key=lambda n: found[n], default="")
    return f"its largest number is {name} = {found[name]}" if name else "make it smaller"


def _is_config(value: object) -> bool:
    transformers = sys.modules.get("transformers")  # a config object exists only after its package was imported
    return transformers is not None and isinstance(value, transformers.PretrainedConfig)


def _load_config(path: Path) -> Any:
    if path.suffix != ".json":
        raise InputError(f"target {path}: wanted a config.json or a directory that holds one")
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"target {path}: not a readable JSON file: {reason(error)}") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(model_type, str):
        raise InputError(f"target {path}: holds no `model_type`, so it is no config of transformers")
    _known_model_type(model_type, where=f"target {path}: ")
    if problems := list(_absurd(values)):
        raise InputError(f"target {path}: {'; '.join(problems)}")
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:
        raise InputError(f"target {path}: {model_type} config rejected: {error}") from error


def _load_model_type(text: str) -> Any:
    if os.sep in text or text.endswith(".json"):
        raise InputError(f"target {text}: no such directory with a config.json, and nothing is downloaded{_near_paths(text)}")
    _known_model_type(text, where="target ")
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[text]()


def _known_model_type(name: str, *, where: str) -> None:
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise InputError(f"{where}{name}: needs transformers, which is not installed: pip install 'autotp[hf]'") from error
    if name not in CONFIG_MAPPING:
        hint = near(name, CONFIG_MAPPING) or ", and is neither a path nor package.module:callable"
        raise InputError(f"{where}{name}: transformers has no such model type{hint}")


def _load_callable(text: str) -> Callable[[], nn.Module]:
    module_name, _, name = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"target {text}: no module named {error.name!r} in the current directory or the installed packages") from error
    except Exception as error:
        raise InputError(f"target {text}: importing {module_name} failed with {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"target {text}: {module_name} has no {name!r}{near(name, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"target {text}: {name} is {type(found).__name__}, wanted something to call without arguments")
    return found  # type: ignore[no-any-return]  # what it returns is checked by `build`


def near(name: str, known: Iterable[str]) -> str:
    """`"; near names: a, b"` for the known names that resemble `name`, "" where none does."""
    found = difflib.get_close_matches(name, [*known], n=4, cutoff=0.6)
    return f"; near names: {', '.join(found)}" if found else ""


def _near_paths(text: str) -> str:
    parent = Path(text).parent
    if len(text) > 1000:
        return ""
    return near(Path(text).name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
