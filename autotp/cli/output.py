"""Prints results for programs, and writes files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from autotp.errors import InputError


def print_json(value: Any) -> None:
    """Prints `value` on stdout; infinite numbers become null, since JSON cannot write them."""
    typer.echo(json.dumps(_finite(value), indent=2))


def check_folder(file: Path) -> None:
    """Refuses a file that cannot be written there, before time is spent on what goes into it.

    Raises:
        InputError: it has no folder, or is one.
    """
    if not file.absolute().parent.is_dir():
        raise InputError(f"there is no folder {file.absolute().parent} to write {file.name} to")
    if file.is_dir():
        raise InputError(f"{file} is a folder, wanted a file to write")


def write_file(file: Path, text: str) -> None:
    """Writes `text`, over what is there.

    Raises:
        InputError: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
