"""No page has a serious fault that axe-core finds: every kind, light and dark, wide and narrow, with all of it open."""

import functools
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from axe_playwright_python.sync_playwright import Axe

import gradfn as gf
from gradfn.runs.kept import read_run
from tests.report.browser import needs_browser, opened

pytestmark = [pytest.mark.slow, needs_browser]

ASSETS = Path(gf.__file__).parent / "pages" / "assets"
SERIOUS = ("serious", "critical")


def digits(folder):
    from gradfn.experiments.digits import Config, run

    run(Config(hidden=4, epochs=2, batch=128, folder=str(folder)))


def moons(folder):
    from gradfn.experiments.moons import Config, run

    run(Config(steps=20, folder=str(folder)))


def gpt(folder):
    from gradfn.experiments.gpt import Config, run

    run(Config(steps=4, width=8, layers=2, context=16, folder=str(folder)))


def cnn(folder):
    from gradfn.experiments.cnn import Config, run

    run(Config(channels=(2, 3), hidden=4, epochs=1, batch=256, folder=str(folder)))


def mlp(folder):
    """A user's own network, which `gf.fit` alone has kept."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=[64, 3]).astype(np.float32)
    net = gf.mlp([3, 4, 1], activation="tanh")
    loss, start = gf.batch_mean(gf.regression_loss(net)), net.init(jax.random.key(0))
    gf.fit(loss, start, (x, x[:, :1]), optax.adam(0.1), 20, folder=folder, inspect_every=5, progress=False)


RUNS = {make.__name__: make for make in (digits, moons, gpt, cnn, mlp)}
PAGES = {name: (name,) for name in RUNS} | {"two": ("digits", "moons")}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return a function from the names of runs to what they have kept; each is made once."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        RUNS[name](folder)
        return read_run(folder)

    return lambda names: [made(name) for name in names]


# Everything that can be opened is open, the lessons at their first step; only one lesson is open at a time.
OPEN = """() => {
  for (const each of document.querySelectorAll("details")) each.open = true;
  for (const each of document.querySelectorAll(".lesson-open")) each.click();
  return [...document.querySelectorAll("section.live")].map((section) => section.dataset.kind);
}"""
# What every page has to have, with what breaks it: terms without a meaning, folded parts without content, ...
BROKEN = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const empty = (each) => {
    const text = each.innerText.replace(each.querySelector("summary").innerText, "").trim();
    return !text && !each.querySelector("input, select, textarea, canvas, svg, table");
  };
  const described = (each) => document.getElementById(each.getAttribute("aria-describedby"))?.textContent;
  const steps = (section) => section.querySelector(".lesson-open")?.innerText ?? "no lesson";
  const lessons = all("section.live").map((section) => [section.dataset.kind, steps(section)]);
  return {
    details: all("details").filter(empty).map((each) => each.outerHTML),
    terms: all("[data-term]").filter((each) => !described(each)).map((each) => each.outerHTML),
    lessons: lessons.filter(([, steps]) => !/^Lesson, (8|9|10|11|12) steps$/.test(steps)),
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
}"""
WHOLE = {"details": [], "terms": [], "lessons": [], "wider": 0}


def faults(page):
    """Return the serious faults: rule, what it says, and the elements."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']} ({each['impact']}): {each['help']}: {node['html'][:160]} {node['target']}"
        for each in found
        if each["impact"] in SERIOUS
        for node in each["nodes"][:3]
    ]


@pytest.mark.parametrize("name", PAGES)
def test_no_serious_fault_and_nothing_empty(tmp_path, kept, name):
    found = {}
    for width in (1280, 390):
        for dark in (False, True):
            with opened(tmp_path, kept(PAGES[name]), width=width, dark=dark, touch=width < 640) as page:
                page.evaluate(OPEN)
                assert page.evaluate(BROKEN) == WHOLE
                found[width, dark] = faults(page)
    assert found == {key: [] for key in found}


def test_every_kind_of_running_network_is_checked(tmp_path, kept):
    checked = set()
    for name in RUNS:
        with opened(tmp_path, kept((name,))) as page:
            checked |= set(page.evaluate(OPEN))
    assert checked == {file.parent.name for file in ASSETS.glob("*/page.js")}


def test_the_check_finds_faults(tmp_path):
    html = """<!doctype html><html lang="en"><title>t</title><main><h1>t</h1><button></button>
      <p style="color: #aaa; background: #fff">pale</p></main><script>window.ready = true</script></html>"""
    with opened(tmp_path, None, html=html) as page:
        assert {fault.split()[0] for fault in faults(page)} == {"button-name", "color-contrast"}
