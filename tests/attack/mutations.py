"""Damaged files: bytes that are flipped, cut, repeated; JSON whose values are of another kind; headers that lie."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import warnings
from pathlib import Path

SECONDS = 20  # that one try may take
DEEP = 100_000


def mutate(data, rng, kind):
    """Return damaged data. `kind` is "json", "rows", "tensors" or "bytes": what the file holds."""
    structured = {"json": _json, "rows": _rows, "tensors": _tensors}.get(kind)
    if structured and rng.random() < 0.6:
        with contextlib.suppress(UnicodeDecodeError):
            return structured(data, rng)
    return _bytes(data, rng)


def _bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.3:
            at = min(at, rng.randrange(200))  # headers come first
        n = rng.choice([1, 2, 8, 100, 5000])
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(n)
            case 3:
                del data[at : at + n]
            case 4:
                data[at : at + n] = rng.choice([b"\0", b"\xff", b"\n", b'"', b"{"]) * n
            case 5:
                data[at:at] = data[at : at + n]
            case 6:
                data = bytearray()
    return bytes(data)


def hostile(rng):
    """Return a value that nobody expects."""
    return rng.choice(
        [
            *(
                None,
                True,
                False,
                0,
                -1,
                1,
                0.5,
                -0.0,
                10**9,
                2**31,
                2**63,
                2**64,
                10**30,
                -(10**30),
                1e308,
                -1e308,
            ),
            *(
                "",
                " ",
                "../../outside",
                "/etc/passwd",
                "a" * 5000,
                "\n",
                "\0",
                "\ud800",
                "é",
                "NaN",
                "<script>",
                "1",
            ),
            *(
                [],
                {},
                [[]],
                [None],
                {"": None},
                [1] * 5000,
                {"a": {"b": {"c": []}}},
                [[1, 2], [3]],
                ["", 0, None],
            ),
        ]
    )


def _json(data, rng):
    text = json.dumps(_changed(json.loads(data), rng))
    return _text_level(text, rng).encode("utf-8", "surrogatepass")


def _rows(data, rng):
    lines = data.decode().splitlines()
    for _ in range(rng.choice([1, 1, 5])):
        i = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0 | 1 | 2:
                with contextlib.suppress(ValueError, RecursionError):  # of a line that is damaged already
                    lines[i] = _text_level(json.dumps(_changed(json.loads(lines[i]), rng)), rng)
            case 3:
                lines[i] = rng.choice(["", "[]", "null", "3", '"x"', "{}", "[" * DEEP, '{"step": 1}', "\x00"])
            case 4:
                lines.insert(i, lines[rng.randrange(len(lines))])
            case 5:
                del lines[i:]
                lines += [""]
    return ("\n".join(lines) + rng.choice(["\n", ""])).encode("utf-8", "surrogatepass")


def _text_level(text, rng):
    if rng.random() < 0.1:
        word = rng.choice(
            ["NaN", "Infinity", "1e999", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "tru", "'x'", "//"]
        )
        found = [i for i, letter in enumerate(text) if letter == ":"]
        at = rng.choice(found) + 1 if found else 0
        return text[:at] + word + rng.choice(["", ","]) + text[at:]
    return text


def _changed(content, rng):
    """Return JSON with one node replaced by a hostile value, removed or duplicated."""
    nodes = list(_nodes(content))
    if not nodes:
        return hostile(rng)
    parent, key = rng.choice(nodes)
    match rng.randrange(5):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[str(hostile(rng))] = parent.pop(key)
        case 2 if isinstance(parent, dict):
            parent[str(hostile(rng))] = hostile(rng)
        case _:
            parent[key] = hostile(rng)
    return content


def _nodes(content):
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield content, key
        yield from _nodes(value)


def _tensors(data, rng):
    """Change a safetensors file's header, or JSON that is in its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    inner = [name for name, text in metadata.items() if text.startswith("{")]
    if inner and rng.random() < 0.5:
        name = rng.choice(inner)
        metadata[name] = _json(metadata[name].encode(), rng).decode("utf-8", "replace")
    elif rng.random() < 0.3:
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name]["dtype"] = rng.choice(
            ["F8_E4M3", "F4", "BOOL", "I64", "U8", "F64", "BF16", "C64", "X", "F16"]
        )
    else:
        header = _changed(header, rng)
    text = json.dumps(header).encode("utf-8", "replace")
    claimed = rng.choice([len(text)] * 9 + [0, 2**63 - 1, 2**64 - 1, 10**8, len(text) + 1])
    return struct.pack("<Q", claimed) + text + body


