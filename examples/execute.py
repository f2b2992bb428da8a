"""Runs the notebooks and writes down what they print and draw: `python -m examples.execute`.

Kernels are processes of this Python, and what they leave behind is in a temporary folder.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

HERE = Path(__file__).parent
NOTEBOOKS = ("minarc_local.ipynb", "minarc_remote.ipynb")
_SECONDS = 300  # for one cell


def executed(path: Path, further: Sequence[str] = ()) -> NotebookNode:
    """The notebook with the outputs of its cells, run from the first to the last.

    Args:
        further: code that is run after them, in cells of its own.

    Raises:
        CellExecutionError: a cell failed; the message has the cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in further]
    with tempfile.TemporaryDirectory() as folder:
        kernel = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}  # files in place of ports
        options = {"timeout": _SECONDS, "record_timing": False, "coalesce_streams": True}
        client = NotebookClient(notebook, config=Config(AsyncKernelManager=kernel), **options)
        own = dict.fromkeys(("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"), folder)
        client.execute(cwd=str(HERE), env=os.environ | own)
    return notebook


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Leave what a reader wants to see: no progress bars, no times, no state of widgets."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _bar(output)]
    return notebook


def _bar(output: NotebookNode) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def main() -> None:
    """Run every notebook, and write it with its outputs."""
    for name in NOTEBOOKS:
        nbformat.write(tidy(executed(HERE / name)), HERE / name)
        print(HERE / name, file=sys.stderr)


if __name__ == "__main__":
    main()
