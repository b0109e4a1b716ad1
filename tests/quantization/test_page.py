"""docs/quantization.md names configs that are there. Its program runs in tests/test_pages.py."""

from __future__ import annotations

import re

import pytest

from tests.support.pages import ROOT

PAGE = ROOT / "docs" / "quantization.md"


def test_every_config_on_the_page_is_there() -> None:
    ao = pytest.importorskip("torchao.quantization")
    names = set(re.findall(r"`(\w+Config)\b", PAGE.read_text(encoding="utf-8"))) - {"TorchAoConfig"}
    assert len(names) >= 7
    assert [name for name in sorted(names) if not hasattr(ao, name) and name != "FqnToConfig"] == []
