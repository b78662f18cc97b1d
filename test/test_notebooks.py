"""The notebooks run from top to bottom at `runlocal` size, where their own asserts hold, and are kept with results.

About 25 s of one core for each.
"""

import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "documentation" / "notebooks").glob("*.ipynb"))
FULL, RUNLOCAL = "runlocal = False", "runlocal = True"
MAX_BYTES = 600_000
MACHINE_PATH = re.compile(r"(?<![\w.~])/(home|root|tmp|work|usr|opt|var|mnt|Users)/|[A-Z]:\\\\")
NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")
# Small programs that run once: compiling them without optimisation takes a third of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"mean_flow_on_a_toy", "mdct_and_codec", "the_codec"}


@each_notebook
def test_runs_from_top_to_bottom_and_shows_what_is_kept(path, tmp_path, monkeypatch):
    """Any cell that raises fails, the asserts at the end among them; but for its numbers, every output is as kept."""
    kept = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    code = _code(notebook)
    assert code[0].source.startswith(FULL)
    assert "assert" in code[-1].source
    code[0].source = code[0].source.replace(FULL, RUNLOCAL, 1)

    # The kernel is another process: it needs the package, and must not write to the user's folders.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for made_cell, kept_cell in zip(code, _code(kept), strict=True):
        assert _shown(made_cell) == _shown(kept_cell), f"cell {kept_cell.id}: execute the notebook again and keep it"


@each_notebook
def test_is_kept_with_its_results(path):
    """As a reader finds it: run once in order, with outputs, small, and nothing of the machine that made it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in _code(notebook)] == list(range(1, len(_code(notebook)) + 1))
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 5
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < MAX_BYTES
    texts = [cell.source for cell in notebook.cells] + [text for output in outputs for text in _texts(output)]
    assert not [text for text in texts if MACHINE_PATH.search(text)]


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _texts(output):
    return [output.get("text", ""), *(output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/markdown"))]


def _shown(cell):
    """Return what a cell shows: printed text without its numbers, labels, and the kinds of all else."""
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    displayed = [(sorted(output.data), _texts(output)) for output in cell.outputs if "data" in output]
    return " ".join(NUMBER.sub("#", printed).split()), displayed
