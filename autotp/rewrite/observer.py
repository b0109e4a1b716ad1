"""Marks hooks that accept whatever value a module inside of a region has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Observer:
    """A hook that accepts values as they are, and changes none: parts and summands included."""

    __slots__ = ("hook",)

    def __init__(self, hook: Callable[..., None]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> None:
        self.hook(*args)
