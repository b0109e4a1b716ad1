"""Checks that a parallel model equals the model itself, for models and recipes of your own.

    from autotp.testing import assert_equivalent

    def test_my_model():
        assert_equivalent(lambda: MyModel(), tp=2, inputs={"x": torch.randn(2, 5, 64)}, steps=3)

`assert_equivalent` compares a model on one device with the model over `tp` ranks. `sabotage` makes mistakes on purpose that it must
find. `strategies` are Hypothesis strategies: they draw geometries, layouts, tensors, meshes, configs and whole architectures.
docs/testing.md shows all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import autotp.testing.sabotage as sabotage
    import autotp.testing.strategies as strategies
    from autotp.testing.equivalence.check import Equivalence as Equivalence
    from autotp.testing.equivalence.check import NotEquivalent as NotEquivalent
    from autotp.testing.equivalence.check import assert_equivalent as assert_equivalent

__all__ = ["Equivalence", "NotEquivalent", "assert_equivalent", "sabotage", "strategies"]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first asked for.

    `strategies` needs hypothesis, and other parts of this package work without it.
    """
    from importlib import import_module

    if name in ("sabotage", "strategies"):
        return import_module(f"autotp.testing.{name}")
    if name in __all__:
        return getattr(import_module("autotp.testing.equivalence.check"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
