"""Runs a page of the docs: its programs are saved, its commands run, and they print what is written there.

A `python` block that begins with `# name.py` is saved under that name, and other ones must be Python. A `console` block is one
command and its output, where `...` stands for anything.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "80", "PYTEST_ADDOPTS": ""}


@dataclass
class Ran:
    """How many programs of a page were saved, and how many commands ran."""

    saved: int = 0
    commands: int = 0


def command(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of this environment, with the autotp of this checkout, on CPUs."""
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [BIN / words[0], *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def run_page(page: Path, folder: Path) -> Ran:
    """Runs all blocks of `page` in `folder`."""
    ran = Ran()

    def save(example: Example) -> None:
        text = str(example.parsed)
        name = re.match(r"# (\w+\.py)\n", text)
        if name is None:
            compile(text.replace("…", "..."), page.name, "exec")
            return
        (folder / name[1]).write_text(text)
        ran.saved += 1

    def run(example: Example) -> None:
        line, _, wanted = str(example.parsed).partition("\n")
        words = shlex.split(line.removeprefix("$ "))
        if words[0] == "pytest":
            words = ["python", "-m", "pytest", "-p", "no:cacheprovider", *words[1:]]
        done = command(words, folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        alike = doctest.OutputChecker().check_output(wanted, done.stdout, doctest.ELLIPSIS)
        assert alike, f"{line}\nwanted:\n{wanted}\ngot:\n{done.stdout}"
        ran.commands += 1

    for example in Document.parse(str(page), CodeBlockParser("python", save), CodeBlockParser("console", run)).examples():
        example.evaluate()
    return ran
