"""`gradfn report RUN`: one HTML file that shows a run, or two side by side, and needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradfn.files import replace_file
from gradfn.report.charts import Line, heat_map, line_chart, log_bounds
from gradfn.report.digit_net import DigitNet
from gradfn.report.kept import Kept, Part, Row, Shapes, read_run
from gradfn.run import BEGUN, RunError, begun
from gradfn.train.log import NOT_METRICS

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (  # each imports only from those before it
    *("mlp.js", "digit.js", "dom.js", "paint.js", "network.js"),
    *("pad.js", "layers.js", "node.js", "steps.js", "live.js", "curves.js", "main.js"),
)
LIMIT = 5_000_000  # bytes, of the whole page
NET_LIMIT = 2_500_000  # bytes of a network's parameters in it
DRAWN_LIVE = ("curves",)  # pictures whose content the page draws itself, where the run has kept it
GENERATOR = b'<meta name="generator" content="gradfn">'  # in every page: no other file is written over
HEAT_ROWS = 100  # more would be too many to read


class About(NamedTuple):
    """What an experiment says of itself.

    Attributes:
        what: its first line.
        expected: what to expect of it.
        options: for each option what it means, and its default.
    """

    what: str = ""
    expected: str = ""
    options: Mapping[str, tuple[str, Any]] = {}


class Verdict(NamedTuple):
    """What was reached, in the words of the run's result, against what was expected.

    Attributes:
        reached: the figure.
        expected: what was expected, "" where nothing was.
        state: "reached", "missed", "open" (nothing was promised) or "unfinished".
    """

    reached: str
    expected: str
    state: str


def write_report(
    runs: Sequence[str | Path], out: str | Path | None = None, about: Mapping[str, About] = {}
) -> Path:
    """Write the page of a run, or of two side by side.

    Args:
        runs: one or two of them: folders, or experiments' names for their latest runs.
        out: the file; by default `report.html` in the run's folder, or `against-<B>.html` in the first one's.
        about: what the experiments say of themselves, by name.

    Returns:
        The file.

    Raises:
        RunError: there is no such run, or a file of it cannot be read; or `out` cannot be written, or is an
            existing file that is not a page of gradfn.
    """
    kept = [read_run(run) for run in runs]
    if out is not None and Path(out).is_file() and GENERATOR not in Path(out).read_bytes()[:4096]:
        raise RunError(f"{out}: already exists and is not a page that gradfn wrote. Name another file")
    if out is None:
        name = "report.html" if len(kept) == 1 else f"against-{_name(kept[1])}.html"
        out = kept[0].folder / name
    file = Path(out)
    try:
        replace_file(file, page(kept, about).encode())
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror})") from error
    return file


def page(kept: Sequence[Kept], about: Mapping[str, About] = {}) -> str:
    """Return the page of one run, or of two that are compared, as HTML.

    Raises:
        ImportError: jinja2 is not there.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("reports need jinja2: pip install 'gradfn[run]'") from error

    net = kept[0].net if len(kept) == 1 else None
    too_large = net is not None and sum(array.nbytes for array in net.params.values()) > NET_LIMIT
    net = None if too_large else net
    template = _environment(jinja2).get_template("template.html")
    content = {
        "runs": [_told(run, about.get(run.experiment, About())) for run in kept],
        "title": " and ".join(dict.fromkeys(run.experiment or _name(run) for run in kept)),
        "charts": charts(kept),
        "flows": flows(kept),
        "options": differences([run.options for run in kept]),
        "meanings": {name: said for run in kept for name, (said, _) in _options_of(about, run).items()},
        "versions": differences([{k: v for k, v in run.versions.items() if k != BEGUN} for run in kept]),
        "shapes": _shared_shapes(kept),
        "net": None if net is None else _net(net),
        "live": None if net is None else _live(net),
        "too_large": too_large,
        "style": (ASSETS / "style.css").read_text(encoding="utf-8"),
        "script": script(),
    }
    room = LIMIT - len(template.render(**content, pictures=[]).encode()) - 10_000
    return template.render(**content, pictures=_pictures(kept, room))


