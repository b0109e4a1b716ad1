"""docs/testing.md is true: its files are saved, its commands run, and they print what is written there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from autotp.testing import strategies
from tests.support.pages import ROOT, Ran, command, run_page

PAGE = ROOT / "docs" / "testing.md"


@pytest.mark.programs
@pytest.mark.timeout(600)
def test_page(tmp_path: Path) -> None:
    assert run_page(PAGE, tmp_path) == Ran(5, 6)


def test_every_strategy_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in strategies.__all__:
        assert name == "Geometry" or f"`{name}(" in text, name
    assert strategies.__doc__ is not None
    assert all(f"`{name}`" in strategies.__doc__ for name in strategies.__all__ if name != "Geometry")


@pytest.mark.programs
@pytest.mark.timeout(400)
def test_the_ci_example(tmp_path: Path) -> None:
    folder = ROOT / "examples" / "ci"
    workflow = yaml.safe_load((folder / ".github" / "workflows" / "tensor-parallel.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["equivalence"]["steps"]
    last = steps[-1]["run"].replace("${{ matrix.tp }}", "3")
    assert last == "pytest test_third_party.py --tp 3"
    (tmp_path / "test_third_party.py").write_text((folder / "test_third_party.py").read_text(encoding="utf-8"))
    done = command(["python", "-m", "pytest", "-q", *shlex.split(last)[1:]], tmp_path)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr
