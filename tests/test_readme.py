"""README.md is true: its program runs and prints what is written there, and so do the commands.

A Python block is saved as `hello.py`; each `console` block is a command line and its output, where `...` stands for anything.
"""

from __future__ import annotations

import doctest
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

README = Path(__file__).parent.parent / "README.md"
BIN = Path(sys.executable).parent
CHECKER = doctest.OutputChecker()


def save(example: Example) -> None:
    text = str(example.parsed)
    if "import autotp" in text:
        (Path(example.namespace["folder"]) / "hello.py").write_text(text)


def run(example: Example) -> None:
    command, _, wanted = str(example.parsed).partition("\n")
    words = shlex.split(command.removeprefix("$ "))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
    done = subprocess.run(
        [BIN / words[0], *words[1:]],
        cwd=example.namespace["folder"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert CHECKER.check_output(wanted, done.stdout, doctest.ELLIPSIS), f"{command}\nwanted:\n{wanted}\ngot:\n{done.stdout}"


@pytest.mark.programs
@pytest.mark.timeout(400)
def test_readme(tmp_path):
    document = Document.parse(str(README), CodeBlockParser("python", save), CodeBlockParser("console", run))
    document.namespace["folder"] = tmp_path
    examples = list(document.examples())
    assert len(examples) >= 4
    for example in examples:
        example.evaluate()
