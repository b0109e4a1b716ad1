"""Holds what a request has on one rank alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

Flag = Callable[[bool], bool]


def _itself(value: bool) -> bool:
    return value


@dataclass(frozen=True, slots=True)
class Side:
    """What a request has on this rank, beside arguments that are the same on all.

    leads: whether this is rank 0. flag: gives rank 0's truth value to all (a collective). ready: raises on every
    rank where one could not begin, and says why (a collective). streamer: rank 0's, None on the others.
    cancelled: asked on rank 0 before each token. listen: on the others, yields at each sign of life until rank 0 goes on.
    others_listen: on rank 0, a context in which the others do. hand_over: lets one more thread call the model.
    give_up: lets go of this rank's end of the wire. timeout: that of the server, in seconds.
    """

    leads: bool = True
    flag: Flag = _itself
    ready: Callable[[BaseException | None], None] = lambda _: None
    streamer: Any = None
    cancelled: Callable[[], bool] = bool
    listen: Callable[[], Iterator[None]] = lambda: iter(())
    others_listen: Callable[[], AbstractContextManager[None]] = nullcontext
    hand_over: Callable[[], None] = lambda: None
    give_up: Callable[[], None] = lambda: None
    timeout: float = 120.0
