"""Labels that are found from those of fewer cuts are those of a pass over the whole graph."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

import autotp
from autotp.planner import labelling
from autotp.planner.placements import Labels
from tests.support.families import transformer


def facts(labels: Labels) -> dict[str, Any]:
    found = {f.name: getattr(labels, f.name) for f in fields(labels) if f.name not in ("once", "passes")}
    ordered = {name: list(found[name].items()) for name in ("slices", "distributed", "gathered")}  # later stages go over these
    return {**found, **ordered}


def differing(name: str, monkeypatch: pytest.MonkeyPatch, *, spoilt: bool = False) -> list[str]:
    """What differs in labels that are found from others, over all those that planning finds so. `spoilt`: new cuts are taken for old."""
    usual = labelling._pass
    found, differ = 0, list[str]()

    def both(*rest: Any) -> Labels:
        nonlocal found
        *before, start, _ = rest
        if start is None:
            return usual(*rest)
        found += 1
        out = usual(*before, replace(start, labels=replace(start.labels, cuts=before[1])) if spoilt else start, False)
        wanted = usual(*before, None, False)
        differ.extend(key for key, value in facts(wanted).items() if facts(out)[key] != value)
        return usual(*rest)

    monkeypatch.setattr(labelling, "_pass", both)
    autotp.plan(transformer(name), tp=2, check="graph")
    assert found > 5
    return differ


#: Biases that are added once and a head that is gathered; experts.
@pytest.mark.parametrize("name", ["bart", "mixtral"])
def test_labels_from_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not differing(name, monkeypatch)


def test_the_comparison_sees_a_cut_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert differing("mixtral", monkeypatch, spoilt=True)
