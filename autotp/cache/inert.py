"""Objects of the standard library that models' code holds, and that say nothing or little about what it computes."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import types
import weakref
from collections.abc import Sequence
from typing import Any

#: Their kind is all that counts.
INERT = frozenset(
    (
        *("builtins.object", "_abc._abc_data", "_thread.lock", "_thread.RLock", "threading.Condition", "_thread._local", "builtins.super"),
        *("logging.Logger", "logging.RootLogger", "logging.StreamHandler", "dataclasses._DataclassParams", "dataclasses._MISSING_TYPE"),
        *("dataclasses._HAS_DEFAULT_FACTORY_CLASS", "dataclasses._KW_ONLY_TYPE", "_collections._tuplegetter", "weakref.WeakKeyDictionary"),
        *(
            "weakref.WeakValueDictionary",
            "_weakrefset.WeakSet",
            "torch._dynamo.eval_frame.DisableContext",
            "torch.utils.hooks.RemovableHandle",
        ),
    )
)
#: Their text is all that counts.
SPELLED = frozenset(("inspect.Signature", "itertools.count", "types.GenericAlias", "types.UnionType", "builtins.slice", "builtins.range"))
#: Attributes that are another number in each process, and that no forward reads: marks of torch.compile, a hash that transformers notes.
VOLATILE = frozenset(("_torchdynamo_wrapper_id", "_original_object_hash"))


def held_by(item: Any) -> Sequence[Any] | None:
    """Returns what an object of the standard library stands for; None for other objects."""
    if isinstance(item, (staticmethod, classmethod, types.MethodType)):
        return (item.__func__, getattr(item, "__self__", None))
    if isinstance(item, property):
        return (item.fget, item.fset, item.fdel)
    if isinstance(item, (functools.partial, functools.partialmethod)):
        return (item.func, item.args, item.keywords)
    if isinstance(item, functools.cached_property):
        return (item.func,)
    if isinstance(item, functools._lru_cache_wrapper):
        return (item.__wrapped__,)
    if isinstance(item, dataclasses.Field):
        return (item.name, item.default, item.default_factory, item.init)
    if isinstance(item, contextvars.ContextVar):
        return (item.name, item.get(None))
    if isinstance(item, weakref.ref):
        return (item(),)
    if isinstance(item, types.MappingProxyType):
        return (dict(item),)
    if type(item).__name__ == "_GeneratorContextManager":
        return (item.func, item.args, item.kwds)
    return None
