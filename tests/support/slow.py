"""Cases of a parametrized test that run with `--slow` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """`cases`, of which all but those in `quick` are marked slow: they are near alike, and a few show what a change has broken."""
    found = list(cases)
    assert all(case in found for case in quick), quick
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in found
    ]
