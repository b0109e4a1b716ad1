"""Models of other libraries, tiny and with random weights: one module a library, each with a table `MODELS` of functions.

A function builds a model with its arguments for one call. It takes what it needs from the library's constructors and downloads nothing.
Widths are small, and the numbers of heads and channels even, so that two ranks divide them.

timm and others import torchvision, whose wheels want another build of torch than this project's. Where it is missing, the folder
`stand_ins` has a torchvision that knows the names they import while they do so; none of the models here calls it.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: A model and the arguments of one call: positional in a tuple, by name in a dict.
Built = tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]
Table = dict[str, Callable[[], Built]]

#: Library, as people call it → the name it is imported by, and the module here that holds its table.
LIBRARIES = {
    "timm": ("timm", "timm_models"),
    "diffusers": ("diffusers", "diffusers_models"),
    "x-transformers": ("x_transformers", "x_transformers_models"),
    "vit-pytorch": ("vit_pytorch", "vit_pytorch_models"),
    "litgpt": ("litgpt", "litgpt_models"),
    "torchtune": ("torchtune", "torchtune_models"),
    "open_clip": ("open_clip", "open_clip_models"),
    "whisper": ("whisper", "whisper_models"),
    "esm": ("esm", "esm_models"),
    "monai": ("monai", "monai_models"),
    "torchscale": ("torchscale", "torchscale_models"),
    "performer-pytorch": ("performer_pytorch", "performer_models"),
    "perceiver-pytorch": ("perceiver_pytorch", "perceiver_models"),
    "linformer": ("linformer", "linformer_models"),
    "reformer-pytorch": ("reformer_pytorch", "reformer_models"),
    "local-attention": ("local_attention", "local_attention_models"),
}


#: Libraries that cannot be imported without torchvision.
NEED_TORCHVISION = {"timm", "open_clip", "torchscale", "torchtune", "vit-pytorch"}


def table(library: str) -> Table | None:
    """The models of a library, None where it is not installed."""
    name, module = LIBRARIES[library]
    if importlib.util.find_spec(name) is None:
        return None
    with _torchvision(library in NEED_TORCHVISION):
        made: Table = importlib.import_module(f"tools.libraries.{module}").MODELS
    return made


@contextmanager
def _torchvision(needed: bool) -> Iterator[None]:
    """While a library is imported that needs torchvision, there is one. Others ask whether it is there, and must find that it is not."""
    if not needed or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    import transformers.utils

    transformers.utils.is_torchvision_available()  # it remembers the answer
    path = str(Path(__file__).parent / "stand_ins")
    sys.path.append(path)
    try:
        yield
    finally:
        sys.path.remove(path)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def build(key: str) -> Built:
    """The model `library/name` and the arguments of a call, the same in every process."""
    library, name = key.split("/")
    models = table(library)
    if models is None:
        raise ModuleNotFoundError(f"No module named {LIBRARIES[library][0]!r}")
    torch.manual_seed(0)
    random.seed(0)
    return models[name]()


def filled(model: nn.Module) -> nn.Module:
    """The model with weights drawn for all matrices: some constructors leave memory as it was, for a checkpoint to fill."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
    return model


def images(size: int = 32, channels: int = 3, batch: int = 2) -> tuple[Tensor]:
    """The argument of a vision model."""
    return (torch.randn(batch, channels, size, size),)


def tokens(length: int = 12, vocabulary: int = 128, batch: int = 2) -> tuple[Tensor]:
    """The argument of a language model."""
    return (torch.randint(2, vocabulary, (batch, length)),)
