"""Writes numbers as people read them."""

from __future__ import annotations


def amount(value: float) -> str:
    """`1234.5` → `1234`, `1.234` → `1.2`."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def gigabytes(nbytes: float) -> str:
    """`8.28e10` → `82.8 GB`."""
    return f"{nbytes / 1e9:.3g} GB"
