"""Pictures of a run: what cannot be shown, or does not fit, is named in the page, and costs neither memory nor time."""

import base64
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gradfn.pages import pictures
from gradfn.pages.page import page
from gradfn.pages.pictures import MAX_PIXELS, PictureError, fitting, read_picture
from gradfn.runs import kept as keeping
from gradfn.runs.kept import read_run
from tests.report.test_page import picture, text_of, write_run


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *more, pixels=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + data + chunk(b"IEND", b"")


def gif(n_frames, width=20, height=20):
    """Return an animation of `n_frames` identical frames of a few bytes each."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\0"
    return screen + frame * n_frames + b";"


BOMBS = {
    "100,000 x 100,000": (png(100_000, 100_000), "pixels, got 100,000 x 100,000"),
    "no pixels": (png(0, 5), "pixels, got 0 x 5"),
    "a film of 4 gigapixels": (gif(1, 65_535, 65_535), "pixels, got 65,535 x 65,535"),
    "title": (
        png(1, 1, chunk(b"zTXt", b"Title\0\0" + zlib.compress(b"x" * 50_000_000)), pixels=b"\0\0"),
        "is damaged",
    ),
    "not a picture": (b"svg onload=alert(1)>", "is neither PNG nor GIF nor SVG"),
    "a JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "is neither PNG nor GIF nor SVG"),
    "nothing": (b"", "is neither PNG nor GIF nor SVG"),
    "a header alone": (png(1, 1)[:24], "is damaged"),
    "truncated": (picture(np.random.default_rng(0), 30)[:-100], "is damaged"),
    "a wrong checksum": (
        png(1, 1, pixels=b"\0\0").replace(b"IDAT", b"IDAT", 1)[:-20] + b"\1" * 20,
        "is damaged",
    ),
    "a GIF's header": (gif(1)[:13], "is damaged"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_cannot_be_shown_is_named_with_the_reason(tmp_path, name):
    data, why = BOMBS[name]
    with pytest.raises(PictureError, match=re.escape(why)):
        read_picture(data)
    folder = write_run(tmp_path / "run")
    (folder / "bad.png").write_bytes(data)
    text = text_of(page([read_run(folder)]))
    assert re.search(f"Pictures that are not shown: bad: .*{re.escape(why)}", text)
    assert "bad" not in text_of(page([read_run(folder)._replace(pictures={})]))


def test_names_and_titles_are_escaped_and_cut():
    title = '"><script>alert(1)</script>' * 1000
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", title)
    out = io.BytesIO()
    Image.new("RGB", (3, 3)).save(out, "png", pnginfo=info)
    found = read_picture(out.getvalue())
    assert len(found.title) <= pictures.TITLE
    assert (found.kind, found.width, found.height) == ("png", 3, 3)


def test_pictures_fit_or_are_left_out():
    rng = np.random.default_rng(0)
    many = {i: read_picture(picture(rng, 40)) for i in range(5)}
    for room in (10**6, 20_000, 10_000, 1_000, 0, -10_000):
        found, left_out = fitting(many, room)
        assert found.keys() | left_out.keys() == many.keys()
        assert found.keys().isdisjoint(left_out)
        assert sum(len(each.address) for each in found.values()) <= max(room, 0)
        assert set(left_out.values()) <= {"the page would be too large"}
        assert list(found) == list(range(len(found)))  # the first ones stay
        for each in found.values():
            with Image.open(io.BytesIO(each.data)) as image:
                assert image.size == (each.width, each.height)
    assert fitting(many, 10**6)[0] == many
    assert not fitting(many, 0)[0]


def test_what_only_decoding_finds_damaged_is_left_out_where_pictures_are_made_smaller():
    good = read_picture(picture(np.random.default_rng(0), 60))
    hollow = read_picture(png(50, 50, pixels=b"\0"))  # of 50 x 50 pixels there is none
    found, left_out = fitting({"hollow": hollow, "good": good}, 5_000)
    assert list(found) == ["good"]
    assert "is damaged" in left_out["hollow"]


def test_a_film_of_very_many_frames_is_followed_as_far_as_there_is_time(monkeypatch):
    film = read_picture(gif(100_000, 2_000, 2_000))
    monkeypatch.setattr(pictures, "ALL_PIXELS", 40_000_000)
    found, left_out = fitting(
        {"film": film, "other": read_picture(picture(np.random.default_rng(0), 60))}, 20_000
    )
    assert list(found) == ["film", "other"]
    assert (found["film"].kind, left_out) == ("png", {})


def test_files_that_are_too_large_or_too_many_are_not_read(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    for file in folder.glob("*.png"):
        file.unlink()
    with (folder / "a.png").open("wb") as out:
        out.truncate(2 << 30)  # of which the disk holds nothing
    os.mkfifo(folder / "b.png")
    (folder / "c.png").mkdir()
    (folder / "d.png").symlink_to("/dev/zero")
    for i in range(keeping.MAX_PICTURES):
        (folder / f"e{i:03}.png").write_bytes(picture(np.random.default_rng(i), 2))
    run = read_run(folder)
    assert len(run.pictures) == keeping.MAX_PICTURES - 4
    assert list(run.pictures_left_out) == [
        "e096.png",
        "e097.png",
        "e098.png",
        "e099.png",
        *(f"{c}.png" for c in "abcd"),
    ]
    html = page([run])
    text = text_of(html)
    assert "a.png: expected at most 16,777,216 bytes, got 2,147,483,648" in text
    assert "b.png: is not a regular file" in text
    assert "e099.png: there are more than 100 pictures" in text
    assert html.count("data:image/png") == 96
    monkeypatch.setattr(keeping, "PICTURES_LIMIT", 300)
    assert 0 < len(read_run(folder).pictures) < 10


def test_both_runs_name_their_pictures(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (b / "weights.png").write_bytes(b"no")
    html = page([read_run(a), read_run(b)])
    assert "Pictures that are not shown: B weights: is neither PNG nor GIF nor SVG" in text_of(html)
    assert base64.b64encode((a / "weights.png").read_bytes()).decode() in html
    assert MAX_PIXELS == 25_000_000
