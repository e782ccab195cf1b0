"""What an SVG file draws, checked before a page contains it.

The page shows an SVG only as an image, in which no script runs and nothing is loaded. That does not stop a small file
that draws one thing a billion times, nor one that is not what it says. So a file is read here first: it may contain
what charts consist of, refer only to its own parts, and draw a bounded number of them.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.parsers import expat

MAX_BYTES = 1_000_000  # of a file; those that gradfn writes have at most 300 kB
MAX_DEPTH = 60  # elements inside each other, references followed
MAX_DRAWN = 100_000  # elements, each counted as often as it is drawn
MAX_TITLE = 2000  # letters
MAX_IMAGE = 25_000_000  # pixels of all images in a file
NAMESPACE = "http://www.w3.org/2000/svg"
TITLES = ("http://purl.org/dc/elements/1.1/ title", f"{NAMESPACE} title")
SHAPES = ("path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan", "use", "image")
SHARED = (
    "defs",
    "symbol",
    "clipPath",
    "linearGradient",
    "radialGradient",
    "stop",
    "pattern",
    "marker",
    "style",
)
ELEMENTS = {"svg", "g", "title", "desc", "metadata", *SHAPES, *SHARED}
UNITS = {"": 1.0, "px": 1.0, "pt": 4 / 3, "in": 96.0, "cm": 96 / 2.54, "mm": 9.6 / 2.54}
PNG = "data:image/png;base64,"


class SVGError(ValueError):
    """A file that is not shown; the message says why, and does not name it."""


class Drawing(NamedTuple):
    """What is known of an SVG.

    Attributes:
        width: in CSS pixels.
        height: in CSS pixels.
        title: its first title; "" where there is none.
    """

    width: int
    height: int
    title: str


@dataclass
class _Element:
    """An element, and what it refers to by id."""

    children: list[_Element] = field(default_factory=list)
    references: list[str] = field(default_factory=list)


def read_svg(data: bytes) -> Drawing:
    """Return the size and the title of an SVG that is safe to show as an image.

    Raises:
        SVGError: it is not XML, is too large, has no size, or contains what a chart does not need.
    """
    if len(data) > MAX_BYTES:
        raise SVGError(f"expected at most {MAX_BYTES:,} bytes of SVG, got {len(data):,}")
    reader = _Reader()
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise SVGError(f"is not XML ({error})") from error
    _count(reader.root, reader.by_id)
    return Drawing(*reader.size, " ".join(reader.title.split()))


class _Reader:
    """Builds the tree of a file while `expat` parses it, and refuses what is not allowed."""

    def __init__(self) -> None:
        self.root = _Element()
        self.by_id: dict[str, _Element] = {}
        self.size = 0, 0
        self.title = ""
        self._open: list[tuple[str, _Element]] = [("", self.root)]
        self._in_title = False
        self._pixels = 0
        # The encoding is given, so that no declaration in the file can ask for another one.
        self.parser = expat.ParserCreate("utf-8", " ")
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.EntityDeclHandler = self._entity
        self.parser.ProcessingInstructionHandler = self._instruction

    def _entity(self, name: str, *_: object) -> None:
        raise SVGError(f"declares an entity, {name[:40]!r}")

    def _instruction(self, target: str, _: str) -> None:
        raise SVGError(f"has a processing instruction, {target[:40]!r}")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        space, _, tag = name.rpartition(" ")
        self._in_title = name in TITLES and not self.title
        inside = self._open[-1][0]
        if len(self._open) == 1:
            if (space, tag) != (NAMESPACE, "svg"):
                raise SVGError(f"is not SVG: its first element is {tag[:40]!r}")
            self.size = _size(attributes)
        if len(self._open) > MAX_DEPTH:
            raise SVGError(f"has more than {MAX_DEPTH} elements inside each other")
        element = _Element()
        if inside == "metadata":
            # It is not drawn; only its title is read.
            self._open.append((inside, element))
            return
        if space != NAMESPACE or tag not in ELEMENTS:
            raise SVGError(f"has an element {tag[:40]!r}, which charts do not need")
        for key, value in attributes.items():
            self._attribute(tag, key.rpartition(" ")[2], value, element)
        self._open[-1][1].children.append(element)
        self._open.append((tag, element))

    def _attribute(self, tag: str, key: str, value: str, element: _Element) -> None:
        if key.lower().startswith("on"):
            raise SVGError(f"has an attribute {key[:40]!r}, which runs a script")
        if key == "id":
            self.by_id.setdefault(value, element)
        elif key == "href" and tag == "image":
            self._image(value)
        elif key == "href":
            element.references.append(_inside(value))
        else:
            if "\\" in value or (key == "style" and "@" in value):
                raise SVGError(f"has an attribute {key[:40]!r} with an escape")
            element.references += [_inside(found) for found in re.findall(r"url\(([^)]*)", value, re.I)]

    def _image(self, address: str) -> None:
        """Count the pixels of an image in the file, which may only be a PNG in it."""
        if not address.startswith(PNG):
            raise SVGError("shows an image that is not a PNG inside of it")
        start = re.sub(r"\s", "", address[len(PNG) : len(PNG) + 100])[:32]  # the first 24 bytes have the size
        try:
            head = base64.b64decode(start, validate=True)
            width, height = struct.unpack(">II", head[16:24])
        except (binascii.Error, struct.error) as error:
            raise SVGError("shows an image that is damaged") from error
        self._pixels += width * height
        if head[:8] != b"\x89PNG\r\n\x1a\n" or self._pixels > MAX_IMAGE:
            raise SVGError(f"shows images of more than {MAX_IMAGE:,} pixels, or that are not PNG")

    def _end(self, _: str) -> None:
        self._open.pop()
        self._in_title = False

    def _text(self, text: str) -> None:
        if self._open[-1][0] == "style" and re.search(r"@|\\|url", text, re.I):
            raise SVGError("has a style sheet that refers to other files")
        if self._in_title:
            self.title += text[: MAX_TITLE - len(self.title)]


def _size(attributes: dict[str, str]) -> tuple[int, int]:
    """Return the width and height of an SVG in CSS pixels."""
    numbers = []
    for name in ("width", "height"):
        found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d*)?)\s*(px|pt|in|cm|mm|)\s*", attributes.get(name, ""))
        if not found:
            raise SVGError(f"has no {name} in pixels, points or inches")
        numbers.append(float(found[1]) * UNITS[found[2]])
    if len(re.findall(r"[-+.\d]+", attributes.get("viewBox", ""))) != 4:
        raise SVGError("has no viewBox, so that it could not be shown at another size")
    return round(numbers[0]), round(numbers[1])


def _inside(address: str) -> str:
    """Return the id that an address refers to."""
    address = address.strip().strip("\"'")
    if not address.startswith("#"):
        raise SVGError("refers to another file")
    return address[1:]


def _count(root: _Element, by_id: dict[str, _Element]) -> None:
    """Walk through a drawing as a browser does, which draws a shared part wherever it is referred to."""
    n_drawn = 0

    def walk(element: _Element, depth: int) -> None:
        nonlocal n_drawn
        n_drawn += 1
        if n_drawn > MAX_DRAWN or depth > 2 * MAX_DEPTH:
            raise SVGError(f"draws more than {MAX_DRAWN:,} elements, or refers to itself")
        for child in element.children:
            walk(child, depth + 1)
        for name in element.references:
            if name in by_id:
                walk(by_id[name], depth + 1)

    walk(root, 0)
