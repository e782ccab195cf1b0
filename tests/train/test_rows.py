"""Rows of a run in files: equal to lists of rows, whatever is in memory, and read back unchanged."""

import copy
import json
import math
import pickle

import numpy as np
import pytest

import gradfn as gf
from gradfn.files import FileError
from gradfn.train import rows as module
from gradfn.train.rows import Rows


def opened(file):
    rows = Rows(file)
    rows.open()
    return rows


def some_rows(n, seed=0):
    """Return rows like those of a run, with numbers of every kind at every depth."""
    rng = np.random.default_rng(seed)
    odd = [math.nan, math.inf, -math.inf, None, 0.1 + 0.2, 1e-320, -0.0, 3, 1.0, "name", True]
    pick = lambda: odd[rng.integers(len(odd))]  # noqa: E731
    return [
        {"step": i, "loss": float(rng.normal()), "a/b": pick(),
         "sites": {"ü": {"mean": pick()}, "x": [pick(), [pick()]]}}
        for i in range(n)
    ]  # fmt: skip


def as_text(rows):
    return repr(list(rows))  # distinguishes 1 from 1.0, and NaN equals NaN


def restored(rows, check=lambda row: None):
    again = Rows(rows.file)
    again.restore(rows.extent, check)
    return again


@pytest.mark.parametrize("recent", [0, 300, 5000, 4 << 20])
@pytest.mark.parametrize("block", [100, 1 << 20])
def test_rows_are_like_a_list_whatever_is_in_memory(tmp_path, monkeypatch, recent, block):
    monkeypatch.setattr(module, "RECENT", recent)
    monkeypatch.setattr(module, "BLOCK", block)
    expected = some_rows(60)
    rows = opened(tmp_path / "a.jsonl")
    for row in copy.deepcopy(expected):
        rows.append(row)
    rows.close()
    for found in (rows, restored(rows), pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert as_text(found) == as_text(expected)
        assert len(found) == 60
        for index in (0, 7, 59, -1, -60):
            assert repr(found[index]) == repr(expected[index])
        for part in (
            slice(None),
            slice(3, 50),
            slice(-4, None),
            slice(40, 3, -7),
            slice(9, 9),
            slice(50, 99),
        ):
            assert as_text(found[part]) == as_text(expected[part])
    for index in (60, -61):
        with pytest.raises(IndexError):
            rows[index]


def test_rows_are_equal_to_lists_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECENT", 100)
    expected = [{"step": i, "loss": i / 7} for i in range(50)]
    rows = opened(tmp_path / "a.jsonl")
    for row in expected:
        rows.append(row)
    assert rows == expected
    assert expected == rows
    assert rows != expected[:-1]
    assert rows != [*expected[:-1], {"step": 49, "loss": 0.0}]
    assert rows != 3
    rows.close()


def test_rows_may_be_appended_while_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECENT", 200)
    rows = opened(tmp_path / "a.jsonl")
    for i in range(20):
        rows.append({"step": i})
    visited = []
    for row in rows:
        visited.append(row["step"])
        rows.append({"step": 99})
    assert visited == list(range(20))
    rows.close()


def test_memory_holds_the_most_recent_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECENT", 1000)
    rows = opened(tmp_path / "a.jsonl")
    for i in range(500):
        rows.append({"step": i, "text": "x" * (i % 300)})
        kept = list(rows._recent)
        assert sum(len(json.dumps(row)) + 1 for row in kept) <= 1000
        assert [row["step"] for row in kept] == list(range(i + 1))[len(rows) - len(kept) :]
    rows.close()
    assert len(restored(rows)._recent) == len(rows._recent)


def test_files_are_json_with_null_for_what_json_lacks(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    rows = opened(tmp_path / "a.jsonl")
    for row in some_rows(40):
        rows.append(row)
    rows.append({"step": 1, "loss": 0.5})
    rows.close()
    lines = [json.loads(line, parse_constant=refuse) for line in rows.file.read_text().splitlines()]
    assert lines[-1] == {"step": 1, "loss": 0.5}
    for line, row in zip(lines, some_rows(40)):
        value = row["a/b"]
        special = isinstance(value, float) and not math.isfinite(value)
        assert line["a/b"] == (None if special else value)
        assert ([str(value), "a/b"] in line.get("not_finite", [])) == special


def test_what_comes_after_the_extent_is_cut(tmp_path):
    rows = opened(tmp_path / "a.jsonl")
    for i in range(3):
        rows.append({"step": i})
    whole, extent = rows.file.read_bytes(), rows.extent
    for more in (b"", b'{"step": 3}\n', b'{"st', b"\xff\xfe\n" * 5):
        rows.file.write_bytes(whole + more)
        again = restored(rows)
        assert rows.file.read_bytes() == whole + more  # reading changes nothing
        again.open()
        assert rows.file.read_bytes() == whole
        assert again.extent == extent
        again.append({"step": 7})
        again.close()
        assert [json.loads(line)["step"] for line in rows.file.read_text().splitlines()] == [0, 1, 2, 7]
    rows.close()


@pytest.mark.parametrize(
    ("content", "extent", "message"),
    [
        (None, (1, 10), "there is no such file"),
        (b"", (1, 10), "expected at least 10 bytes, got 0"),
        (b'{"a": 1}\n', (1, 10), "expected at least 10 bytes, got 9"),
        (b'{"a": 1}\n{"a": 2}\n', (1, 18), "expected 1 rows in 18 bytes, got 2"),
        (b'{"a": 1}\n{"a": 2}\n', (3, 18), "expected 3 rows in 18 bytes, got 2"),
        (b'{"a": 1}\n{"a": 2}\n', (2, 17), "line 2: expected a row of JSON that ends at byte 17"),
        (b'{"a": 1}\n{"a": 2}\n', (2, 18), "damaged: its rows do not match the checksum"),
        (b'{"a": 1}\n{"a": 2}\n', (0, -5), "expected 0 rows in -5 bytes"),
        (b'{"a": 1}\n{"a": 2}\n', (-1, 0), "expected -1 rows in 0 bytes"),
        (b"\xff\xff\n", (1, 3), "line 1: "),
        (b"[1]\n", (1, 4), "line 1: Expected `object`"),
        (b"[" * 9000 + b"\n", (1, 9001), "line 1: "),
        (b'{"a": 1, "not_finite": 3}\n', (1, 26), "line 1: not_finite does not fit the row"),
        (b'{"a": 1, "not_finite": [[]]}\n', (1, 29), "line 1: not_finite does not fit the row"),
        (b'{"a": 1, "not_finite": [["nan", "a"]]}\n', (1, 39), "line 1: not_finite does not fit the row"),
        (b'{"a": {}, "not_finite": [["nan", "a", "b"]]}\n', (1, 45), "line 1: not_finite does not fit the row"),
        (b'{"a": null, "not_finite": [["x", "a"]]}\n', (1, 40), "line 1: not_finite does not fit the row"),
        (b'{"a": [null], "not_finite": [["nan", "a", 7]]}\n', (1, 47), "line 1: not_finite does not fit the row"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(tmp_path, content, extent, message):
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FileError) as error:
        Rows(file).restore({"rows": extent[0], "bytes": extent[1], "crc": 0}, lambda row: None)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_older_rows_of_a_file_that_was_replaced_are_not_another_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECENT", 30)
    rows = opened(tmp_path / "a.jsonl")
    for i in range(9):
        rows.append({"step": i})
    rows.close()
    rows.file.rename(tmp_path / "b.jsonl")
    rows.file.write_bytes((tmp_path / "b.jsonl").read_bytes())
    assert rows[-1] == {"step": 8}
    with pytest.raises(FileError, match="another run has replaced it"):
        rows[0]
    rows.file.unlink()
    with pytest.raises(FileError, match="there is no such file"):
        list(rows)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "target").write_text("mine\n")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(FileError, match="is a link"):
        Rows(tmp_path / "a.jsonl").open()
    assert (tmp_path / "target").read_text() == "mine\n"


def test_stalled_reads_older_rows_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECENT", 200)
    read, of_file = [], Rows._read
    monkeypatch.setattr(
        Rows, "_read", lambda rows, start, stop: read.append(stop - start) or of_file(rows, start, stop)
    )
    losses = [*np.random.default_rng(0).normal(size=60).tolist(), math.nan, *[5.0] * 40]
    stop, rows = gf.stalled("loss", evaluations=30), opened(tmp_path / "a.jsonl")
    for i, loss in enumerate(losses):
        rows.append({"step": i, "loss": loss})
        assert stop(rows) == gf.stalled("loss", evaluations=30)(
            [{"loss": value} for value in losses[: i + 1]]
        )
    assert stop(rows)
    rows.close()
    assert sum(read) <= 31 * len(losses)  # the last thirty each time, and one that is older
