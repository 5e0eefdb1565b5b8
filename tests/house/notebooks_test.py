"""Notebooks are kept without what running them leaves behind."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_keep_no_output(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])[:60]
            assert cell["outputs"] == [], f"{path.name}: output kept under {source!r}"
            assert cell["execution_count"] is None, f"{path.name}: count of {source!r}"
