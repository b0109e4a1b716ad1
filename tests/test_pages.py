"""Pages with programs are true: the programs run and print what is written there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pages import ROOT, Ran, run_page

#: page → the library that it is about, its programs, and its commands
PAGES = {
    "adapters.md": ("peft", Ran(1, 1)),
    "experts.md": ("transformers", Ran(1, 1)),
    "advise.md": ("transformers", Ran(2, 3)),
    "loss_parallel.md": ("transformers", Ran(1, 1)),
    "quantization.md": ("torchao", Ran(1, 1)),
    "report.md": ("transformers", Ran(1, 2)),
    "sequence_parallel.md": ("transformers", Ran(1, 1)),
    "serving.md": ("transformers", Ran(2, 2)),
}


@pytest.mark.programs
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path) -> None:
    library, wanted = PAGES[page]
    pytest.importorskip(library, reason=f"{page} is about {library}")
    assert run_page(ROOT / "docs" / page, tmp_path) == wanted
