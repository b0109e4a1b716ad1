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


def in_turns(cases: Iterable[Any], numbers: Sequence[Any]) -> list[Any]:
    """(case, number) for every number, of which each case has one in turn; the others run in `make sweeps`."""
    every = [(case, number) for case in cases for number in numbers]
    return swept(every, *(pair for at, pair in enumerate(every) if at % len(numbers) == at // len(numbers) % len(numbers)))


def _marked(cases: Iterable[Any], quick: tuple[Any, ...], mark: pytest.MarkDecorator) -> list[Any]:
    found = list(cases)
    assert all(case in found for case in quick), quick
    return [case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark) for case in found]
