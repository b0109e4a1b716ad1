"""Refuses caches that somebody else than the parallel model filled, where they would give errors about sizes or wrong gradients.

A cache that a parallel model returns holds the rank's own heads. One that somebody else filled (prefix tuning, a cache of the model on
one device) holds all of them, which do not fit: torch's error about sizes is explained when it comes. Where every rank holds all
key-value heads it fits. But each rank attends to it with its own query heads alone, so its gradient would be a summand: it may not
need one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from autotp.errors import AutoTPError

_OWN = "_autotp_own"


def refuse_trained(values: Iterable[Any]) -> None:
    """Refuse caches among a call's arguments whose tensors need gradients and were not made by a call of the parallel model.

    Raises:
        AutoTPError: names the layer.
    """
    for value in values:
        for i, layer in enumerate(_layers(value)):
            for tensor in _tensors(layer):
                if tensor.requires_grad and _OWN not in tensor.__dict__:
                    raise AutoTPError(
                        f"past_key_values holds trained tensors that this model did not make (layer {i}, shape {tuple(tensor.shape)}): "
                        "each rank would get its part of their gradient alone. Prefix tuning, which fills a cache of its own, does not "
                        "work with tensor parallelism: use prompt tuning or LoRA"
                    )


def mark_own(values: Iterable[Any]) -> None:
    """Note that the caches among these values were filled by a call of the parallel model."""
    for value in values:
        for layer in _layers(value):
            for tensor in _tensors(layer):
                if tensor.requires_grad:
                    setattr(tensor, _OWN, True)


def _tensors(layer: Any) -> Iterable[Tensor]:
    return (t for t in vars(layer).values() if isinstance(t, Tensor)) if hasattr(layer, "__dict__") else ()


def not_of_this_rank(values: Iterable[Any], error: RuntimeError) -> str:
    """Says what is wrong where a call with a filled cache among its arguments failed over sizes; "" elsewhere."""
    if isinstance(error, AutoTPError) or "ize" not in str(error):
        return ""
    for value in values:
        keys = next((k for k in map(_keys, _layers(value)) if isinstance(k, Tensor) and k.dim() == 4 and k.numel()), None)
        if keys is not None:
            return (
                f"past_key_values holds {keys.shape[1]} key-value heads, which are not this rank's own: give the call the cache that this "
                f"model returned. Prefix tuning, which fills a cache of its own, does not work with tensor parallelism ({error})"
            )
    return ""


def _layers(cache: Any) -> Iterable[Any]:
    """The layers of a `Cache` of transformers, or of two in one."""
    if cache is None or isinstance(cache, Tensor):
        return ()
    inner = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if all(c is not None for c in inner):
        return [layer for c in inner for layer in _layers(c)]
    layers = getattr(cache, "layers", ())
    return layers if isinstance(layers, list | tuple) else ()


def _keys(layer: Any) -> Any:
    return getattr(layer, "keys", None)
