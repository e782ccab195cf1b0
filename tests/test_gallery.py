"""The gallery's command trains, writes pages and an index, and does not repeat what has finished."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "gallery" / "build.py"
spec = importlib.util.spec_from_file_location("gallery", FILE)
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)


@pytest.mark.slow
def test_pages_and_an_index(tmp_path, monkeypatch, capfd):
    words = ("moons", "--steps", "20", "--points", "40")
    moons = gallery.EXAMPLES["moons"]._replace(words=words, text="a < b")
    monkeypatch.setitem(gallery.EXAMPLES, "moons", moons)
    chosen = {name: gallery.EXAMPLES[name] for name in ("moons", "names")}
    assert gallery.build(chosen, tmp_path) == 0
    assert "names: left out, as it needs --names FILE" in capfd.readouterr().out
    page = (tmp_path / "moons.html").read_text(encoding="utf-8")
    assert 10_000 < len(page) < 5_000_000
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="(\w+\.html)"', index) == ["moons.html"]
    assert "a &lt; b" in index
    assert re.search(r"Test accuracy [\d.]+ %", index)
    assert re.search(r"jax \d+\.\d+", index)
    run = (tmp_path / "runs" / "moons" / "result.json").stat().st_mtime_ns
    assert gallery.build({"moons": moons}, tmp_path) == 0
    assert (tmp_path / "runs" / "moons" / "result.json").stat().st_mtime_ns == run


def test_a_failed_run_is_counted(tmp_path, capfd):
    broken = gallery.EXAMPLES["moons"]._replace(words=("moons", "--steps", "0"))
    assert gallery.build({"moons": broken}, tmp_path) == 1
    assert "steps" in capfd.readouterr().err


def test_an_unknown_example_is_an_error(capsys):
    with pytest.raises(SystemExit):
        gallery.main(["moon"])
    assert "no example 'moon'; there are digits, moons" in capsys.readouterr().err


def test_the_readme_lists_the_examples_and_their_commands():
    text = (FILE.parent / "README.md").read_text(encoding="utf-8")
    for name, example in gallery.EXAMPLES.items():
        assert f"| `{name}.html` |" in text
        assert f"`gradfn run {' '.join(example.words)}`" in text
