"""Each notebook runs from top to bottom, as a newcomer's Jupyter would run it."""

import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_SECONDS = 600  # Three minutes are meant; another test may share the machine.


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    # The first cell asks for virtual devices by itself, so the tests' are taken away.
    taken = ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION", "MPLBACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in taken}
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