def _environment(jinja2: Any) -> Any:
    """Return jinja's environment, in which `part.values` of a dict is its item and never its method."""

    class Environment(jinja2.Environment):
        def getattr(self, obj: Any, attribute: str) -> Any:
            if isinstance(obj, Mapping):
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            return super().getattr(obj, attribute)

    return Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def script() -> str:
    """Return the page's modules as one: their imports are of each other, so in this order they need none."""
    texts = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    plain = [re.sub(r"^export ", "", re.sub(r"^import .*\n", "", t, flags=re.M), flags=re.M) for t in texts]
    return "\n".join(f"// {name}\n{text}" for name, text in zip(SCRIPTS, plain, strict=True))


def verdict(result: Mapping[str, Any] | None) -> Verdict:
    """Take apart what an experiment's `judge` said.

    >>> verdict({"verdict": "test accuracy 96.4 %; expected at least 93 %: reached"})
    Verdict(reached='Test accuracy 96.4 %', expected='at least 93 %', state='reached')
    >>> verdict(None).state
    'unfinished'
    """
    if result is None:
        return Verdict("Not finished", "", "unfinished")
    said = str(result.get("verdict", "Finished"))
    found = re.fullmatch(r"(.*); expected (.*): (reached|NOT reached)", said, re.DOTALL)
    if found:
        return Verdict(_capital(found[1]), found[2], "reached" if found[3] == "reached" else "missed")
    found = re.fullmatch(r"(.*) \((nothing was promised.*)\)", said, re.DOTALL)
    return Verdict(_capital(found[1]), found[2], "open") if found else Verdict(_capital(said), "", "open")


def charts(kept: Sequence[Kept]) -> list[str]:
    """Return a chart of the losses, one of the accuracies, one for each other metric, and one of the noise scale.

    Lines of one run have a colour each. Where there are several runs, or several trainings in a run, these
    have the colours, and all metrics but the last are dashed.
    """
    trainings = [
        (f"{chr(65 + i)} {name}".strip() if len(kept) > 1 else name, part, run.result or {})
        for i, run in enumerate(kept)
        for name, part in run.parts.items()
        if part.history
    ]
    names = dict.fromkeys(name for _, part, _ in trainings for row in part.history for name in row)
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in NOT_METRICS:
            group = next((kind for kind in ("loss", "accuracy") if name.endswith(kind)), words(name))
            groups.setdefault(group, []).append(name)
    drawn = [
        line_chart(group.capitalize(), lines, percent=group == "accuracy")
        for group, metrics in groups.items()
        if (lines := _lines(trainings, metrics))
    ]
    scales = [
        Line(f"{name}, noise scale" if len(trainings) > 1 else "running estimate", i, False, points)
        for i, (name, part, _) in enumerate(trainings)
        if (points := [(row["step"], row["running_scale"]) for row in part.noise if row["running_scale"] > 0])
    ]
    return drawn + ([line_chart("Noise scale of the gradient (examples)", scales)] if scales else [])


def _lines(trainings: Sequence[tuple[str, Part, Mapping[str, Any]]], metrics: Sequence[str]) -> list[Line]:
    several = len(trainings) > 1
    lines = []
    for i, (name, part, result) in enumerate(trainings):
        for j, metric in enumerate(metrics):
            points = [(row["step"], row[metric]) for row in part.history if metric in row]
            if any(math.isfinite(y) for _, y in points):
                label = f"{name}, {words(metric)}" if several else words(metric)
                if result.get(metric, points[-1][1]) != points[-1][1]:
                    label += " on the way"  # the run measured it anew at the end, on all examples
                dashed = several and j < len(metrics) - 1
                lines.append(Line(label, i if several else j, dashed, points))
    return lines


def flows(kept: Sequence[Kept]) -> list[list[dict[str, Any]]]:
    """Return for each run the maps of its gradients by layer over training; all are on one scale.

    Returns:
        For each run a list with, for each of its trainings, `name`, `params` and `values` (heat maps of the
        gradient's rms at the parameters and at the values on the way, both from the inputs to the loss),
        `left_out` and `values_left_out` (how many rows they lack) and `flags` (what was wrong, and where).
    """
    trainings = [(name, part) for run in kept for name, part in run.parts.items() if part.inspections]
    sizes = [rms for _, part in trainings for row in part.inspections for rms in _rms(row["grads"]).values()]
    bounds = log_bounds(sizes)
    on_the_way = log_bounds(
        [rms for _, part in trainings for row in part.inspections for rms in _rms(row["site_grads"]).values()]
    )

    def told(name: str, part: Part) -> dict[str, Any]:
        rows = part.inspections
        steps = [row["step"] for row in rows]
        params = _by_depth(rows[0], part.shapes)
        values = list(rows[0]["site_grads"])
        return {
            "name": name,
            "params": heat_map(
                "Gradient of each parameter (rms)", _table(rows, "grads", params), steps, bounds
            ),
            "values": heat_map(
                "Gradient at each value on the way (rms)",
                _table(rows, "site_grads", values),
                steps,
                on_the_way,
            ),
            "left_out": max(len(params) - HEAT_ROWS, 0),
            "values_left_out": max(len(values) - HEAT_ROWS, 0),
            "flags": _flags(rows),
            "looks": len(rows),
        }

    return [[told(name, part) for name, part in run.parts.items() if part.inspections] for run in kept]


