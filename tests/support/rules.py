"""Operators with another rule, for a while."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotp.axes.analysis import Rule
from autotp.axes.operators.elementwise import pointwise
from autotp.axes.operators.table import OPERATORS, Operator


def give_rule(patch: pytest.MonkeyPatch, name: str, rule: Rule = pointwise) -> None:
    """Operator `name` has another rule; by default the one for operators on elements."""
    patch.setitem(OPERATORS, name, replace(OPERATORS[name], rule=rule) if name in OPERATORS else Operator(rule))
