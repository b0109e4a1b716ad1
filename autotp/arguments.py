"""Checks plain arguments of public functions: each raises an error that names the argument, the value and what is wanted."""

from __future__ import annotations

from threading import TIMEOUT_MAX
from typing import Any, Literal

from autotp.errors import InputError


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> None:
    """Refuse anything but an int from `least` to `most`; a bool is none.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {value!r}, wanted a whole number {wanted}")


def truth(name: str, value: Any) -> bool:
    """Returns a bool, and refuses anything else.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}, wanted True or False")
    return value


def truth_or_auto(name: str, value: Any) -> bool | Literal["auto"]:
    """Returns a bool or "auto", and refuses anything else.

    Raises:
        InputError: it is something else.
    """
    if value == "auto" and isinstance(value, str):
        return "auto"
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}, wanted True, False or 'auto'")
    return value


def seconds(name: str, value: Any) -> None:
    """Refuse anything but a number of seconds that a thread can wait.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= TIMEOUT_MAX:
        raise InputError(f"{name} is {value!r}, wanted seconds above 0")
