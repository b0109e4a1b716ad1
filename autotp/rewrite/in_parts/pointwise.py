"""Names of functions of torch, as `torch.x` and `Tensor.x`, that work element by element, and of those that cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from autotp.rewrite.in_parts.tensor import InParts, part

ELEMENTWISE = (
    "abs", "add", "addcdiv", "addcmul", "atan", "ceil", "clamp", "clamp_max", "clamp_min", "clip", "clone", "cos", "cosh", "div", "erf",
    "exp", "exp2", "expm1", "floor", "fmod", "isfinite", "isinf", "isnan", "lerp", "log", "log10", "log1p", "log2", "logaddexp",
    "masked_fill", "maximum", "minimum", "mul", "multiply", "nan_to_num", "neg", "negative", "pow", "reciprocal", "relu", "remainder",
    "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "sub", "subtract", "tan", "tanh", "true_divide", "trunc",
    "divide", "where", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__div__",
    "__rdiv__", "__neg__", "__pow__", "__rpow__", "__mod__", "rsub",
    "eq", "ge", "gt", "le", "lt", "ne", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__",
    "logical_and", "logical_not", "logical_or", "__and__", "__invert__", "__or__",
)  # fmt: skip
CASTS = ("bfloat16", "bool", "double", "float", "half", "int", "long", "to", "type", "type_as")


def cast(func: Callable[..., Any]) -> Callable[..., Any]:
    """Casts: of a plain tensor `to` one in parts, which has its dtype and device; one that casts nothing returns its argument."""

    def run(x: Any, *args: Any, **kwargs: Any) -> Any:
        others = tuple(a._local_tensor if isinstance(a, InParts) else a for a in args)
        more = {name: a._local_tensor if isinstance(a, InParts) else a for name, a in kwargs.items()}
        if not isinstance(x, InParts):
            return func(x, *others, **more)
        local = part(x)
        result = func(local, *others, **more)
        if not isinstance(result, Tensor):  # `x.type()` is a name
            return result
        return x if result is local else x.again(result, x._kind)

    return run
