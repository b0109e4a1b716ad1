"""What code may return or take in any number: the items of a list or tuple, the entries of a dict whose keys count (`tok0`, `tok1`).

A path of a tensor may hold a step for all of them: "*" for every item of a list, "tok*" for every key of a dict that differs from it in
its numbers alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

Step = str | int
Path = tuple[Step, ...]

#: In place of a length: the container is a dict, whose keys tell instead.
DICT = -1
_DIGITS = re.compile(r"\d+")


def step_of(key: object) -> Step:
    """Returns the step to what a dict has under a key: a text for keys of other kinds, as plans are written down."""
    return key if isinstance(key, str | int) else repr(key)


def each(step: Step) -> str:
    """Returns the step that stands for all items or entries like this one; a key without digits stands for itself."""
    return "*" if isinstance(step, int) else _DIGITS.sub("*", step)


def fits(step: Step, steps: Collection[Step]) -> bool:
    """True for a step that is one of `steps`, or that one of them stands for."""
    return step in steps or each(step) in steps


def is_at(path: Path, slot: Path) -> bool:
    """True for a path that is `slot`, or that `slot` stands for."""
    return len(path) == len(slot) and all(fits(step, (other,)) for step, other in zip(path, slot, strict=True))


def slot_of(path: Path, slots: Collection[Path]) -> Path | None:
    """Returns the one of `slots` that a path is at, or is one of several at."""
    return path if path in slots else next((slot for slot in slots if stands_for_several(slot) and is_at(path, slot)), None)


def stands_for_several(path: Path) -> bool:
    """True for a path with a step for several items."""
    return any(isinstance(step, str) and "*" in step for step in path)


@dataclass(frozen=True, slots=True)
class Items:
    """A container at a module's boundary, in the argument or, if `result`, the result at `path`, that holds values which are not all
    alike: a call may only have it as a traced one did.

    known: the lengths that it had, each with the steps at which there were tensors; `DICT` for a dict. unnamed: it always had fields with
    names, and tensors that are not whole were so deep in it, with so many dims. In a tuple nobody tells which of them is there.
    """

    result: bool
    path: Path
    known: tuple[tuple[int, tuple[Step, ...]], ...] = ()
    unnamed: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"{'result' if self.result else 'argument'} {'.'.join(map(str, self.path))}".strip()
