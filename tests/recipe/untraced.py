"""The public API as it is for a model that cannot be traced: the recipe's roles alone make the plan."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from torch import nn

from autotp.errors import TraceError
from tests.support.equivalence import Subject, autotp_subject


def _refuse(*_: Any, **__: Any) -> Any:
    raise TraceError("tracing is switched off")


def parallelize(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """`autotp.parallelize` where every trace fails."""
    with patch("autotp.planning.checked_plan", _refuse):
        return autotp_subject().parallelize(model, mesh, **options)


def untraced_subject() -> Subject:
    """For `tests.support.equivalence.check`."""
    real = autotp_subject()
    return Subject(parallelize, real.full_state_dict, real.full_grads)
