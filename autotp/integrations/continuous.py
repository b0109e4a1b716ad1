"""Makes continuous batching of transformers (`generate_batch`, `init_continuous_batching`) right for parallel models.

transformers sizes its paged cache by the config's number of key heads, over tp where its own plan names the projections. A rank of
autotp may hold another number: heads are padded where tp does not divide them, shared where there are more ranks than heads, and models
that transformers has no plan for are cut too. So the number is read off the cache that a forward of one token returns.

transformers would also change the attention to one that it can batch, or likes better. The plan holds for the attention that the model
was made parallel with, so that one stays.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autotp.errors import AutoTPError
from autotp.parallel_state import state_of
from autotp.rewrite.guards.same_inputs import compare_inputs
from autotp.rewrite.rng import device_of
from autotp.rewrite.undo import Undo

_METHOD = "init_continuous_batching"
_HEADS = "num_key_value_heads"


def install_continuous(model: nn.Module, undo: Undo) -> None:
    """Have `model` begin continuous batching on all ranks, with a cache of each rank's heads; journalled in `undo`."""
    if callable(getattr(model, _METHOD, None)):
        undo.set_attribute(model, _METHOD, BatchTogether(model))


class BatchTogether:
    """Replaces `model.init_continuous_batching`, which `generate_batch` calls. It survives deepcopy."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._init: Callable[..., Any] = getattr(model, _METHOD)
        functools.update_wrapper(self, self._init)

    def __call__(self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None) -> Any:
        """Returns the manager. Collective.

        Raises:
            AutoTPError: the attention cannot be batched, the layers' caches differ in their heads, or the ranks' inputs differ in size.
            LostRankError: not every rank calls this.
        """
        model, comm, name = self._model, state_of(self._model).comm, type(self._model).__name__
        hints = vars(workload_hints) if workload_hints is not None else {}
        compare_inputs(comm, f"{name}.{_METHOD}", (), hints, device_of(model))
        _refuse_attention(model)
        if getattr(model, "_cached_continuous_batching_manager", None) is None:
            heads = _cached_heads(model.eval())
            manager = self._init(generation_config, _same_attention(continuous_batching_config), workload_hints)
            manager.distributed_helper.tp_plan = {}  # which would have the heads divided by tp
            manager._create_batch_processor = _WithHeads(manager, heads)
            return manager
        return self._init(generation_config, continuous_batching_config, workload_hints)


class _WithHeads:
    """Replaces a manager's `_create_batch_processor`, which makes the cache: the config has a rank's heads meanwhile."""

    def __init__(self, manager: Any, heads: int) -> None:
        self._manager, self._heads = manager, heads
        self._create: Callable[[], Any] = manager._create_batch_processor

    def __call__(self) -> Any:
        with _set(vars(self._manager.model.config.get_text_config()), _HEADS, self._heads):
            return self._create()


@contextmanager
def _set(items: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    missing = object()
    old = items.get(name, missing)
    items[name] = value
    try:
        yield
    finally:
        if old is missing:
            del items[name]
        else:
            items[name] = old


@torch.no_grad()
def _cached_heads(model: nn.Module) -> int:
    """Returns the key heads of a rank, as a forward of one token leaves them in the cache. Collective."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device_of(model))
    layers = getattr(model(input_ids=token, use_cache=True).past_key_values, "layers", ())
    heads: set[int] = {layer.keys.shape[1] for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)}
    if len(heads) != 1:
        raise AutoTPError(
            f"{type(model).__name__} cannot be batched continuously: its layers cache {sorted(heads) or 'no'} key heads on a rank, and "
            "transformers' paged cache has one number of heads. Call generate"
        )
    return heads.pop()


def _refuse_attention(model: Any) -> None:
    own = model.config._attn_implementation
    if own == "eager":
        raise AutoTPError(
            f"{type(model).__name__} cannot be batched continuously with attn_implementation='eager': transformers would change that, and "
            "the plan holds for it. Load the model with attn_implementation='sdpa'"
        )


def _same_attention(config: Any) -> Any:
    """Returns the config of the batching without leave to change the attention."""
    from transformers import ContinuousBatchingConfig

    own = ContinuousBatchingConfig() if config is None else copy.copy(config)
    own.auto_switch_to_flash = False
    return own
