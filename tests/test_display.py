"""Tables fit where they are printed, fold when they are long, and show themselves everywhere."""

import builtins
import io
import re

import jax
import jax.numpy as jnp
import pytest

import gradfn as gf
from gradfn.display import ROWS, ShowsTable, TextTable

WIDTHS = (60, 80, 120, 200)


def wide_table() -> TextTable:
    out = TextTable("A title", "A caption.")
    out.add_column("site", shorten=True)
    out.add_column("shape", drop=2)
    out.add_column("rms")
    out.add_column("share", ".1%", drop=1)
    out.add_column("line", drop=3, shorten=True)
    for i in range(40):
        name = f"blocks/{i}/attention/probabilities:softmax"
        out.add_row(
            name, (64, 32), 1.23456e-5 * (i + 1), 0.5, f"models/transformer.py:{i} (attention)", weight=i
        )
    return out


class Result(ShowsTable):
    def table(self, rows: int | None = ROWS) -> TextTable:
        return wide_table().folded(rows, "result.table(rows=None)")


def assert_fits(text: str, width: int) -> None:
    assert max(map(len, text.splitlines())) <= width, text


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_fit_the_terminal_and_keep_their_numbers_whole(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(wide_table())
    assert_fits(text, width)
    for i in range(40):
        assert f"{1.23456e-5 * (i + 1):.3g}" in text
    dropped = {60: ["line"], 80: [], 120: [], 200: []}[width]
    for header in ("site", "shape", "rms", "share", "line"):
        assert (header in text.splitlines()[1].split()) == (header not in dropped)
    assert ("not shown in 60 columns: line" in text) == (width == 60)
    assert ("blocks/7/attention/probabilities:softmax" in text) == (width >= 120)


def test_names_are_shortened_in_the_middle_and_columns_dropped_in_their_order(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    lines = str(wide_table()).splitlines()
    assert lines[1].split() == ["site", "rms"]
    assert lines[3] == "  blocks/…softmax   1.23e-05"
    assert " ".join(lines[-2:]) == "not shown in 30 columns: shape, share, line"


def test_a_table_that_cannot_fit_is_not_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    out = TextTable()
    out.add_column("a number")
    out.add_column("another")
    out.add_row(1234567, 7654321)
    assert "1,234,567   7,654,321" in str(out)


def test_long_tables_keep_the_heaviest_rows_and_say_how_to_see_the_rest():
    text = str(Result())
    assert len(re.findall("softmax", text)) == ROWS
    assert "blocks/9/" not in text
    assert "10 of 40 rows are not shown: result.table(rows=None) lists them" in text
    assert len(re.findall("softmax", str(Result().table(rows=None)))) == 40


def test_every_column_and_row_reaches_pandas_unrounded():
    frame = Result().to_dataframe()
    assert list(frame.columns) == ["site", "shape", "rms", "share", "line"]
    assert len(frame) == 40
    assert frame["rms"][6] == 1.23456e-5 * 7


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pandas"):
        Result().to_dataframe()


def test_notebooks_show_every_column_as_html():
    shown = Result()._repr_mimebundle_()
    assert shown["text/plain"] == str(Result())
    assert shown["text/html"].count("<tr>") == ROWS + 1
    assert "<th>line</th>" in shown["text/html"]
    escaped = TextTable("<b>")
    escaped.add_column("a<b")
    escaped.add_row("[red]x & y")
    assert "<td>[red]x &amp; y</td>" in escaped.to_html()
    assert "<b>" not in escaped.to_html()
    assert "[red]x & y" in str(escaped)


def test_rich_prints_results():
    from rich.console import Console

    console = Console(width=60, record=True, file=io.StringIO())
    console.print(Result())
    assert_fits(console.export_text(), 60)


PARAMS = {"W": jnp.ones((3, 2)), "b": jnp.zeros(2)}
X = jnp.ones((4, 3))


def loss(params, x):
    return jnp.mean(jnp.tanh(params["W"].T @ x + params["b"]))


TRACED = {
    "Inspection": lambda params: gf.inspect(gf.batch_mean(loss))(params, X),
    "Backward": lambda params: gf.backprop(loss)(params, X[0]),
    "ExampleNorms": lambda params: gf.per_example.norms(loss)(params, X),
    "NoiseScale": lambda params: gf.per_example.noise_scale(loss)(params, X),
    "Eigs": lambda params: gf.curvature.hessian_eigs(loss, k=1)(params, X[0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_results_show_themselves_traced_and_untraced(name):
    texts = []

    def f(params):
        result = TRACED[name](params)
        texts.extend([str(result), repr(result), result._repr_mimebundle_()["text/plain"]])
        return result

    assert "shapes and dtypes only" in repr(jax.eval_shape(f, PARAMS))
    result = jax.jit(f)(PARAMS)
    assert set(texts) == {f"{name} (being traced: return it from jit to print it)"}
    assert_fits(str(result), 80)
    assert "<table>" in result._repr_mimebundle_()["text/html"]
    assert len(result.to_dataframe()) >= 1
    jax.vmap(f)(jax.tree.map(lambda a: a[None], PARAMS))
    assert "being traced" in texts[-1]
