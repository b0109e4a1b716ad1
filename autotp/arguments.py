"""Checks plain arguments of public functions: each raises an error that names the argument, the value and what is wanted."""

from __future__ import annotations

from threading import TIMEOUT_MAX
from typing import Any

from autotp.errors import InputError


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> None:
    """Refuse anything but an int from `least` to `most`; a bool is none.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {value!r}, wanted a whole number {wanted}")


def seconds(name: str, value: Any) -> None:
    """Refuse anything but a number of seconds that a thread can wait.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= TIMEOUT_MAX:
        raise InputError(f"{name} is {value!r}, wanted seconds above 0")