def _rms(stats: Mapping[str, Any]) -> dict[str, float]:
    """Return the rms of each entry; of one that a loop repeats, over all its turns."""
    return {
        name: float(np.sqrt(np.mean(np.square(np.asarray(each["rms"], np.float64)))))
        for name, each in stats.items()
        if "rms" in each
    }


def _table(rows: Sequence[Row], kind: str, names: Sequence[str]) -> dict[str, list[float]]:
    sizes = [_rms(row[kind]) for row in rows]
    return {name: [of_row.get(name, 0.0) for of_row in sizes] for name in names[:HEAT_ROWS]}


def _by_depth(row: Row, shapes: Shapes) -> list[str]:
    """Return the parameters in the order in which the loss uses them, from the inputs on.

    Runs of earlier versions have not kept that order: it is guessed from the names there.
    """
    order = row.get("param_order") or sorted(row["grads"], key=lambda param: _depth(param, row, shapes))
    # The loss does not use the others, or not together with data.
    return [
        *(param for param in order if param in row["grads"]),
        *(p for p in row["grads"] if p not in order),
    ]


def _depth(param: str, row: Row, shapes: Shapes) -> tuple[int, int]:
    """Return a key to sort by: the first value whose name shares most of the parameter's path, then reading order."""
    scopes = param.split("/")[:-1]
    shared = [_n_shared(scopes, site.split("/")) for site in row["sites"]]
    order = list(shapes).index(param) if param in shapes else len(shapes)
    return (shared.index(max(shared)) if scopes and shared and max(shared) else 0), order


