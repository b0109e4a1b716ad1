"""Prove that nothing moved: equivalence checks, mistakes made on purpose, and Hypothesis strategies, for models and recipes of your own.

    from autotp.testing import assert_equivalent

    def test_my_model():
        assert_equivalent(lambda: MyModel(), tp=2, inputs={"x": torch.randn(2, 5, 64)}, steps=3)

`assert_equivalent` compares a model on one device with the model over `tp` ranks; `sabotage` makes mistakes that it must notice;
`strategies` draws geometries, layouts, tensors, meshes, configs and whole architectures. docs/testing.md shows all of it.
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
    """The public names, imported when first asked for: strategies want hypothesis, and parts of this package serve those without it."""
    from importlib import import_module

    if name in ("sabotage", "strategies"):
        return import_module(f"autotp.testing.{name}")
    if name in __all__:
        return getattr(import_module("autotp.testing.equivalence.check"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
