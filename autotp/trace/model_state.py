"""Puts a model into the state that it is traced in, and back.

Parameters and buffers are replaced by fake tensors, plain ints of modules and configs by `TaggedInt`s, and blocks alike are found
so that only one of them runs. Everything is undone on exit, whatever happened inside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autotp.trace.keep import Undo
from autotp.trace.recorder import Recorder
from autotp.trace.tags import Tagger
from autotp.trace.weights import Weights

_SKIP = frozenset(nn.Module().__dict__) | {"forward"}


def set_item(mapping: dict[Any, Any], key: Any, value: Any, undo: Undo) -> None:
    """Sets `mapping[key] = value`, and pushes the step back on `undo`."""
    had, old = key in mapping, mapping.get(key)

    def back() -> None:
        if had:
            mapping[key] = old
        else:
            mapping.pop(key, None)

    mapping[key] = value
    undo.append(back)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts all modules in training or eval mode inside; each one's own mode is restored after."""
    modes = [(m, m.training) for m in model.modules()]
    for module, before in modes:
        if before is not training:  # a module looks through all its tables before it takes an attribute
            module.training = training
    try:
        yield
    finally:
        for module, before in modes:
            if module.training is not before:
                module.training = before


@contextmanager
def same_numbers() -> Iterator[None]:
    """Makes host random numbers (masks drawn by numpy in training) the same in every run inside; the caller's go on after."""
    numbers, host = np.random.get_state(), random.getstate()
    np.random.seed(0)
    random.seed(0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(host)


@contextmanager
def moved_nowhere(recorder: Recorder) -> Iterator[None]:
    """Leaves a module inside as it is where its model's code moves it to another device (`self.head.to(x.device)`): all is on one.

    A conversion of a module to another dtype in the middle of a forward is refused: its parameters would change from call to call.
    """
    original: Callable[..., nn.Module] = nn.Module._apply

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if id(module) not in recorder.calls.paths:
            return original(module, fn, recurse)
        with recorder.tape.paused(), recorder.fake:
            for dtype in dict.fromkeys(t.dtype for t in (*module.parameters(), *module.buffers())):
                made = fn(torch.empty(1, dtype=dtype))
                if made.dtype is not dtype:
                    raise RuntimeError(f"{type(module).__name__} is converted from {dtype} to {made.dtype} inside of a forward")
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def fake_weights(model: nn.Module, fake: FakeTensorMode, skip: Callable[[str], bool], undo: Undo) -> Weights:
    """Swap fake parameters and buffers in, on the CPU; tied tensors stay tied.

    An attribute of a module gives another object than its table, as in a parallel model, so that the two ways to read it can be
    told apart.
    """
    made: dict[int, Tensor] = {}
    weights = Weights()
    for path, module in model.named_modules():
        if skip(path):
            continue
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with fake:
                        # a sparse one has no values to shard; only its shape and layout are needed
                        new: Tensor = (
                            torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                            if tensor.layout is torch.strided
                            else fake.from_tensor(tensor, static_shapes=True)
                        )
                        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if table is module._parameters else new
                now = made[id(tensor)]
                set_item(table, name, now, undo)
                if table is module._parameters:
                    whole = f"{path}.{name}" if path else name
                    with fake:
                        shown = nn.Parameter(now.detach(), now.requires_grad)
                    set_item(module.__dict__, name, shown, undo)
                    weights.attributes[id(shown)] = shown, whole
                    weights.objects.setdefault(id(now), whole)
                    weights.originals[id(tensor)] = table, name
    return weights


def tag_ints(model: nn.Module, skip: Callable[[str], bool], undo: Undo, tagger: Tagger) -> None:
    """Replace the plain ints of each module and of the configs it holds by tagged ones; a shared config gets one view a module."""
    for path, module in model.named_modules():
        if skip(path):
            continue
        for key, value in list(module.__dict__.items()):
            if key in _SKIP:
                continue
            tagged = tagger.tag(value, path, key)
            if tagged is not value:
                set_item(module.__dict__, key, tagged, undo)
