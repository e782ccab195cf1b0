"""The GPT in the page of a run: milliseconds of its forward and backward pass in Chromium, and the size of the page.

    python -m benchmarks.page [--run FOLDER]    # the folder of a run of `gradfn run gpt`; by default an untrained GPT

Chromium runs without a window, on one core. A pass is over 64 tokens; the aim is 200 ms for both passes with the
gradients of all parameters.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gradfn as gf
from benchmarks import harness
from gradfn.core.params import named_leaves
from gradfn.pages.page import page
from gradfn.runs.kept import Kept, read_run
from gradfn.runs.language_net import Architecture, LanguageNet

TOKENS, AIM = 64, 200  # milliseconds
NAMES = ("forward", "forward and backward", "forward and backward, parameters too")
SCRIPT = """
async (rounds) => {
  const names = ["model", "forward", "backward", "loss"];
  const g = Object.assign({}, ...(await Promise.all(names.map((name) => import(`gradfn/gpt/${name}.js`)))));
  const { model } = window.gradfnAll.find((part) => part.model?.config?.n_layers);
  const tokens = Int32Array.from({ length: inputs.tokens }, (_, t) => (7 * t) % model.config.vocab);
  const targets = g.targets({ quiet: null }, tokens), weights = new Float32Array(tokens.length).fill(1);
  const runs = [
    () => g.forward(model, tokens),
    () => g.backward(model, g.forward(model, tokens), targets, weights),
    () => g.backward(model, g.forward(model, tokens), targets, weights, { params: true }),
  ];
  return runs.map((run) => Array.from({ length: rounds }, () => {
    const start = performance.now();
    run();
    return performance.now() - start;
  }).slice(3)); // the first ones are compiled while they run
}
"""


def untrained(folder: Path) -> Kept:
    """Return a run of the default GPT of `gradfn run gpt` as it starts: 4 blocks, 128 features, 64 tokens."""
    config = gf.GPTConfig(
        vocab=100, context=TOKENS, n_layers=4, n_heads=4, width=128, positions="rope", bias=False
    )
    params = gf.gpt(config).init(jax.random.key(0))
    derived = {"n_kv_heads": config.n_heads, "head_size": 32, "hidden": 512}
    architecture = Architecture(**{name: getattr(config, name) for name in Architecture._fields} | derived)
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
    net = LanguageNet(architecture, None, False, None, [], arrays, 0, {})
    return Kept(folder, "gpt", {}, {}, None, {}, {}, None, language_net=net)


def times(html: str, rounds: int) -> list[list[float]]:
    """Return the milliseconds of each run of each pass, in a page in Chromium.

    Raises:
        ImportError: playwright is not installed, or Chromium is not on the PATH.
    """
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        raise ImportError("Chromium", name="chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "page.html"
        file.write_text(html, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        found = browser.new_page()
        found.goto(file.as_uri())
        found.wait_for_function("window.ready")
        script = SCRIPT.replace("inputs.tokens", str(TOKENS))
        measured: list[list[float]] = found.evaluate(script, rounds)
        browser.close()
        return measured


def main(arguments: list[str] | None = None) -> None:
    parser = harness.arguments(__doc__ and __doc__.partition("\n")[0], rounds=40)
    parser.add_argument("--run", type=Path, help="the folder of a run of a GPT")
    options: argparse.Namespace = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = read_run(options.run) if options.run else untrained(Path(folder))
        html = page([run])
    title = f"GPT of {'the run ' + str(options.run) if options.run else '4 blocks, 128 features'}, {TOKENS} tokens"
    figures: dict[str, dict[str, Any]] = {"page": {"MB": len(html.encode()) / 1e6}}
    skipped = {}
    try:
        measured = dict(zip(NAMES, times(html, options.rounds + 3), strict=True))
    except ImportError as error:
        measured, skipped = {}, dict.fromkeys(NAMES, f"{error.name} is not installed")
    for name, each in measured.items():
        low, middle, high = harness.quartiles(each)
        figures[name] = {
            "fastest, ms": min(each),
            "median, ms": middle,
            "lower quartile, ms": low,
            "upper quartile, ms": high,
        }
    harness.report_figures(title, figures, skipped=skipped, json_file=options.json)
    if measured:
        both = statistics.median(measured[NAMES[-1]])
        load = os.getloadavg()[0]
        print(
            f"both passes: {both:.0f} ms, aim {harness.verdict(both, AIM)}; {harness.cpus()}, load {load:.1f}"
        )


if __name__ == "__main__":
    main()
