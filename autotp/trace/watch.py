"""Watches what model code does with gradients that the operators of its forward do not show.

Code that asks whether gradients are recorded may take another path where they are: the trace then runs that path too. An
`autograd.Function` has a backward of its own: the operators inside are told apart from the others. Users bind names early (`mix =
Mix.apply`), so that nothing can be put in the place of `apply` itself. The functions that `apply` calls are watched instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
import torch.autograd as autograd
from torch import Tensor, nn
from torch._functorch import utils as functorch
from torch.distributions import Distribution

_TORCH = torch.__file__.rsplit("__init__", 1)[0]
FUNCTION = _TORCH + "autograd/function.py"
_APPLY = torch.autograd.Function.__dict__[
    "apply"
].__func__.__code__  # compared by value: a copy of a model from another process has a copy of it
#: Files of torch's own that ask about gradients to keep books, and take no other path.
_AUTOTP = __file__.rsplit("trace", 1)[0]
_BOOKS = tuple(_TORCH + "nn/" + name for name in ("parameter.py", "modules/module.py"))
#: Where the backward runs the forward again.
_RECOMPUTING = "torch.utils.checkpoint"
CHECKPOINT = _TORCH + "utils/checkpoint.py"

GRAD_FN, REQUIRES_GRAD = (getattr(Tensor, name).__get__ for name in ("grad_fn", "requires_grad"))


class Question(Enum):
    """The questions that model code may ask."""

    GRAD = "whether gradients are recorded"
    INFERENCE = "whether inference mode is on"
    CONDITION = "what holds of data"


class Refused(BaseException):
    """The model does something that no trace can show and no plan can be right for. No code of the model may catch this."""


def is_model(file: str) -> bool:
    """True for code of models, torch's own layers among it: not for the machinery that runs operators."""
    return not file.startswith(_TORCH) or (file.startswith(_TORCH + "nn/") and file not in _BOOKS)


def is_code_of_a_model(file: str) -> bool:
    """True for code of models; this library's is none, but for the models that it tests itself with."""
    return is_model(file) and (not file.startswith(_AUTOTP) or file.startswith(f"{_AUTOTP}testing"))


def asking_file(depth: int) -> str:
    """Returns the file of the frame `depth` above the caller that is no method of a tensor."""
    frame: FrameType | None = sys._getframe(depth + 1)
    while frame is not None and frame.f_code.co_filename == _TORCH + "_tensor.py":
        frame = frame.f_back
    return frame.f_code.co_filename if frame is not None else ""


def is_running(wanted: FrameType) -> bool:
    """True while `wanted` is among the callers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def has_backward_hooks(model: nn.Module) -> bool:
    """True where a module has hooks that get its gradients: they are called where gradients are recorded.

    Raises:
        Refused: one is of the old kind, which gets the gradients of whatever operator a module happens to end with.
    """
    found = False
    for path, module in model.named_modules():
        hooks = len(module._backward_hooks)
        if hooks and module._is_full_backward_hook is False:
            raise Refused(
                f"module {path or '<root>'!r} ({type(module).__name__}) has a hook made with register_backward_hook, which sees the inside "
                "of the module as it is on one device: use register_full_backward_hook"
            )
        found = found or bool(hooks) or bool(module._backward_pre_hooks)
    return found


@contextmanager
def watching(
    ask: Callable[[Question, str], None],
    applied: Callable[[FrameType, Any, tuple[Any, ...], dict[str, Any]], None],
    inference: bool,
) -> Iterator[None]:
    """Report questions, with the file that asks, and calls of autograd functions: (frame of `apply`, class, arguments).

    `inference`: the answer to the question for inference mode.
    """
    grad, unwrap = torch.is_grad_enabled, functorch.unwrap_dead_wrappers
    inferring, engine = torch.is_inference_mode_enabled, autograd._engine_run_backward  # type: ignore[attr-defined]

    def is_grad_enabled() -> bool:
        ask(Question.GRAD, asking_file(1))
        return grad()

    def is_inference_mode_enabled() -> bool:
        ask(Question.INFERENCE, asking_file(1))
        return inference or inferring()

    def unwrap_dead_wrappers(args: tuple[Any, ...]) -> tuple[Any, ...]:
        args = unwrap(args)
        frame = sys._getframe(1)
        if frame.f_code == _APPLY and frame.f_locals["cls"].__module__ != _RECOMPUTING:
            applied(frame, frame.f_locals["cls"], args, frame.f_locals["kwargs"])
        return args

    def differentiate(*args: Any, **kwargs: Any) -> Any:
        raise Refused("it differentiates inside of its forward (torch.autograd.grad or backward), where gradients would pass unseen code")

    autograd._engine_run_backward = differentiate  # type: ignore[attr-defined]
    torch.is_grad_enabled, torch.is_inference_mode_enabled = is_grad_enabled, is_inference_mode_enabled
    functorch.unwrap_dead_wrappers = unwrap_dead_wrappers
    try:
        yield
    finally:
        torch.is_grad_enabled, torch.is_inference_mode_enabled = grad, inferring
        functorch.unwrap_dead_wrappers = unwrap
        autograd._engine_run_backward = engine  # type: ignore[attr-defined]


@cache
def compiler_code() -> CodeType:
    """Returns the code that `torch.compile` makes of a function: its frame is there when it runs, compiled or not."""
    checks = Distribution._validate_args  # torch.compile turns them off for the whole process
    try:
        return torch.compile(is_model, backend="eager").__code__
    finally:
        Distribution.set_default_validate_args(checks)
