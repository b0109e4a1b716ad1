"""autotp as it is for a model that cannot be traced: the recipe's roles alone make the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from autotp.errors import TraceError


def _refuse(*_: Any, **__: Any) -> Any:
    raise TraceError("tracing is switched off")


@contextmanager
def untraced() -> Iterator[None]:
    """Every trace fails; for `around` of `tests.support.pooled.equivalent`."""
    with patch("autotp.planning.checked_plan", _refuse):
        yield
