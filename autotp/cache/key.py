"""Makes the key of a plan: a text of all that the plan depends on, and its digest.

In it are the model with the code that it reaches (`autotp.cache.walk`), the request, the versions of Python and of the libraries, the
source of autotp, torch's settings, and the variables of the environment whose names the code of the model holds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp.cache.walk import Unseen, Walk
from autotp.examine import Check
from autotp.numeric.check import too_large
from autotp.plan.placements import Placements
from autotp.recipe.recipe import Recipe
from autotp.trace.example import Given

#: Changes with the form of keys and entries.
FORM = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a plan; see `autotp.plan`."""

    model: nn.Module
    tp: int
    recipe: Recipe | None
    inputs: Given | None
    check: Check
    placements: Placements


@dataclass(frozen=True, slots=True)
class Key:
    """`digest`: of the whole text, the name of the entry. `head`: the lines of it that people can read."""

    digest: str
    head: tuple[str, ...]


def key_of(asked: Asked) -> Key:
    """Returns the key of the plan of a request.

    Raises:
        Unseen: it depends on something that has no text.
    """
    model = asked.model
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise Unseen("a mode of torch that is on, whose code sees every operator")
    # weights count where the model itself may be run to check the plan's numbers
    walk = Walk(numbers=asked.check is Check.NUMBERS and not too_large(model, asked.tp))
    lines = walk.over((model, asked.inputs, _tensor_methods(), _hooks_of_all()))
    head = (
        f"form {FORM}",
        f"model {type(model).__module__}.{type(model).__qualname__}",
        f"tp {asked.tp}, check {asked.check.value}, {asked.placements}",
        f"recipe {None if asked.recipe is None else (asked.recipe.file, asked.recipe.to_dict())}",
        f"autotp {source()}",
        f"python {sys.version} {platform.machine()}",
        f"torch {torch.__version__} {torch.version.git_version} {torch.version.cuda}",
        *(f"{name} {version}" for name, version in _versions(walk.packages)),
        *_settings(),
        *(f"environment {name}={os.environ[name]}" for name in sorted(walk.names & os.environ.keys())),
    )
    text = hashlib.blake2b(digest_size=32)
    for line in (*head, *lines):
        text.update(line.encode("utf-8", "surrogatepass") + b"\0")
    return Key(text.hexdigest(), head)


def _tensor_methods() -> Mapping[str, Any]:
    """What others have put into torch's classes that every model uses."""
    found = {}
    for cls in (torch.Tensor, nn.Module, nn.Parameter):
        for name, value in vars(cls).items():
            module = getattr(value, "__globals__", {}).get("__name__", "torch")
            if not str(module).startswith("torch"):
                found[f"{cls.__name__}.{name}"] = value
    return found


def _hooks_of_all() -> dict[str, Any]:
    """The hooks that torch calls for every module."""
    return {name: value for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global_") and isinstance(value, dict)}


def _versions(packages: set[str]) -> Iterator[tuple[str, str]]:
    for name in sorted(packages | {"numpy", "transformers", "peft", "torchao"}):
        module = sys.modules.get(name)
        version = getattr(module, "__version__", None)
        if module is not None and version is None:
            try:
                version = importlib.metadata.version(name)
            except (importlib.metadata.PackageNotFoundError, ValueError):
                continue
        if module is not None:
            yield name, str(version)


def _settings() -> Iterator[str]:
    """torch's settings that code may ask for, or that kernels follow."""
    yield f"dtype {torch.get_default_dtype()}, device {torch.get_default_device()}"
    yield f"gradients {torch.is_grad_enabled()}, inference {torch.is_inference_mode_enabled()}"
    yield f"autocast {[torch.is_autocast_enabled(device) for device in ('cpu', 'cuda')]}"
    yield f"precision {torch.get_float32_matmul_precision()}, deterministic {torch.are_deterministic_algorithms_enabled()}"
    cuda: Any = torch.backends.cuda
    attention = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()
    yield f"attention {attention}"
    yield f"devices {torch.accelerator.device_count() if torch.accelerator.is_available() else 0}"


@cache
def source() -> str:
    """The digest of the source of autotp, as it was when this process began.

    Raises:
        Unseen: a file was changed since, so it may not be what runs.
    """
    root = Path(__file__).absolute().parent.parent
    text, began = hashlib.blake2b(digest_size=16), _began()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".yaml") and path.is_file():
            if path.stat().st_mtime >= began:
                raise Unseen(f"{path.name} of autotp, which was changed after this process began")
            text.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return text.hexdigest()


def _began() -> float:
    """Seconds at which this process began; where the system does not say, some time before now."""
    try:
        return Path(f"/proc/{os.getpid()}").stat().st_mtime
    except OSError:
        return time.time() - time.process_time() - 3600.0