def _n_shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Return how many parts two paths share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _flags(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Return site, flag, and at how many of the looks it was raised."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for site, found in row.get("flags", {}).items():
            for flag in found:
                counts[site, flag] = counts.get((site, flag), 0) + 1
    return [(site, flag, n) for (site, flag), n in counts.items()]


def differences(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Return name, value in each table and whether they differ, of every name.

    >>> differences([{"hidden": 16, "seed": 0}, {"hidden": 30, "seed": 0}])
    [('hidden', ['16', '30'], True), ('seed', ['0', '0'], False)]
    """
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [(name, [_value(table.get(name)) for table in tables]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def words(name: str) -> str:
    """Return a metric's name as words.

    >>> words("train_accuracy"), words("loss")
    ('training accuracy', 'training loss')
    """
    return "training loss" if name == "loss" else name.replace("train_", "training_").replace("_", " ")


def _told(run: Kept, about: About) -> dict[str, Any]:
    last = next((part.history[-1] for part in run.parts.values() if part.history), None)
    counts = {sum(map(math.prod, part.shapes.values())) for part in run.parts.values() if part.shapes}
    facts = {}
    if counts:
        facts["parameters"] = " / ".join(f"{count:,}" for count in sorted(counts))
    if last:
        facts["steps"] = f"{last['step']:,}"
    if len(run.parts) > 1:
        facts["trainings"] = str(len(run.parts))
    if run.versions.get("seed") is not None:
        facts["seed"] = str(run.versions["seed"])
    if run.experiment:
        began = begun(run.folder)
        facts["begun"] = f"{began.day} {began:%B %Y, %H:%M} UTC"
    return {
        "experiment": run.experiment or _name(run),
        "folder": str(run.folder),
        "what": about.what,
        "promise": about.expected,
        "verdict": verdict(run.result),
        "facts": facts,
        "command": command(run, about),
    }


def _name(run: Kept) -> str:
    return "-".join(filter(None, [run.experiment, run.folder.resolve().name]))


def command(run: Kept, about: About) -> str:
    """Return what to type to run it again: the options that are not at their defaults; "" for one of `gf.fit`."""
    if not run.experiment:
        return ""
    told = ["gradfn", "run", run.experiment]
    for name, value in run.options.items():
        _, default = about.options.get(name, ("", ...))
        plain = tuple(value) if isinstance(value, list) else value
        if value is None or plain == default:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            told += [option] if value else []
        else:
            told += [option, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(told)


def _options_of(about: Mapping[str, About], run: Kept) -> Mapping[str, tuple[str, Any]]:
    return about.get(run.experiment, About()).options


def _shared_shapes(kept: Sequence[Kept]) -> list[dict[str, Any]]:
    """Return the tables of parameters, each with the names of the trainings that have these parameters."""
    tables: dict[tuple[Any, ...], list[str]] = {}
    for i, run in enumerate(kept):
        for name, part in run.parts.items():
            if part.shapes:
                label = " ".join(filter(None, [chr(65 + i) if len(kept) > 1 else "", name]))
                tables.setdefault(tuple(part.shapes.items()), []).append(label)
    found = []
    for rows, names in tables.items():
        sizes = [math.prod(shape) for _, shape in rows]
        weights = sum(size for size, (_, shape) in zip(sizes, rows, strict=True) if len(shape) > 1)
        found.append(
            {
                "of": ", ".join(name for name in names if name),
                "rows": [(name, list(shape), size) for (name, shape), size in zip(rows, sizes, strict=True)],
                "weights": weights,
                "biases": sum(sizes) - weights,
                "total": sum(sizes),
            }
        )
    return found


def _pictures(kept: Sequence[Kept], room: int) -> list[dict[str, Any]]:
    """Return the pictures by name, for each run its data address (None where it has none); within `room` bytes."""
    live = DRAWN_LIVE if any(part.history for run in kept for part in run.parts.values()) else ()
    names = dict.fromkeys(name for run in kept for name in run.pictures if name not in live)
    files = {
        (name, i): run.pictures[name] for name in names for i, run in enumerate(kept) if name in run.pictures
    }
    files = _shrunk(files, room)
    found = []
    for name in names:
        of_runs = [_picture(files[name, i]) if (name, i) in files else None for i in range(len(kept))]
        wide = any(each and each["width"] > 2 * each["height"] for each in of_runs)
        found.append({"name": words(name), "wide": wide, "of_runs": of_runs})
    return found


def _picture(png: bytes) -> dict[str, Any]:
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    title = " ".join(image.info.get("Title", "").split())
    kind = (image.format or "png").lower()
    address = f"data:image/{kind};base64,{base64.b64encode(png).decode()}"
    return {"address": address, "title": title, "width": image.width, "height": image.height}


def _shrunk(files: dict[Any, bytes], room: int) -> dict[Any, bytes]:
    """Return pictures that fit, as base64, in `room` bytes: with fewer colors, then pixels; of films the last frame."""
    size = 1.0
    small = files
    while sum(map(len, small.values())) * 4 / 3 > room:
        small = {key: min(png, _smaller(png, size), key=len) for key, png in files.items()}
        size *= 0.8
    return small


def _smaller(png: bytes, size: float) -> bytes:
    from PIL import Image, PngImagePlugin

    image = Image.open(io.BytesIO(png))
    image.seek(getattr(image, "n_frames", 1) - 1)
    title = PngImagePlugin.PngInfo()
    title.add_itxt("Title", image.info.get("Title", ""))
    pixels = image.convert("RGB").resize([max(int(side * size), 1) for side in image.size])
    out = io.BytesIO()
    pixels.quantize(256).save(out, "png", optimize=True, pnginfo=title)
    return out.getvalue()


def _live(net: DigitNet) -> dict[str, Any]:
    """Return what the page says of the network that it holds."""
    n_layers = sum(1 for name in net.params if name.startswith("W"))
    sizes = [net.params["W1"].shape[1], *(len(net.params[f"W{i}"]) for i in range(1, n_layers + 1))]
    return {"sizes": "-".join(map(str, sizes)), "data": net.about["data"], "small": net.spline is not None}


def _net(net: DigitNet) -> str:
    """Return the network as JSON: arrays as base64 of little-endian float32."""
    arrays = net.params | {"samples": net.samples} | ({} if net.spline is None else {"spline": net.spline})
    told = net.about | {
        "labels": net.labels.tolist(),
        "arrays": {
            name: {
                "shape": list(array.shape),
                "data": base64.b64encode(array.astype("<f4").tobytes()).decode(),
            }
            for name, array in arrays.items()
        },
    }
    return json.dumps(told).replace("<", "\\u003c")


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
