"""What GPUs and the links between them can do: the bundled table, and files of the same form.

compute    t = max(flops / (compute · rate), bytes / (stream · bandwidth))            of each operator (roofline)
           `rows` in the place of `stream` where it has flops: products of few rows read weights slower than additions do
all-reduce t = base + 2(n−1) · step + 2(n−1)/n · S / (efficiency · bandwidth)         S bytes of the result, n ranks (ring)
all-gather t = base +  (n−1) · step +  (n−1)/n · S / (efficiency · bandwidth)         a reduce-scatter likewise
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autotp.errors import InputError
from autotp.targets import near
from autotp.textfile import is_file, read_text, reason

TABLE = Path(__file__).parent / "hardware.yaml"
T = TypeVar("T", "Gpu", "Link")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one process of a CPU: the fields of `hardware.yaml`."""

    name: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    compute: float
    stream: float
    launch: float
    serial: bool
    reserved: float = 0.0
    link: str = ""
    rows: float | None = None

    def rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second in `dtype`: the named rate, else that of the widest named dtype that is not wider."""
        name = str(dtype).removeprefix("torch.")
        if name in self.flops:
            return self.flops[name] * self.compute
        narrower = {n: rate for n, rate in self.flops.items() if getattr(torch, n).itemsize <= dtype.itemsize}
        best = max(narrower, key=lambda n: getattr(torch, n).itemsize, default=None)
        return (min(self.flops.values()) if best is None else narrower[best]) * self.compute

    def seconds(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """Seconds of one operator."""
        compute = flops / self.rate(dtype) if flops else 0.0
        stream = self.rows if flops and self.rows is not None else self.stream
        return max(compute, moved / (self.bandwidth * stream)) + (self.launch if self.serial else 0.0)


@dataclass(frozen=True, slots=True)
class Link:
    """The links of a GPU to the others: the fields of `hardware.yaml`."""

    name: str
    bandwidth: float
    efficiency: float
    base: float
    step: float
    buffers: int = 0
    most: int | None = None

    def seconds(self, turns: int, nbytes: float, ranks: int) -> float:
        """Seconds of a collective whose result has `nbytes`. turns: 2 for an all-reduce, 1 for an all-gather or a reduce-scatter."""
        if ranks == 1:
            return 0.0
        steps = turns * (ranks - 1)
        return self.base + steps * self.step + steps / ranks * nbytes / (self.bandwidth * self.efficiency)


class _GpuFields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)
    memory: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    flops: dict[str, float] = Field(min_length=1)
    compute: float = Field(gt=0, le=1)
    stream: float = Field(gt=0, le=1)
    launch: float = Field(ge=0)
    serial: bool
    reserved: float = Field(ge=0, default=0.0)
    link: str = ""
    rows: float | None = Field(gt=0, le=1, default=None)
    source: str = Field(min_length=1)


class _LinkFields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)
    bandwidth: float = Field(gt=0)
    efficiency: float = Field(gt=0, le=1)
    base: float = Field(ge=0)
    step: float = Field(ge=0)
    buffers: int = Field(ge=0, default=0)
    most: int | None = Field(ge=1, default=None)
    source: str = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Table:
    """GPUs and links by name."""

    gpus: Mapping[str, Gpu] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)


@cache
def bundled() -> Table:
    """Returns the table that comes with autotp."""
    return read(TABLE)


def read(path: Path) -> Table:
    """Reads a table.

    Raises:
        InputError: the file cannot be read, or is no such table; names the entry and the field.
    """
    try:
        data = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"hardware {path}: {' '.join(str(error).split()) if isinstance(error, yaml.YAMLError) else reason(error)}"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("gpus", {}), dict) or not isinstance(data.get("links", {}), dict):
        raise InputError(f"hardware {path}: wanted a mapping with gpus and links, as `autotp calibrate` writes")
    defaults, problems = data.get("defaults") or {}, []
    gpus: dict[str, Gpu] = {}
    links: dict[str, Link] = {}
    for name, entry in data.get("gpus", {}).items():
        try:
            fields = _GpuFields.model_validate({**defaults, **(entry if isinstance(entry, dict) else {})}).model_dump(exclude={"source"})
        except ValidationError as error:
            problems += [f"gpus.{name}.{_first(error)}"]
            continue
        unknown = [d for d in fields["flops"] if not isinstance(getattr(torch, d, None), torch.dtype)]
        if unknown or not all(math.isfinite(v) and v > 0 for v in fields["flops"].values()):
            problems.append(f"gpus.{name}.flops: wanted names of dtypes and rates above 0, got {fields['flops']}")
        gpus[str(name)] = Gpu(str(name), **fields)
    for name, entry in data.get("links", {}).items():
        try:
            links[str(name)] = Link(str(name), **_LinkFields.model_validate(entry).model_dump(exclude={"source"}))
        except ValidationError as error:
            problems += [f"links.{name}.{_first(error)}"]
    if problems:
        raise InputError(f"hardware {path}: " + "; ".join(problems))
    return Table(gpus, links)


def gpu(text: str) -> tuple[Gpu, Table]:
    """The GPU that a name of the bundled table or a file means, and the table that it is from. A file has to hold one GPU.

    Raises:
        InputError: there is none.
    """
    table, one = _table(text, "gpu")
    return (_only(table.gpus, text, "gpu") if one else _named(table.gpus, text, "gpu")), table


def link(text: str, beside: Table) -> Link:
    """The link that a name or a file means. Names are looked up in the table `beside` first.

    Raises:
        InputError: there is none.
    """
    if text in beside.links:
        return beside.links[text]
    table, one = _table(text, "link")
    return _only(table.links, text, "link") if one else _named(table.links, text, "link")


def with_memory(of: Gpu, memory: float) -> Gpu:
    """Returns the GPU with another amount of memory, in bytes."""
    return replace(of, memory=memory)


def _table(text: object, what: str) -> tuple[Table, bool]:
    if not isinstance(text, str) or not text:
        raise InputError(f"{what} is {text!r}, wanted the name of one or a file that `autotp calibrate` wrote")
    path = Path(text)
    if text.endswith((".yaml", ".yml")) or is_file(path):
        return read(path), True
    return bundled(), False


def _only(entries: Mapping[str, T], text: str, what: str) -> T:
    if len(entries) != 1:
        raise InputError(f"{what} {text}: the file names {len(entries)} {what}s, wanted one")
    return next(iter(entries.values()))


def _named(entries: Mapping[str, T], text: str, what: str) -> T:
    if text not in entries:
        hint = near(text, entries) or f"; known are {', '.join(entries)}"
        raise InputError(f"{what} is {text!r}, which is neither known nor a file{hint}")
    return entries[text]


def _first(error: ValidationError) -> str:
    found: Any = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}, got {found['input']!r}"
