"""What the zoo of hand-written models is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: how to build it, what to call it with, what is known about its parallel form.

    Attributes:
        name: identifies the test.
        factory: builds the model from the torch seed; picklable.
        inputs: positional arguments (a tuple) for its forward; picklable function of the model.
        shards: parameters that a good plan shards.
        kept: parameters that must stay whole on every rank, because no exact sharding of them exists.
        refusable: raising `AutoTPError` is a right answer too.
        worlds: how many ranks it is tried on.
    """

    name: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], tuple[Any, ...]]
    shards: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    refusable: bool = False
    worlds: tuple[int, ...] = (2, 3, 4)

    def __str__(self) -> str:
        return self.name


def floats(*shapes: tuple[int, ...]) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    """Normal random inputs of these shapes."""
    return partial(make_floats_of, shapes)


def tokens(*shapes: tuple[int, ...]) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    """Random token ids below 32 of these shapes."""
    return partial(make_tokens_of, shapes)


def make_floats_of(shapes: tuple[tuple[int, ...], ...], model: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def make_tokens_of(shapes: tuple[tuple[int, ...], ...], model: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(32, shape, generator=generator) for shape in shapes)


def built(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """A picklable factory: the class with weights drawn afresh, so that biases and norms show."""
    return partial(build, cls, args, tuple(kwargs.items()))


def build(cls: type[nn.Module], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> nn.Module:
    from autotp.testing.tiny.models import randomise

    model = cls(*args, **dict(kwargs))
    randomise(model, seed=3)
    return model
