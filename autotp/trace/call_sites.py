"""Finds the place of an operator call: the code object and instruction of the nearest frame that is not torch's own plumbing.

The recorder notes places while tracing, and interventions at run time find their calls by them, so both use this function.
"""

from __future__ import annotations

import dis
import sys
from functools import cache
from pathlib import Path
from types import CodeType

import torch

from autotp.trace.opened import FILE, OPEN_NAMES

_TORCH = torch.__file__.rsplit("__init__", 1)[0]
#: Files that only forward a call: their frames are never the place where a call was made. The last one is above this layer, so it is named
#: by its path; a test compares it with the file of `SiteMode`.
PLUMBING = frozenset(
    (
        *(_TORCH + name for name in ("overrides.py", "nn/functional.py", "_tensor.py", "functional.py", "_VF.py", "_jit_internal.py")),
        str(Path(__file__).absolute().parent.parent / "rewrite" / "operators" / "call_sites.py"),
    )
)


def call_place(depth: int = 1) -> tuple[CodeType, int]:
    """Returns (code, f_lasti) of the first frame at least `depth` above the caller that is not plumbing."""
    frame = sys._getframe(depth)
    while (code := frame.f_code).co_filename in PLUMBING and frame.f_back is not None:
        if code.co_filename == FILE and code.co_name in OPEN_NAMES:
            break
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


@cache
def _starts(key: int, holder: _Held) -> dict[int, int]:
    starts: dict[int, int] = {}
    start = 0
    joined = False  # the instruction before was PRECALL: this CALL belongs to it
    for instruction in dis.get_instructions(holder.code, show_caches=True):
        if instruction.opname != "CACHE":
            if not joined:
                start = instruction.offset
            joined = instruction.opname == "PRECALL"
        starts[instruction.offset] = start
    return starts


class _Held:
    """A code object compared by identity: hashing one by value reads all of it."""

    __slots__ = ("code",)

    def __init__(self, code: CodeType) -> None:
        self.code = code

    def __hash__(self) -> int:
        return id(self.code)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.code is self.code


def call_of(code: CodeType, offset: int) -> int:
    """Returns the instruction of `code` that `offset` belongs to, the same for all offsets that one call can show.

    The interpreter leaves `f_lasti` at the call's PRECALL, its CALL or the cache entries behind it, depending on whether the callee
    is Python code and how warm the caller is.
    """
    return _starts(id(code), _Held(code)).get(offset, offset)
