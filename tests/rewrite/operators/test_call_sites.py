"""Interventions and the recorder find a call at one place: the frames of `SiteMode`, which forwards it, do not count."""

from __future__ import annotations

from types import CodeType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from autotp.rewrite.collectives.comm import DryComm
from autotp.rewrite.operators.call_sites import SiteMode, SiteTable
from autotp.trace import call_sites
from autotp.trace.call_sites import PLUMBING, call_place

FORWARDS = SiteMode.__torch_function__.__code__


class Noting(TorchFunctionMode):
    """Takes down where calls are made, as the recorder does."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[CodeType] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.codes.append(call_place(2)[0])
        return func(*args, **(kwargs or {}))


def through_sites() -> CodeType:
    """The code that calls `torch.relu` in this function, as found behind a `SiteMode`."""
    noting = Noting()
    with noting, SiteMode(SiteTable((), DryComm(2), "here"), {}, {}):
        torch.relu(torch.ones(2))
    return noting.codes[-1]


def test_the_file_that_forwards_calls_is_named_where_places_are_told() -> None:
    assert FORWARDS.co_filename in PLUMBING


def test_a_forwarded_call_is_where_the_code_makes_it() -> None:
    assert through_sites() is through_sites.__code__


def test_without_its_name_the_place_would_be_in_the_forwarding_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_sites, "PLUMBING", PLUMBING - {FORWARDS.co_filename})
    assert through_sites() is FORWARDS
