"""The place of an operator call: the code object and instruction of the nearest frame that is not torch's own plumbing.

The recorder notes places while tracing, and interventions at run time find their calls by them, so both use this function.
"""

from __future__ import annotations

import sys
from types import CodeType

import torch

_TORCH = torch.__file__.rsplit("__init__", 1)[0]
#: Files that only forward a call: their frames are never the place where a call was made.
PLUMBING = frozenset(_TORCH + name for name in ("overrides.py", "nn/functional.py", "_tensor.py", "functional.py", "_VF.py", "_jit_internal.py"))


def call_place(depth: int = 1) -> tuple[CodeType, int]:
    """(code, f_lasti) of the first frame at least `depth` above the caller that is not plumbing."""
    frame = sys._getframe(depth)
    while frame.f_code.co_filename in PLUMBING and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti
