"""Names without anything behind them, see the package."""

from __future__ import annotations

from typing import Any

from torchvision import named


def __getattr__(name: str) -> Any:
    return named(__name__, name)
