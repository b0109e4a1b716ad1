"""Reads from an error of a model's code which keywords of its forward it misses.

Code that meets None where it needs a tensor fails at an instruction that reads a variable which is None. A caller handed it on, maybe
under another name, and so on up to the forward, whose keyword it is. Code that checks its arguments names them in the text of its error.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Container, Iterator
from types import CodeType, FrameType, TracebackType

from autotp.errors import TraceError
from autotp.trace.watch import is_code_of_a_model

#: How many lines before a `raise` the check stands that led to it.
_CHECKED = 3


def missing_keywords(error: TraceError, absent: Container[str]) -> list[str]:
    """The keywords among `absent` that the code which stopped with `error` misses, the likeliest first."""
    return list(dict.fromkeys(_found(error, absent)))


def _found(error: TraceError, absent: Container[str]) -> Iterator[str]:
    cause = error.__cause__
    steps = [*_chain(error.calls), *_chain(None if cause is None else cause.__traceback__)]
    frames = [(t.tb_frame, t.tb_lasti) for t in steps if is_code_of_a_model(t.tb_frame.f_code.co_filename)]
    yield from (word for word in re.findall(r"[A-Za-z_]\w+", str(cause)) if word in absent)
    if not frames:
        return
    names: list[str] = _none(*frames[-1])
    for frame, at in reversed(frames[:-1]):
        if not names:
            return
        handed = _none(frame, at)
        same = [name for name in handed if any(_alike(name, inner) for inner in names)]
        names = same or handed or names  # code around a forward hands everything on as it came
    yield from (name for name in names if name in absent)


def _alike(name: str, inner: str) -> bool:
    """Whether a variable is likely handed on under the name `inner`."""
    return name == inner or name.endswith("_" + inner) or inner.endswith("_" + name)


def _chain(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _none(frame: FrameType, at: int) -> list[str]:
    """The variables that are None among those that the instruction at `at` works on, and those of a check just before a `raise`."""
    values = frame.f_locals
    read = [n for n in _names(frame.f_code, at) if n in values]
    return [n for n in dict.fromkeys(read) if values[n] is None]


def _names(code: CodeType, at: int) -> Iterator[str]:
    instructions = list(dis.get_instructions(code))
    here = next((i for i in instructions if i.offset == at), None)
    if here is None or here.positions is None or here.positions.lineno is None:
        return
    first, last = here.positions.lineno, here.positions.end_lineno or here.positions.lineno
    if here.opname == "RAISE_VARARGS":
        first -= _CHECKED
    for i in instructions:
        if i.opname in ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE") and i.positions is not None and i.positions.lineno is not None:
            inside = first <= i.positions.lineno <= last
            columns = i.positions.col_offset, here.positions.col_offset, here.positions.end_col_offset
            if inside and first == last and None not in columns:
                at_column, start, stop = columns
                inside = start <= at_column <= stop  # type: ignore[operator]
            if inside:
                yield str(i.argval)
