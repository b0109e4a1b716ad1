"""A model on one device and the same model over several ranks: observed, compared, and where they differ located."""

from __future__ import annotations

from autotp.testing.equivalence.check import Equivalence, NotEquivalent, assert_equivalent

__all__ = ["Equivalence", "NotEquivalent", "assert_equivalent"]
