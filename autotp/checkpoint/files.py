"""Finds the files and tensors of a checkpoint of Hugging Face form on disk, and reads boxes of the tensors.

Opening reads headers only. A box is read through `safe_open(...).get_slice`, whose result is a view of the file's pages: only the
entries that are copied out of it are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from autotp.checkpoint.nodes import Box, Node
from autotp.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: Names of dtypes in headers of safetensors files, as far as torch has them and one entry is whole bytes; in the library's order.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@dataclass(frozen=True, slots=True, eq=False)
class FileTensor(Node):
    """One tensor of a safetensors file."""

    file: Path
    key: str


class Reader:
    """Reads boxes of `FileTensor`s; keeps the files open. `bytes` counts the bytes that were copied out."""

    def __init__(self) -> None:
        self.bytes = 0
        self._open: dict[Path, Any] = {}

    def __call__(self, source: Node, box: Box) -> Tensor:
        assert isinstance(source, FileTensor)
        count = source.dtype.itemsize
        for a, b in box:
            count *= b - a
        self.bytes += count
        try:
            part = self._file(source.file).get_slice(source.key)
            return part[tuple(slice(a, b) for a, b in box) if box else ...]  # type: ignore[no-any-return]
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{source.file}: {source.key} cannot be read: {error}") from error

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = open_file(file)
        return self._open[file]


def open_file(file: Path) -> Any:
    """Opens `file` with `safe_open`.

    Raises:
        CheckpointError: it is not there, or not a safetensors file (also: one that was cut off).
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError("reading checkpoints needs safetensors: pip install 'autotp[hf]'") from error
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file" + (" (a directory)" if file.is_dir() else ""))
    try:
        return safe_open(file, framework="pt", device="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file: {error}; {file.stat().st_size:,} bytes are there. "
            "It was cut off or overwritten: download or copy it again"
        ) from error


def tensors_of(file: Path) -> dict[str, FileTensor]:
    """Returns the tensors of a safetensors file by key; reads its header.

    Raises:
        CheckpointError: as for `open_file`, or a dtype that torch does not have.
    """
    found: dict[str, FileTensor] = {}
    opened = open_file(file)
    for key in opened.keys():  # noqa: SIM118  (a safe_open is no mapping)
        entry = opened.get_slice(key)
        dtype = DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise CheckpointError(f"{file}: {key} has the dtype {entry.get_dtype()}, which cannot be read here")
        found[key] = FileTensor(tuple(entry.get_shape()), dtype, file, key)
    return found


def checkpoint_files(directory: Path, name: str | None = None) -> tuple[Path, ...]:
    """Returns the safetensors files of a checkpoint: `name`, or `model.safetensors`, or those that its index lists.

    Raises:
        CheckpointError: there are none, the index cannot be read, or names a file outside of the directory or one that is missing.
    """
    if name is not None:
        inside(name, f"{directory / 'config.json'}: transformers_weights")
    single, index = directory / (name or SINGLE), directory / INDEX
    if name is not None and name.endswith(".index.json"):
        index = directory / name
    elif single.is_file():
        return (single,)
    if not index.is_file():
        raise CheckpointError(_nothing(directory, name))
    names = dict.fromkeys(_weight_map(index).values())
    for entry in names:
        inside(entry, str(index))
    missing = [entry for entry in names if not (directory / entry).is_file()]
    if missing:
        raise CheckpointError(f"{directory}: {len(missing)} of {len(names)} files of {index.name} are missing: {', '.join(missing[:5])}")
    return tuple(directory / entry for entry in names)


def checkpoint_tensors(directory: Path, name: str | None = None) -> dict[str, FileTensor]:
    """Returns every tensor of a checkpoint by key, from the headers of its files.

    Raises:
        CheckpointError: as for `checkpoint_files` and `tensors_of`; an index that names tensors that its files do not have.
    """
    found: dict[str, FileTensor] = {}
    for file in checkpoint_files(directory, name):
        found.update(tensors_of(file))
    index = directory / (name or INDEX)
    if index.name.endswith(".index.json") and index.is_file() and not (name is None and (directory / SINGLE).is_file()):
        lost = [key for key in _weight_map(index) if key not in found]
        if lost:
            raise CheckpointError(f"{index}: {len(lost)} tensors that it lists are in none of its files, the first is {lost[0]}")
    return found


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable index ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{index}: weight_map does not map tensors to files")
    return found


def inside(name: str, where: str) -> None:
    """Refuse names of files that lead out of their directory, or are no safetensors files.

    Raises:
        CheckpointError: names `where` it was found.
    """
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    if absolute or ".." in parts or not parts or "\0" in name:
        raise CheckpointError(f"{where} names {name!r}, which is not inside of its directory; it is not read")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{where} names {name!r}, which is no safetensors file")


def _nothing(directory: Path, name: str | None) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory"
    names = sorted(p.name for p in directory.iterdir())
    pickled = [n for n in names if n.endswith((".bin", ".bin.index.json", ".pt", ".pth"))]
    if pickled:
        return (
            f"{directory}: {pickled[0]} is a pickle: it cannot be read in parts, and reading it can run code. Convert it once with "
            "transformers: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
        )
    listed = ", ".join(_few(names)) or "nothing"
    return f"{directory}: no {name or f'{SINGLE} or {INDEX}'}; it holds {listed}"


def _few(names: Iterable[str], count: int = 8) -> list[str]:
    listed = list(names)
    return listed[:count] + ([f"… ({len(listed)} in all)"] if len(listed) > count else [])
