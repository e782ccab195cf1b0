"""Pictures of a page: what they are is read from their first bytes, and they are made smaller until they fit.

A file of a few bytes can claim to be a picture that fills the memory. So its size in pixels is checked before anything
is decoded; what is not shown is named, with the reason.
"""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gradfn.pages.svg import SVGError, read_svg

MAX_PIXELS = 25_000_000  # of a picture; a figure of matplotlib's at 130 dpi has about a million
ALL_PIXELS = 100_000_000  # of all pictures of a page that are decoded, and of the frames of a film
SCALES = (1.0, 0.8, 0.64, 0.51, 0.41, 0.33, 0.26, 0.2)  # of the sides of pictures that do not fit
TITLE = 1000  # letters of a picture's title
NO_ROOM = "the page would be too large"
SVG = "svg+xml"
PNG, GIF = b"\x89PNG\r\n\x1a\n", (b"GIF87a", b"GIF89a")


class PictureError(ValueError):
    """A file that is not shown as a picture; the message says why, and does not name it."""


class Picture(NamedTuple):
    """What is known of a picture before it is decoded.

    Attributes:
        data: the file's content.
        kind: "png", "gif" or "svg+xml".
        width: in pixels.
        height: in pixels.
        title: what its text says that it is; "" where it says nothing.
        still: of an SVG, the same picture as PNG, for a page without room for it; None where there is none.
    """

    data: bytes
    kind: str
    width: int
    height: int
    title: str = ""
    still: Picture | None = None

    @property
    def address(self) -> str:
        """The picture as a data address."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def read_picture(data: bytes) -> Picture:
    """Return a picture, which is not decoded.

    Raises:
        PictureError: it is not PNG, GIF or SVG, is damaged, has too many pixels, or is an SVG that contains more than
            a chart.
    """
    if data.lstrip()[:1] == b"<":
        return _drawing(data)
    if data.startswith(PNG) and len(data) >= 24:
        kind, (width, height) = "png", struct.unpack(">II", data[16:24])
    elif data.startswith(GIF) and len(data) >= 10:
        kind, (width, height) = "gif", struct.unpack("<HH", data[6:10])
    else:
        raise PictureError("is neither PNG nor GIF nor SVG")
    if not 0 < width * height <= MAX_PIXELS:
        raise PictureError(f"expected at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,}")
    image = _opened(data)
    title = " ".join(str(image.info.get("Title", ""))[: 2 * TITLE].split())[:TITLE]
    if kind == "png":
        with _pillow():
            image.verify()
    return Picture(data, kind, width, height, title)


def fitting(pictures: Mapping[Any, Picture], room: int) -> tuple[dict[Any, Picture], dict[Any, str]]:
    """Return pictures that fit in `room` bytes as base64, and why others are left out.

    If they do not fit as they are they get fewer colors, then fewer pixels; of films the last frame is shown, and of an
    SVG the same picture as PNG where that is smaller.

    Args:
        pictures: by any keys, the most important ones first.
        room: bytes.
    """
    if _size(pictures) <= room:
        return dict(pictures), {}
    left_out: dict[Any, str] = {}
    decoded: dict[Any, tuple[Picture, Picture]] = {}  # each as it is, and as it is decoded
    n_films = sum(picture.kind == "gif" for picture in pictures.values())
    n_pixels = 0
    for key, picture in pictures.items():
        n_pixels += picture.width * picture.height
        try:
            if n_pixels > ALL_PIXELS:
                raise PictureError(NO_ROOM)
            still = picture.still or picture
            if picture.kind == "gif":
                still = _still(picture, ALL_PIXELS // n_films)
            if still.kind != SVG:
                _scaled(still, SCALES[-1])  # whether it can be decoded
            decoded[key] = picture, still
        except PictureError as error:
            left_out[key] = str(error)
    small: dict[Any, Picture] = {}
    for scale in SCALES:
        small = {
            key: picture if still.kind == SVG else min(picture, _scaled(still, scale), key=_bytes)
            for key, (picture, still) in decoded.items()
        }
        if _size(small) <= room:
            break
    while small and _size(small) > room:
        left_out[small.popitem()[0]] = NO_ROOM
    return small, left_out


def _bytes(picture: Picture) -> int:
    return len(picture.data)


def _size(pictures: Mapping[Any, Picture]) -> int:
    """Return how many bytes the addresses of pictures take."""
    return sum(
        (_bytes(picture) + 2) // 3 * 4 + len(f"data:image/{picture.kind};base64,")
        for picture in pictures.values()
    )


def _drawing(data: bytes) -> Picture:
    """Return an SVG as a picture."""
    try:
        width, height, title = read_svg(data)
    except SVGError as error:
        raise PictureError(str(error)[:200]) from error
    if not 0 < width * height <= MAX_PIXELS:
        raise PictureError(f"expected at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,}")
    return Picture(data, SVG, width, height, title[:TITLE])


def _opened(data: bytes) -> Any:
    from PIL import Image

    with _pillow():
        return Image.open(io.BytesIO(data), formats=["PNG", "GIF"])


@contextlib.contextmanager
def _pillow() -> Iterator[None]:
    """Turn whatever Pillow's parsers raise, and its warning of too many pixels, into a PictureError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(f"is damaged ({error})"[:200]) from error


def _still(film: Picture, most: int) -> Picture:
    """Return the last frame of a film, or the last one before `most` pixels were decoded."""
    image = _opened(film.data)
    with _pillow():
        for frame in range(1, max(most // (film.width * film.height), 1)):
            try:
                image.seek(frame)
            except EOFError:
                break
            if image.width * image.height > MAX_PIXELS:
                raise PictureError("has a frame of too many pixels")
        out = io.BytesIO()
        image.convert("RGB").save(out, "png", compress_level=1)
    return film._replace(data=out.getvalue(), kind="png", width=image.width, height=image.height)


def _scaled(picture: Picture, scale: float) -> Picture:
    """Return a picture with at most 256 colors, and with fewer pixels."""
    from PIL import PngImagePlugin

    width, height = (max(int(side * scale), 1) for side in (picture.width, picture.height))
    out = io.BytesIO()
    image = _opened(picture.data)
    with _pillow():
        title = PngImagePlugin.PngInfo()
        title.add_itxt("Title", picture.title)
        pixels = image.convert("RGB").resize((width, height))
        pixels.quantize(256).save(out, "png", optimize=True, pnginfo=title)
    return Picture(out.getvalue(), "png", width, height, picture.title)
