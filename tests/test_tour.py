"""examples/tour.ipynb runs from top to bottom, and its outputs are what its text promises."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.html import Page

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a notebook in a kernel of its own, in an empty folder; returns the outputs of each cell with code."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient runs notebooks")
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks")
    pytest.importorskip("ipykernel", reason="notebooks run in a kernel of IPython")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))  # a process of its own
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")

    def execute(edit: tuple[str, str] = ("", "")) -> list[Any]:
        notebook = nbformat.reads(TOUR.read_text(encoding="utf-8").replace(*edit) if edit[0] else TOUR.read_text(), as_version=4)
        nbformat.validate(notebook)
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
        return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]

    return execute


@pytest.mark.programs
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # of the machinery of notebooks
def test_the_tour(run: Any, tmp_path: Path) -> None:
    planned, explained, reported, proven, broken = run()
    assert set(planned[-1].data) == {"text/html", "text/plain"}
    assert Page(planned[-1].data["text/html"]).open == []
    assert "LlamaForCausalLM over tp=2" in planned[-1].data["text/html"]
    assert explained[0].text.startswith("2 are alike but for numbers: model.layers.*.self_attn.o_proj")
    assert reported[0].text.startswith("report.html: ")
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).open == []
    assert set(proven[-1].data) == {"text/plain"}
    assert "differs from the model on one device" in broken[-1].data["text/plain"]


@pytest.mark.programs
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_tour_that_is_wrong_fails(run: Any) -> None:
    """A control."""
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="no parameter or module"):
        run(("self_attn.o_proj", "self_attn.o_prj"))


def test_the_tour_is_kept_without_outputs() -> None:
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
