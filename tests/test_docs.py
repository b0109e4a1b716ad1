"""The pages are readable and point at what is there.

    prose     at most 100 columns; tables, code and lines that are one link may be longer
    links     a relative link leads to a file, its fragment to a heading there
    paths     `some/file.py` lies in the repository, in `autotp/` or beside the page
    names     `autotp.some.name` is a module, or an attribute of one

Each function gives the faults of one page, all of them, with their lines.
"""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COLUMNS = 100
FENCE = re.compile(r"\s*```")
ONE_LINK = re.compile(r"\s*(?:- )?\[[^\]]*\]\([^)]*\)\S?$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w./:*-])((?:[\w.-]+/)+[\w-]+\.py)\b")
FOLDER = re.compile(r"(?<![\w./:*-])((?:autotp|benchmarks|examples|tests|tools)/[\w./-]*\w)")
NAME = re.compile(r"(?<![\w./-])(autotp(?:\.[A-Za-z_]\w*)+)")
FILE_NAMES = frozenset(("autotp.json",))


def lines_of(page: Path) -> list[tuple[int, str, bool]]:
    """(number, text, is it code) of each line."""
    found, fenced = [], False
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(text) is not None
        found.append((number, text, fenced or fence or text.startswith("    ")))
        fenced ^= fence
    return found


def long_lines(page: Path) -> list[str]:
    return [
        f"{page.name}:{number}: {len(text)} columns"
        for number, text, code in lines_of(page)
        if len(text) > COLUMNS and not (code or text.lstrip().startswith("|") or ONE_LINK.match(text))
    ]


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings."""
    heads = [text.lstrip("#").strip() for _, text, code in lines_of(page) if text.startswith("#") and not code]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(page: Path) -> list[str]:
    found = []
    text = "\n".join("" if code else line for _, line, code in lines_of(page))
    for match in LINK.finditer(text):
        if re.match(r"\w+:", match[1]):
            continue
        path, _, fragment = match[1].partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            found.append(f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}: {match[1]}")
    return found


def missing_paths(page: Path) -> list[str]:
    bases = (ROOT, ROOT / "autotp", page.parent)
    return [
        f"{page.name}:{number}: {path}"
        for number, text, _ in lines_of(page)
        for path in sorted({*FILE.findall(text), *FOLDER.findall(text)})
        if not any((base / path).exists() for base in bases)
    ]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of its longest prefix that is one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        module = ".".join(parts[:n])
        try:
            there = find_spec(module) is not None
        except ModuleNotFoundError:  # its parent is no package
            continue
        if there and n == len(parts):
            return True
        if there:
            value = importlib.import_module(module)
            for part in parts[n:]:
                if not hasattr(value, part):
                    return False
                value = getattr(value, part)
            return True
    return False


def missing_names(page: Path) -> list[str]:
    return [
        f"{page.name}:{number}: {name}"
        for number, text, _ in lines_of(page)
        for name in NAME.findall(text)
        if name not in FILE_NAMES and not exists(name)
    ]


@pytest.mark.parametrize("check", [long_lines, dead_links, missing_paths, missing_names])
def test_pages(check):
    faults = [fault for page in PAGES for fault in check(page)]
    assert not faults, "\n".join(faults)


def test_every_decision_is_in_the_index():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for page in sorted(folder.glob("[0-9]*.md")):
        number = page.name[:4]
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {number}: ")
        assert re.search(r"^Date: \d{4}-\d\d-\d\d\. ", text, re.MULTILINE), page.name
        assert f"[{number}]({page.name})" in index


def test_faults_are_found(tmp_path):
    """A control: each check finds its faults, and lets the exceptions pass."""
    page = tmp_path / "page.md"
    page.write_text(
        "\n".join(
            (
                "# A page",
                "x " * 60,
                "| " + "x " * 60 + "|",
                "    " + "x " * 60,
                "```",
                "x " * 60 + "[no link](nowhere.md)",
                "```",
                "- [" + "x " * 60 + "](page.md)",
                "[gone](gone.md) [no heading](page.md#b-page) [here](page.md#a-page) [out](https://a.org/b)",
                "`plan/nothing.py`, `autotp/nothing`, `plan/layout.py`, `autotp/plan`, `tools/sweep.py`",
                "`autotp.nothing`, `autotp.plan.layout.Nothing`, `autotp.json`",
                "`autotp.plan.layout.Layout.shard`, `autotp.Recipe`",
            )
        ),
        encoding="utf-8",
    )
    assert long_lines(page) == ["page.md:2: 120 columns"]
    assert dead_links(page) == ["page.md:9: gone.md", "page.md:9: page.md#b-page"]
    assert missing_paths(page) == ["page.md:10: autotp/nothing", "page.md:10: plan/nothing.py"]
    assert missing_names(page) == ["page.md:11: autotp.nothing", "page.md:11: autotp.plan.layout.Nothing"]
