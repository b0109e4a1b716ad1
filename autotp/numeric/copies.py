"""Makes copies of a model in float64.

A parameter that holds a single value (a zero bias) gets noise; otherwise no check would find that it is added twice. A model
without weights gets random ones.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autotp.numeric.exact import Precision
from autotp.numeric.subject import CannotRun, in_precision


def deep_copy(model: nn.Module) -> nn.Module:
    """A deep copy. What a forward computed and a module holds (the weight of `torch.nn.utils.weight_norm`) is copied as numbers alone:
    torch copies no tensor that has a history.
    """
    held = (t for module in model.modules() for t in vars(module).values())
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf})


def copy_of(model: nn.Module, precision: Precision) -> nn.Module:
    """A deep copy on the CPU without gradients; see the module docstring.

    Raises:
        CannotRun: it cannot be copied, or buffers have no values.
    """
    try:
        copied = deep_copy(model)
    except Exception as error:  # what a module holds may refuse to be copied in any way
        raise CannotRun(f"the model cannot be copied ({type(error).__name__}: {error})") from error
    if any(b is a for a, b in zip(model.parameters(), copied.parameters(), strict=True)):
        raise CannotRun("a copy of the model shares its parameters")
    copied.zero_grad(set_to_none=True)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        _draw(copied)
    return _enlivened(_wide(copied, precision))


def _wide(model: nn.Module, precision: Precision) -> nn.Module:
    return model._apply(lambda t: in_precision(t, precision))  # type: ignore[no-untyped-call, no-any-return]


def _draw(model: nn.Module) -> None:
    """Give what is on the meta device values: random parameters, running statistics as at the start. Tied parameters stay tied.

    Raises:
        CannotRun: nothing says what a buffer holds.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(_random(p, generator), p.requires_grad)
                module._parameters[name] = made[id(p)]
        lost = [name for name, b in module._buffers.items() if b is not None and b.is_meta]
        if not lost:
            continue
        reset = getattr(module, "reset_running_stats", None)
        if reset is None:
            raise CannotRun(f"the model has no weights, and nothing says what its buffer {path + '.' if path else ''}{lost[0]} holds")
        for name in lost:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        reset()


def _random(p: Tensor, generator: torch.Generator) -> Tensor:
    if not p.is_floating_point():
        raise CannotRun(f"the model has no weights, and some are {p.dtype}")
    noise = torch.randn(p.shape, generator=generator)
    return (noise * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5 + 0.2 * noise).to(p.dtype)


def _enlivened(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def nudge(model: nn.Module) -> None:
    """Move every floating-point parameter by about one unit in the last place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                p.mul_(1 + signs * torch.finfo(p.dtype).eps)
