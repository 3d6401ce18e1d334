"""The notebooks run from top to bottom, and are committed without what they put out."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_hold_no_outputs_and_name_a_plain_kernel(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in code_cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None, "".join(cell["source"])[:80]
    assert not any(cell["metadata"] for cell in notebook["cells"])
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_without_an_error_and_write_nothing_beside_themselves(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):  # one thread, no download
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this checkout, whatever else is installed
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()

    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in code_cells(notebook))
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "a notebook without a picture"
    assert not list(tmp_path.iterdir())
