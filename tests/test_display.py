"""Tables fit where they are printed, fold when they are long, and show themselves everywhere."""

import builtins
import io
import re

import jax
import jax.numpy as jnp
import optax
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
    assert ">line</th>" in shown["text/html"]
    escaped = TextTable("<b>")
    escaped.add_column("a<b")
    escaped.add_row("[red]x & y")
    assert ">[red]x &amp; y</td>" in escaped.to_html()
    assert "<b>" not in escaped.to_html()
    assert "[red]x & y" in str(escaped)


def test_html_aligns_numbers_and_leaves_out_empty_columns():
    table = TextTable()
    for header in ("name", "size", "flags"):
        table.add_column(header)
    table.add_row("W1", 12, None)
    table.add_row("b1", None, "")
    shown = table.to_html()
    assert '<td style="text-align:left;white-space:nowrap">W1</td>' in shown
    assert '<td align="right" style="white-space:nowrap">12</td>' in shown
    assert '<th align="right">size</th>' in shown
    assert "flags" not in shown


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


def curve(w):
    return 1.5 * w[0] ** 2 - w[1] ** 2


def linear(w, x):
    return w @ x


AT = jnp.array([3.0, -1.0])
BATCH = jnp.array([[3.0, 4.0], [0.5, 0.0], [1.0, -1.0]])
HALVES = jnp.eye(2, dtype=bool)
# For each type, a function of parameters [2], and texts that its table shows.
SHOWN = {
    "Eigs": (gf.curvature.hessian_eigs(curve, k=2), ["3 ", "-2 ", "yes"]),
    "Sharpness": (
        gf.curvature.sharpness(curve, learning_rate=0.5),
        ["3   ", "4   ", "0.75", "within the limit"],
    ),
    "Estimate": (gf.curvature.hessian_trace(curve, samples=2), ["1   ", "0"]),
    "Spectrum": (
        gf.curvature.hessian_spectrum(curve, samples=2),
        ["2 eigenvalues", "-2 ", "3 ", "0.5 ", "1"],
    ),
    "Landscape": (
        lambda w: gf.curvature.loss_landscape(curve, dims=1, points=3)(w, directions=jnp.ones([1, 2])),
        ["losses", "[3]", "2 ", "24"],
    ),
    "IntegratedGradients": (
        lambda w: gf.attribution.integrated_gradients(linear)(w, jnp.array([1.0, 5.0])),
        ["-2 ", "0 ", "[2]", "-5 ", "3"],
    ),
    "Maximized": (
        lambda w: gf.attribution.maximize(linear, steps=64)(w, jnp.full(2, 0.5), key=jax.random.key(0)),
        ["64 steps", "1 ", "3 ", "[2]", "0 ", "1"],
    ),
    "Regions": (
        lambda w: gf.attribution.regions(lambda params, x: params["W"] @ x, HALVES, "W")({"W": w[None]}, AT),
        ["2 regions, 1 nodes", "sums", "[2, 1]", "1 ", "9", "total", "10"],
    ),
    "Cosines": (
        lambda w: gf.per_example.grad_cosines(linear)(w, BATCH),
        ["3 pairs", "-0.141", "0.707", "33.3%"],
    ),
    "ExampleNorms": (lambda w: gf.per_example.norms(linear)(w, BATCH), ["3 examples", "0.5", "5"]),
    "NoiseScale": (
        lambda w: gf.per_example.noise_scale(linear)(w, BATCH),
        ["tr Σ", "0.333", "8.75", "0.0381"],
    ),
    "NormTest": (lambda w: gf.per_example.norm_test(linear)(w, BATCH), ["NO", "0.947", "4"]),
    "ClippedGrads": (
        lambda w: gf.per_example.clipped_grads(linear, max_norm=1.0)(w, BATCH),
        ["3 clipped", "0.603", "66.7%", "0.5 to 5", "3.5"],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("Eigs", "Sharpness"))) for name in SHOWN]
)
def test_results_show_their_numbers_traced_batched_and_as_containers(name):
    f, expected = SHOWN[name]
    traced = []

    def g(w):
        result = f(w)
        traced.append(repr(result))
        return result

    result = jax.jit(g)(AT)
    assert traced == [f"{name} (being traced: return it from jit to print it)"]
    assert repr(result) == str(result) == result._repr_mimebundle_()["text/plain"]
    rest = str(result) + " "
    for text in expected:
        assert text in rest, f"{text!r} is not in the rest of\n{result}"
        rest = rest[rest.index(text) + len(text) :]
    assert len(result.to_dataframe()) >= 1
    # Results are containers of arrays: transformations and unpacking return their type and fields.
    doubled = jax.tree.map(lambda x: x + x, result)
    assert type(doubled) is type(result)
    if isinstance(result, tuple):
        assert all(a is b for a, b in zip(result, [getattr(result, n) for n in result._fields], strict=True))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), result)
    text = str(stacked)
    assert "[2" in text
    assert "array" in text or name == "Estimate"


def test_an_estimate_of_a_tree_has_one_row_per_parameter():
    estimate = gf.curvature.hessian_diagonal(lambda p: p["a"] ** 2 + jnp.sum(3 * p["b"] ** 2), samples=2)(
        {"a": jnp.ones([]), "b": jnp.ones(4)}
    )
    frame = estimate.to_dataframe()
    assert list(frame["path"]) == ["a", "b"]
    assert list(frame["mean"]) == [2, 6]
    assert list(frame["shape"]) == [(), (4,)]


def test_undefined_cosines_are_counted_and_left_out():
    frame = gf.per_example.cosines({"w": jnp.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])}).to_dataframe()
    assert list(frame["undefined"]) == [2, 2]
    assert list(frame["mean"]) == [-1, -1]
    assert "Cosines of 0 pairs" in str(gf.per_example.cosines({"w": jnp.ones([1, 2])}))


@pytest.mark.slow
def test_a_fit_shows_the_last_rows_of_its_history_and_no_parameters(tmp_path):
    data = (jnp.ones([8, 3]), jnp.ones([8, 1]))
    net = gf.mlp([3, 1])
    fitted = gf.fit(
        gf.batch_mean(gf.regression_loss(net)),
        net.init(jax.random.key(0)),
        data,
        optax.sgd(0.1),
        24,
        batch_size=8,
        eval_every=2,
        folder=tmp_path,
        progress=False,
    )
    text = repr(fitted)
    assert text.startswith("Fit: 24 steps, 4 parameters")
    assert "2 of 12 rows are not shown: fitted.table(rows=None) lists them" in text.replace("\n", " ")
    assert "Array" not in text
    frame = fitted.to_dataframe()
    assert list(frame["loss"]) == [row["loss"] for row in fitted.history]
    assert list(fitted.table().to_dataframe()["step"]) == list(range(6, 26, 2))
    params, state, history, inspections, noise = fitted
    assert (params, state, history, inspections, noise) == tuple(getattr(fitted, n) for n in fitted._fields)
    assert fitted._replace(params=None).params is None


def test_nan_reports_show_their_text_in_notebooks():
    def f(x):
        return jnp.sqrt(jnp.sum(x**2))

    report, record = gf.nan_origin(f)(jnp.zeros(3)), jax.jit(gf.nan_guard(f))(jnp.zeros(3))[-1]
    for result in (report, record):
        # Notebooks show the repr of what has no other display method.
        assert "0 × inf" in repr(result)
        assert repr(result) == str(result)
        assert not hasattr(result, "_repr_mimebundle_")
