"""docs/testing.md is true: its files are saved, its commands run, and they print what is written there.

A `python` block that begins with `# name.py` is saved under that name; a `console` block is one command and its output, where `...`
stands for anything.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

from autotp.testing import strategies

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "testing.md"
BIN = Path(sys.executable).parent
CHECKER = doctest.OutputChecker()


def save(example: Example) -> None:
    text = str(example.parsed)
    name = re.match(r"# (\w+\.py)\n", text)
    assert name is not None
    (Path(example.namespace["folder"]) / name[1]).write_text(text)
    example.namespace["saved"] += 1


def command(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        [BIN / words[0], *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def run(example: Example) -> None:
    line, _, wanted = str(example.parsed).partition("\n")
    words = shlex.split(line.removeprefix("$ "))
    if words[0] == "pytest":
        words = ["python", "-m", "pytest", "-p", "no:cacheprovider", *words[1:]]
    done = command(words, example.namespace["folder"])
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert CHECKER.check_output(wanted, done.stdout, doctest.ELLIPSIS), f"{line}\nwanted:\n{wanted}\ngot:\n{done.stdout}"
    example.namespace["ran"] += 1


@pytest.mark.programs
@pytest.mark.timeout(600)
def test_page(tmp_path: Path) -> None:
    document = Document.parse(str(PAGE), CodeBlockParser("python", save), CodeBlockParser("console", run))
    document.namespace.update(folder=tmp_path, saved=0, ran=0)
    for example in document.examples():
        example.evaluate()
    assert (document.namespace["saved"], document.namespace["ran"]) == (5, 6)


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
