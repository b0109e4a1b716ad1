"""The largest size that fits is found for every convex curve, with few measurements."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autotp.advise.search import MOST, Curve, largest

LINES = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**7)), min_size=1, max_size=4)


@given(lines=LINES, room=st.integers(1, 10**11), start=st.integers(1, 300))
def test_what_is_found_fits_and_the_next_does_not(lines: list[tuple[int, int]], room: int, start: int) -> None:
    measured: list[int] = []

    def taken(n: int) -> float:
        measured.append(n)
        return max(base + n * slope for base, slope in lines)

    found = largest(Curve(taken), room, start)
    assert 0 <= found <= MOST
    assert found == 0 or taken(found) <= room
    assert found > 0 or taken(1) > room
    if len(lines) == 1 and 0 < found < MOST:  # along one line it is exact
        assert taken(found + 1) > room
    assert len(measured) <= 12


def test_sizes_between_two_measured_ones_are_not_measured() -> None:
    measured: list[int] = []

    def taken(n: int) -> float:
        measured.append(n)
        return 10.0 * n

    curve = Curve(taken)
    assert largest(curve, 1005, 1) == 100
    before = list(measured)
    assert largest(curve, 505, 1) == 50
    assert measured == before
