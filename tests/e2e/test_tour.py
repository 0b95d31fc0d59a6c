"""The notebook runs from start to end."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.commands import ROOT


@pytest.mark.slow
def test_every_cell_of_the_tour_runs() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install '.[photos]'")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "docs")}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    texts = [
        out.text for cell in notebook.cells for out in cell.get("outputs", []) if "text" in out
    ]
    assert any(text.startswith("MaxBoxAcc ") for text in texts)
