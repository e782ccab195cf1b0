"""The notebooks run from top to bottom in a kernel, and show tables and pictures rather than noise."""

import os
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="notebooks need gradfn[notebooks]")
nbclient = pytest.importorskip("nbclient", reason="notebooks need gradfn[notebooks]")
pytest.importorskip("ipykernel", reason="notebooks need gradfn[notebooks]")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))

# A kernel of its own for each; zmq and asyncio warn of sockets and loops that nbclient leaves to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def executed(notebook, tmp_path, monkeypatch):
    """Return a notebook after its cells have run in a new kernel, which imports this copy of gradfn."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning:gradfn")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    return client.execute()


def on_the_site(page):
    """Return a notebook with its outputs on the site; None if it or gradfn changed since they were made."""
    import nbformat

    file = ROOT / "site" / "notebooks" / f"{page.stem}.ipynb"
    changed = max(
        path.stat().st_mtime for path in [page, *ROOT.glob("gradfn/**/*.py"), *ROOT.glob("experiments/*.py")]
    )
    if not file.exists() or file.stat().st_mtime < changed:
        return None
    notebook = nbformat.read(file, as_version=4)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in jupytext.read(page).cells]
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_notebook_runs_and_shows_tables(page, tmp_path, monkeypatch):
    notebook = on_the_site(page) or executed(jupytext.read(page), tmp_path, monkeypatch)
    found = outputs(notebook)
    noise = [output.text for output in found if output.output_type == "stream" and output.name == "stderr"]
    assert not noise
    tables = [output.data["text/html"] for output in found if "text/html" in output.get("data", {})]
    assert sum("<table" in table for table in tables) >= 4
    empty = [output for output in found if output.get("data", {}).get("text/plain") == ""]
    assert not empty
    # The text of a notebook that is opened again is not megabytes of output.
    assert sum(len(str(output)) for output in found) < 2_000_000


def cell(source, tmp_path, monkeypatch):
    """Return the outputs of one cell."""
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    return outputs(executed(notebook, tmp_path, monkeypatch))


FIT = """
import jax, optax, gradfn as gf
net = gf.mlp([4, 3, 2])
loss = gf.batch_mean(gf.regression_loss(net))
data = jax.random.normal(jax.random.key(0), [64, 4]), jax.random.normal(jax.random.key(1), [64, 2])
fitted = gf.fit(loss, net.init(jax.random.key(2)), data, optax.sgd(0.1), 400, eval_every=2)
"""


def test_the_progress_of_fit_is_one_line_in_a_notebook(tmp_path, monkeypatch):
    found = cell(FIT, tmp_path, monkeypatch)
    assert [output.output_type for output in found] == ["display_data"]
    (data,) = [output.data for output in found]
    assert data["text/plain"].startswith("step 400/400 loss ")
    assert "\n" not in data["text/plain"]
    assert len(str(data)) < 600
    # It ended, so nothing of a bar is left.
    assert "<progress" not in data["text/html"]


def test_the_progress_of_a_run_that_fails_shows_where_it_ended(tmp_path, monkeypatch):
    source = FIT.replace("optax.sgd(0.1)", "optax.sgd(1e30)")
    guarded = source.replace("fitted =", "try:\n    fitted =") + "except FloatingPointError:\n    pass\n"
    found = cell(guarded, tmp_path, monkeypatch)
    assert [output.output_type for output in found] == ["display_data"]
    assert "<progress" not in found[0].data["text/html"]


def test_a_line_of_a_notebook_is_named_by_its_cell(tmp_path, monkeypatch):
    source = """import jax, jax.numpy as jnp, gradfn as gf
def norm(x):
    return jnp.sqrt(jnp.sum(x**2))
print(gf.nan_origin(norm)(jnp.zeros(3)).nan.line, gf.backprop(norm)(jnp.ones(3))[0].line)
"""
    (found,) = cell(source, tmp_path, monkeypatch)
    assert found.text.split() == ["In[1]:3", "(norm)"] * 2
