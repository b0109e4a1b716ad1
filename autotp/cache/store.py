"""Keeps plans in a folder, a file for each key.

An entry is JSON: the key, the plan as `autotp.plan.codec` writes it, and a digest of both. It is written beside its place and put there in
one step, so that several processes may write it. One that cannot be read, or whose digest is wrong, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from autotp.cache.key import Key
from autotp.errors import RecipeError
from autotp.plan.codec import decode, encode
from autotp.plan.plan import Plan
from autotp.textfile import read_text

#: Entries and bytes that stay in a folder; the ones longest unused go first.
MOST_ENTRIES = 256
MOST_BYTES = 256 * 2**20
_SUFFIX = ".plan.json"


def read(folder: Path, key: Key) -> Plan | None:
    """Returns the plan that is kept under `key`; None where there is none that can be trusted."""
    path = folder / (key.digest + _SUFFIX)
    try:
        entry = json.loads(read_text(path))
        if entry.keys() != {"key", "head", "plan", "digest"} or entry["digest"] != _digest(entry):
            return None
        if entry["key"] != key.digest or entry["head"] != list(key.head):
            return None
        plan = decode(entry["plan"])
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, RecipeError):
        return None
    with suppress(OSError):
        os.utime(path)
    return plan


def write(folder: Path, key: Key, plan: Plan) -> None:
    """Keeps a plan under `key`. A folder that cannot be written to is warned of."""
    data: dict[str, Any] = {"key": key.digest, "head": list(key.head), "plan": encode(plan)}
    text = json.dumps(data | {"digest": _digest(data)})
    if decode(json.loads(text)["plan"]) != plan:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, beside = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
            Path(beside).replace(folder / (key.digest + _SUFFIX))
        except BaseException:
            with suppress(OSError):
                Path(beside).unlink()
            raise
        _trim(folder)
    except OSError as error:
        warnings.warn(f"AUTOTP_CACHE: no plan is kept in {str(folder)!r}: {error.strerror or error}", stacklevel=2)


def _digest(entry: dict[str, Any]) -> str:
    text = json.dumps([entry["key"], entry["head"], entry["plan"]], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _trim(folder: Path) -> None:
    """Deletes what has been unused for longest. Another process may do the same at the same time."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("*" + _SUFFIX):
        with suppress(OSError):
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    size = 0
    for number, (_, length, path) in enumerate(sorted(found, reverse=True), 1):
        size += length
        if number > MOST_ENTRIES or size > MOST_BYTES:
            with suppress(OSError):
                path.unlink()
