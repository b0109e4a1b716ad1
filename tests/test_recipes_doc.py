"""docs/recipes.md is true: its files are saved, its commands run, and they print what is written there.

A `python` or `yaml` block that begins with `# name.ext` is saved under that name; each line of a `console` block that begins with `$ ` is
run, and what follows it is its output, stdout before stderr, where `...` stands for anything. A command that prints `error: ` ends with
exit code 1.
"""

from __future__ import annotations

import doctest
import re
import shlex
import sys
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

import autotp
from autotp.cli import commands

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
CHECKER = doctest.OutputChecker()


def save(example: Example) -> None:
    text = str(example.parsed)
    name = re.match(r"# (\w+\.\w+)\n", text)
    if name is not None:
        (Path(example.namespace["folder"]) / name[1]).write_text(text)
        example.namespace["saved"] += 1


@pytest.mark.programs
@pytest.mark.timeout(400)
def test_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")

    def run(example: Example) -> None:
        for command in re.split(r"^\$ ", str(example.parsed), flags=re.MULTILINE)[1:]:
            line, _, wanted = command.partition("\n")
            program, *words = shlex.split(line)
            assert program == "autotp"
            code = commands.run(words)
            captured = capsys.readouterr()
            got = captured.out + captured.err
            assert code == ("error: " in wanted), f"{line}\n{got}"
            assert CHECKER.check_output(wanted, got, doctest.ELLIPSIS), f"{line}\nwanted:\n{wanted}\ngot:\n{got}"
            example.namespace["ran"] += 1

    document = Document.parse(str(PAGE), CodeBlockParser("python", save), CodeBlockParser("yaml", save), CodeBlockParser("console", run))
    document.namespace.update(folder=tmp_path, saved=0, ran=0)
    for example in document.examples():
        example.evaluate()
    assert (document.namespace["saved"], document.namespace["ran"]) == (4, 7)
    sys.modules.pop("kestrel", None)


def test_names_of_the_page_are_there():
    """Methods and keys that the page speaks of."""
    text = PAGE.read_text(encoding="utf-8")
    for name in ("from_plan", "to_plan", "from_tp_plan", "from_parallelize_module", "load", "dump", "merge"):
        assert name in text
        assert hasattr(autotp.Recipe, name)
    for name in ("to_tp_plan", "to_parallelize_module"):
        assert name in text
        assert hasattr(autotp.Plan, name)
