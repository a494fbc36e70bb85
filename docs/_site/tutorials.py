"""Run the tutorials from a clean kernel and write their pictures into them: `make tutorials`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def executed(path: Path, folder: str) -> nbformat.NotebookNode:
    """A notebook as it stands after a run from a clean kernel in a folder."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", record_timing=False)
    client.execute(cwd=folder)
    return notebook


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what libraries say about this machine, and what was printed in one cell in one piece."""
    for cell in notebook.cells:
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue
            if outputs and output.output_type == "stream" == outputs[-1].output_type:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(tidied(executed(Path(name), folder)), name)
