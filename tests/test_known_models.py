"""The published sizes that `tools/known_models.py` plans, and the table that it prints."""

from __future__ import annotations

import json

import pytest

from autotp import targets
from tests.support.slow import halved
from tools.known_models import TOLERANCE, Cell, Row, config_of, configs, facts, main, row, survey, table

NAMES = list(configs())


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) >= 30


@pytest.mark.parametrize("name", halved(NAMES))
def test_a_config_has_the_published_number_of_parameters(name: str) -> None:
    entry = configs()[name]
    model = targets.build(config_of(entry), device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(entry["size"] * 1e9, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "heads", "layers"),
    [("Falcon-7B", "71/1 × 64", "32"), ("Falcon-40B", "128/8 × 64", "60"), ("T5-base", "12 × 64", "12 + 12"), ("Mamba-2.8B", "–", "64")],
)
def test_facts(name: str, heads: str, layers: str) -> None:
    found = facts(config_of(configs()[name]), 999_600_000)
    assert (found["heads"], found["layers"], found["parameters"]) == (heads, layers, "1.0 B")


@pytest.mark.sweep
def test_a_plan_over_each_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    survey("GPT-2", (2, 4))
    first, *cells = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["facts"]["vocabulary"] == "50257"
    assert [c["tp"] for c in cells] == [2, 4]
    assert cells[0]["share"] > cells[1]["share"] > 0.25
    assert all(c["work"] >= 1 and c["padding"] >= 0 for c in cells)


def test_what_takes_too_long_is_an_error_in_the_table() -> None:
    found = row("GPT-2", (2,), timeout=0.01)
    assert "no plan within the 0 s" in found.cells[2].error


def test_errors_are_cells() -> None:
    rows = [Row("a", {"heads": "9/3 × 64"}, {2: Cell(0.5, 0.066, 1.07), 4: Cell(error="TraceError: x | y\n" + "z" * 100)})]
    lines = table(rows, (2, 4)).splitlines()
    assert lines[2].startswith("| a | – | 9/3 × 64 | – | – | – | 0.500, 6.6 %, 1.07 × | error: TraceError: x / y zzz")
    assert lines[-1] == f"- a, tp 4: TraceError: x | y {'z' * 100}"


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "GPT-7"])
    assert "no such model" in capsys.readouterr().err
