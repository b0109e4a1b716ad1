"""Reads text files that people hand over: small ones are read, others are refused before they take memory and time."""

from __future__ import annotations

from pathlib import Path

#: Bytes. A config.json has a few thousand, a recipe with the exact plan of a deep model some hundred thousand.
MOST = 16 * 2**20


def read_text(path: Path, most: int = MOST) -> str:
    """Returns the text of a UTF-8 file of at most `most` bytes.

    Raises:
        OSError: it cannot be read. ValueError: it is larger, or no text.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most} bytes, which is no file of this kind")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8 (byte {error.start})") from error


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def reason(error: Exception) -> str:
    """Says in a few words why a file cannot be read."""
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
