"""Finds the largest size that fits, with few measurements."""

from __future__ import annotations

from collections.abc import Callable

#: Larger sizes are not looked for.
MOST = 65536
_TRIES = 8


class Curve:
    """Bytes by size, measured where needed.

    Between two measured sizes the line through them is taken: peaks are the largest of several sums that rise along lines, so the
    curve is convex, and no higher than that line.
    """

    def __init__(self, measure: Callable[[int], float]) -> None:
        self._measure = measure
        self._known: dict[int, float] = {}

    def at(self, n: int) -> float:
        """Bytes at size `n`, or a little more than they are."""
        below = max((k for k in self._known if k <= n), default=None)
        above = min((k for k in self._known if k >= n), default=None)
        if below is None or above is None:
            self._known[n] = self._measure(n)
            return self._known[n]
        if below == above:
            return self._known[n]
        share = (n - below) / (above - below)
        return self._known[below] + share * (self._known[above] - self._known[below])

    def guess(self, room: float) -> int:
        """Where the line through the two measured sizes nearest to the room meets it; `MOST` where it does not."""
        a, b = sorted(sorted(self._known, key=lambda n: abs(self._known[n] - room))[:2])
        slope = (self._known[b] - self._known[a]) / (b - a)
        return MOST if slope <= 0 else int(min(max(a + (room - self._known[a]) // slope, 0), MOST))


def largest(curve: Curve, room: float, start: int) -> int:
    """Returns the largest n from 1 to `MOST` with `curve.at(n) <= room`; 0 where 1 does not fit.

    The curve is nearly a line from `start` on, so the first guess is mostly right. Where the tries do not suffice, larger sizes than
    the result may fit, too.
    """
    fits, over = 0, MOST + 1
    tried = [start, min(2 * start, MOST)]
    for _ in range(_TRIES):
        n = tried.pop(0) if tried else min(max(curve.guess(room), fits + 1), over - 1)
        if curve.at(n) <= room:
            fits = max(fits, n)
        else:
            over = min(over, n)
        if over - fits <= 1 or (not tried and curve.guess(room) <= fits):
            break
    return fits
