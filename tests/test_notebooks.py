"""Every notebook runs headless, top to bottom, in a fresh kernel; found by glob."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,  # a cell; loading vLLM takes 20 s on an idle machine
        startup_timeout=300,  # of the kernel
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
    )
    client.execute()
    nbformat.write(notebook, tmp_path / path.name)  # kept by pytest, to look at
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    shown = "".join(str(cell.outputs) for cell in code)
    assert "Traceback" not in shown
