"""Build the gallery: train the examples with their default options, and write the page of each and an index.

    python docs/gallery/build.py [--names FILE] [EXAMPLE ...]

Runs that have finished are kept in `docs/gallery/runs` and are not repeated; remove a folder to train again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

from gradfn.pages.page import ASSETS, verdict
from gradfn.runs.folder import read_versions
from gradfn.runs.outcome import read_result

HERE = Path(__file__).parent
SHOWN = ("gradfn", "jax", "numpy", "python", "machine")  # of a run's versions


class Example(NamedTuple):
    """A live page of the gallery.

    Attributes:
        title: of its entry.
        text: what there is to do in it.
        words: what follows `gradfn run`.
        seconds: about how long that takes on two cores.
    """

    title: str
    text: str
    words: tuple[str, ...]
    seconds: int


NAMES_OPTIONS = "--lines --batch 64 --width 96 --dropout 0.1 --rate 0.003 --steps 6000"
EXAMPLES = {
    "digits": Example(
        "A digit network",
        "Draw a digit, open one of the 16 nodes, and step the gradient back to the pixels.",
        ("digits",),
        15,
    ),
    "moons": Example(
        "A network to train",
        "Choose depth, rate and activation, watch the boundary form, and break it.",
        ("moons",),
        10,
    ),
    "gpt": Example(
        "A GPT that writes help texts",
        "Type, let it continue, see which tokens its heads attend to, and switch one of them off.",
        ("gpt",),
        100,
    ),
    "names": Example(
        "A GPT that invents names",
        "Follow a name letter by letter, and see which letters the next one depends on.",
        ("gpt", "--data", "names.txt", *NAMES_OPTIONS.split()),
        220,
    ),
    "induction": Example(
        "Two heads that copy",
        "Find the head that attends to the previous token, switch it off, and see copying fail.",
        ("induction",),
        60,
    ),
}


def main(words: list[str] | None = None) -> int:
    """Build the pages of the examples on the command line, by default of all; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help=", ".join(EXAMPLES))
    parser.add_argument(
        "--names", help="names.txt, one name per line; without it the page of names is left out"
    )
    parser.add_argument("--out", default=HERE, type=Path, help="the folder to write to")
    given = parser.parse_args(words)
    if unknown := [name for name in given.examples if name not in EXAMPLES]:
        parser.error(f"no example {unknown[0]!r}; there are {', '.join(EXAMPLES)}")
    return build({name: EXAMPLES[name] for name in given.examples or EXAMPLES}, given.out, given.names)


def build(examples: dict[str, Example], out: Path, names: str | None = None) -> int:
    """Train, write the pages and the index; return how many examples failed."""
    failed = 0
    seconds = sum(example.seconds for name, example in examples.items() if not _finished(out, name))
    print(f"{len(examples)} pages; the training takes about {seconds} s on two cores", flush=True)
    for name, example in examples.items():
        if "names.txt" in example.words and not names:
            print(f"{name}: left out, as it needs --names FILE")
            continue
        if not _finished(out, name):
            words = [
                str(Path(names).resolve()) if word == "names.txt" and names else word
                for word in example.words
            ]
            print(f"{name}: gradfn run {' '.join(example.words)}", flush=True)
            if _gradfn("run", *words, "--folder", str(_run(out, name))):
                failed += 1
                continue
        failed += bool(_gradfn("report", str(_run(out, name)), "--out", str(out / f"{name}.html")))
    (out / "index.html").write_text(index(out), encoding="utf-8")
    print(f"wrote {out / 'index.html'}: open it in a browser")
    return failed


def index(out: Path) -> str:
    """Return the page that lists the pages that were built, with the figures and versions they were made with."""
    entries = [
        _entry(out, name, example) for name, example in EXAMPLES.items() if (out / f"{name}.html").exists()
    ]
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Gallery · gradfn</title>
<style>{style}
header {{ padding-top: 2.75rem }}</style>
</head>
<body>
<header>
<h1>Networks that run in the page</h1>
<p class="lead">Each page is one file that works offline: the network that was trained, its gradients, and its run.</p>
</header>
<main>
{"".join(entries)}
</main>
</body>
</html>
"""


def _entry(out: Path, name: str, example: Example) -> str:
    folder, page = _run(out, name), out / f"{name}.html"
    reached = verdict(read_result(folder)).reached
    versions = dict(read_versions(folder))
    made = ", ".join(f"{key} {versions[key]}" for key in SHOWN if versions.get(key))
    day = time.strftime("%Y-%m-%d", time.gmtime(page.stat().st_mtime))
    size = f"{page.stat().st_size / 1e6:.1f} MB"
    return f"""<section>
<h2><a href="{name}.html">{escape(example.title)}</a></h2>
<p class="lead">{escape(example.text)}</p>
<p>{escape(reached)}</p>
<p><code>gradfn run {escape(" ".join(example.words))}</code></p>
<p class="note">{escape(made)}; {size}, {day}</p>
</section>
"""


def _run(out: Path, name: str) -> Path:
    return out / "runs" / name


def _finished(out: Path, name: str) -> bool:
    return (_run(out, name) / "result.json").exists()


def _gradfn(*words: str) -> int:
    return subprocess.call([sys.executable, "-m", "gradfn", *words])


if __name__ == "__main__":
    sys.exit(main())
