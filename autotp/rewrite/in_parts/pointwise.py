"""Names of functions of torch, as `torch.x` and `Tensor.x`, that work element by element, and of those that cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autotp.rewrite.in_parts.tensor import InParts, part

ELEMENTWISE = (
    "abs", "add", "clamp", "clamp_max", "clamp_min", "clip", "clone", "cos", "div", "exp",
    "expm1", "isfinite", "isinf", "isnan", "log", "log1p", "masked_fill", "maximum", "minimum", "mul", "multiply",
    "nan_to_num", "neg", "negative", "pow", "reciprocal", "relu", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "square", "sub", "subtract",
    "tanh", "true_divide", "divide", "where", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__",
    "__truediv__", "__rtruediv__", "__div__", "__rdiv__", "__neg__", "__pow__", "rsub",
)  # fmt: skip
CASTS = ("bfloat16", "double", "float", "half", "to", "type_as")


def cast(func: Callable[..., Any]) -> Callable[..., Any]:
    """Casts: of a plain tensor `to` one in parts, which has its dtype and device; one that casts nothing returns its argument."""

    def run(x: Any, *args: Any, **kwargs: Any) -> Any:
        others = tuple(a._local_tensor if isinstance(a, InParts) else a for a in args)
        more = {name: a._local_tensor if isinstance(a, InParts) else a for name, a in kwargs.items()}
        if not isinstance(x, InParts):
            return func(x, *others, **more)
        local = part(x)
        result = func(local, *others, **more)
        return x if result is local else x.again(result, x._kind)

    return run
