"""Cases of a parametrized test that run with `--slow`, or in `make sweeps`, alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def few(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """`cases`, of which all but those in `quick` are marked slow: they are near alike, and a few show what a change has broken."""
    return _marked(cases, quick, pytest.mark.slow)


def swept(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """`cases`, of which all but those in `quick` run in `make sweeps`."""
    return _marked(cases, quick, pytest.mark.sweep)


def thinned(cases: Iterable[Any], often: Iterable[Any], *quick: Any) -> list[Any]:
    """`cases`, of which those in `often` run in `make sweeps`, and the rest but those in `quick` with `--slow` alone."""
    found, more = list(cases), [case for case in often if case not in quick]
    assert all(case in found for case in (*more, *quick)), (more, quick)
    return [*swept([*more, *quick], *quick), *few([case for case in found if case not in more and case not in quick])]


def halved(cases: Iterable[Any]) -> list[Any]:
    """The values of one argument, of which every second runs in `make sweeps`."""
    return [pytest.param(case, marks=pytest.mark.sweep) if at % 2 else case for at, case in enumerate(cases)]


def in_turns(cases: Iterable[Any], numbers: Sequence[Any]) -> list[Any]:
    """(case, number) for every number, of which each case has one in turn; the others run in `make sweeps`."""
    return [
        (case, number) if turn == at % len(numbers) else pytest.param(case, number, marks=pytest.mark.sweep)
        for at, case in enumerate(cases)
        for turn, number in enumerate(numbers)
    ]


def _marked(cases: Iterable[Any], quick: tuple[Any, ...], mark: pytest.MarkDecorator) -> list[Any]:
    found = list(cases)
    assert all(case in found for case in quick), quick
    return [case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark) for case in found]