# What is tried


def work(target, folder, name, kind, seeds):
    """Damage a file of a folder once for each seed and let `target(folder)` read it; return the faults."""
    folder, faults = Path(folder), []
    file = folder / name
    whole = file.read_bytes()
    warnings.simplefilter("ignore")

    def stop(number, frame):
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    for seed in seeds:
        damaged = mutate(whole, random.Random(seed), kind)
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        file.write_bytes(damaged)
        signal.alarm(SECONDS)
        try:
            fault = target(str(folder))
        except BaseException as error:
            fault = f"{type(error).__name__}: {str(error)[:300]} {where(error)}"
        finally:
            signal.alarm(0)
        if fault:
            faults.append(f"{name}, seed {seed}: {fault}")
    file.write_bytes(whole)
    return faults


def where(error):
    """Return the last lines of an error's traceback, as file:line."""
    lines, trace = [], error.__traceback__
    while trace:
        lines.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(lines[-5:])


def fault_of_command(*words):
    """Run the command line; return what is wrong with its exit, or None."""
    from gradfn import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(words))
    lines = err.getvalue().strip("\n").split("\n")
    if code not in (0, 2):
        return f"exit code {code}: {err.getvalue()[:300]}"
    if code == 2 and (len(lines) != 1 or "Traceback" in err.getvalue()):
        return f"more than one line: {err.getvalue()[:500]}"
    return None


def refused(read, folder):
    """Read from a folder; return a fault unless it succeeds or raises one line that names a file."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if "\n" in text or str(folder) not in text:
            return f"expected one line that names the file, got {text[:300]!r} {where(error)}"
    return None


def report(folder):
    """Write the page of a run."""
    return fault_of_command("report", folder, "--out", os.path.join(os.path.dirname(folder), "page.html"))


def sample(folder):
    """Sample from the language model of a run."""
    return fault_of_command("sample", folder, "--n", "2")


def resume(folder):
    """Resume a training in a copy of its folder: it gives the same result, or raises."""
    from tests.attack.children import train

    copy, hash_file = f"{folder}-copy", Path(f"{folder}.txt")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    hash_file.write_text("refused")
    fault = refused(lambda: train(copy, hash_file=hash_file), copy)
    right = hash_file.read_text() in ("refused", Path(folder, "fingerprint").read_text())
    return fault or (None if right else "resumed with another result")


def stored(folder):
    """Read the options with which a run resumes."""
    from gradfn import runs
    from gradfn.experiments import digits

    config = digits.Config(resume=True, folder=folder)
    return refused(
        lambda: runs.merge(config, runs.stored("digits", config) or config, digits.Config()), folder
    )


def kept(folder):
    """Read the kept parameters of a training."""
    import jax

    import gradfn as gf

    like = gf.mlp([3, 4, 2]).init(jax.random.key(1))
    return refused(lambda: gf.train.kept(folder, like), folder)


def load_pretrained(folder):
    """Load weights."""
    import gradfn as gf

    return refused(lambda: gf.load_pretrained(folder), folder)


def tokens(folder):
    """Read the tokens of a text from a memory map."""
    import gradfn as gf

    def read():
        data = gf.data.text(os.path.join(folder, "tokens.npy"))
        data.tokenizer.decode(data.train[:5])

    return refused(read, folder)


def idx(folder):
    """Read images in the files of MNIST."""
    import gradfn as gf

    return refused(lambda: gf.data.idx_folder(folder), folder)


def text(folder):
    """Read a text."""
    import gradfn as gf

    return refused(lambda: gf.data.text(os.path.join(folder, "a.txt"), "characters"), folder)
