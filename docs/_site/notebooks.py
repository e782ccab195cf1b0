"""Notebooks as pages: the text of jupytext is executed, and what it shows becomes part of the page."""

from __future__ import annotations

import base64
import os
import re
import tempfile
from pathlib import Path

import jupytext
import nbconvert
import nbformat
from nbclient import NotebookClient


def pages(root: Path) -> dict[str, str | bytes]:
    """Execute every notebook of `docs/notebooks`; return its page, its pictures and itself by path on the site.

    Raises:
        CellExecutionError: a cell fails.
    """
    out: dict[str, str | bytes] = {}
    for file in sorted((root / "docs" / "notebooks").glob("*.py")):
        print(f"executing {file.relative_to(root)} ...", flush=True)
        out |= _page(file, root)
    return out


def _page(file: Path, root: Path) -> dict[str, str | bytes]:
    notebook = jupytext.read(file)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    # The kernel imports this copy of gradfn, whose warnings are errors.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "PYTHONWARNINGS": "error::UserWarning:gradfn"}
    # A notebook may write files where it runs.
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
        client.execute(env=os.environ | settings)
    text, resources = nbconvert.MarkdownExporter(exclude_input_prompt=True).from_notebook_node(
        notebook, resources={"output_files_dir": f"{file.stem}_files"}
    )
    made: dict[str, str | bytes] = {
        f"notebooks/{name}": content if isinstance(content, bytes) else base64.b64decode(content)
        for name, content in resources["outputs"].items()
    }
    made[f"notebooks/{file.stem}.ipynb"] = nbformat.writes(notebook).encode()
    source = f"../source/docs/notebooks/{file.name}.html"
    link = (
        f"[This notebook with its output]({file.stem}.ipynb), and [as text]({source}), which jupytext opens."
    )
    return {f"notebooks/{file.stem}.md": f"{_tidy(text)}\n\n{link}\n", **made}


def _tidy(text: str) -> str:
    """Remove terminal colors, and wrap HTML output in a box that scrolls."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return re.sub(
        r"(<table.*?</table>(?:<p>.*?</p>)*)", r'<div class="gf-output">\1</div>', text, flags=re.DOTALL
    )
