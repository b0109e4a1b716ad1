"""What a model is to do: answer requests, or train. Both are values that check themselves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch

from autotp.arguments import truth, whole_number
from autotp.errors import InputError

#: Text → dtype of parameters, activations and caches.
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
#: Dtypes that a cache is kept in, too.
CACHE_DTYPES = {**DTYPES, "float8": torch.float8_e4m3fn, "fp8": torch.float8_e4m3fn}
E = TypeVar("E", bound=Enum)


class Optimizer(Enum):
    """What an optimizer keeps for each parameter."""

    SGD = "sgd"
    MOMENTUM = "momentum"  # SGD with one moment, in the parameter's dtype
    ADAMW = "adamw"  # two moments, in the parameter's dtype
    ADAMW_FP32 = "adamw-fp32"  # two moments and a copy of the parameter, in float32

    def bytes(self, elements: int, itemsize: int) -> int:
        """Bytes of its state for so many elements of parameters."""
        moments = {Optimizer.SGD: 0, Optimizer.MOMENTUM: itemsize, Optimizer.ADAMW: 2 * itemsize, Optimizer.ADAMW_FP32: 12}
        return elements * moments[self]

    def moved(self, elements: int, itemsize: int) -> int:
        """Bytes that a fused step reads and writes: parameter, gradient and state; all but the gradient are written too."""
        return 3 * elements * itemsize + 2 * self.bytes(elements, itemsize)


class Checkpointing(Enum):
    """What a repeated block keeps for its backward."""

    NONE = "none"  # all that autograd saves
    SELECTIVE = "selective"  # results of products and attention; the rest is computed again
    FULL = "full"  # its inputs; all is computed again


@dataclass(frozen=True, slots=True)
class Serve:
    """Answers requests: `batch` of them at a time, over all replicas, each of `prompt` tokens, of which come `new_tokens` more.

    dtype: of weights and activations. kv_dtype: of the cache in memory; "" for `dtype`.

    Raises:
        InputError: a number below 1, or an unknown dtype.
    """

    batch: int = 1
    prompt: int = 512
    new_tokens: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str = ""

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "new_tokens"):
            whole_number(name, getattr(self, name))
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_dtype", self.kv_dtype, {"": None, **CACHE_DTYPES})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.dtype]

    @property
    def cache_scale(self) -> float:
        """Bytes of a cache entry over those of one in `dtype`."""
        return CACHE_DTYPES[self.kv_dtype or self.dtype].itemsize / self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Train:
    """Trains on `tokens` tokens a step, over all replicas, in sequences of `seq`.

    dtype: of parameters, gradients and activations. loss_parallel, sequence_parallel: logits, and hidden states between regions, stay in
    parts over the ranks.

    Raises:
        InputError: a number below 1, tokens that are no whole number of sequences, an unknown dtype, optimizer or checkpointing.
    """

    tokens: int = 8192
    seq: int = 2048
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    checkpointing: str = "none"
    loss_parallel: bool = False
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        whole_number("tokens", self.tokens)
        whole_number("seq", self.seq)
        if self.tokens % self.seq:
            raise InputError(f"tokens is {self.tokens}, wanted a multiple of seq, which is {self.seq}")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("optimizer", self.optimizer, {o.value: o for o in Optimizer})
        _one_of("checkpointing", self.checkpointing, {c.value: c for c in Checkpointing})
        for name in ("loss_parallel", "sequence_parallel"):
            truth(name, getattr(self, name))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters, gradients and activations."""
        return DTYPES[self.dtype]

    @property
    def sequences(self) -> int:
        """Sequences a step."""
        return self.tokens // self.seq


Workload = Serve | Train


def _one_of(name: str, value: Any, known: dict[str, Any]) -> None:
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} is {value!r}, wanted one of {', '.join(repr(k) for k in known if k)}")
