"""Small files that expand to large ones: each raises, or is read, in bounded memory and time."""

import gzip
import json
import resource
import shutil
import signal
import struct
import zlib
from pathlib import Path

import pytest

from tests.attack import mutations
from tests.attack.children import at_once, in_child
from tests.attack.test_mutations import make

ROOM = 1 << 30  # bytes of memory beyond those at the start of the process
SECONDS = 30


def zeros(n):
    """Return gzip data of n zeros, a thousand times smaller."""
    block = gzip.compress(bytes(1 << 24))
    return block * (n >> 24)


def png(width, height, title=b""):
    """Return a PNG image of white pixels, at least a thousand times smaller than its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj()
    rows = (
        b"".join(packer.compress(b"\0" + b"\xff" * (-(-width // 8))) for _ in range(height)) + packer.flush()
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    text = chunk(b"zTXt", b"Title\0\0" + zlib.compress(title)) if title else b""
    return b"\x89PNG\r\n\x1a\n" + header + text + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def laughs(depth):
    """Return an SVG that draws one path `10 ** depth` times."""
    groups = ['<path id="g0" d="M 0 0 L 9 9"/>']
    groups += [f'<g id="g{i + 1}">{f"""<use href="#g{i}"/>""" * 10}</g>' for i in range(depth)]
    start = '<svg xmlns="http://www.w3.org/2000/svg" width="300pt" height="200pt" viewBox="0 0 300 200">'
    return f'{start}<defs>{"".join(groups)}</defs><use href="#g{depth}"/></svg>'.encode()


def gif(n_frames):
    """Return a GIF animation of tiny frames."""
    frame = b"\x21\xf9\x04\x04\x01\0\0\0\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0"
    return b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff" + frame * n_frames + b";"


def as_json(file, **changes):
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensors(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


DEEP = '{"a":' * 5_000_000
# By name: a folder (see `make`), how it is modified, and how it is read.
BOMBS = {
    "gzip of 8 GB": ("idx", lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(zeros(8 << 30)), "idx"),
    "gzip of 8 GB under a header of 24 bytes": (
        "idx",
        lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 6, 2, 2)) + zeros(8 << 30)
        ),
        "idx",
    ),
    "IDX header that claims 2^96 bytes": (
        "idx",
        lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(
            struct.pack(">HBBIII", 0, 8, 3, *[2**32 - 1] * 3)
        ),
        "idx",
    ),
    "gzipped IDX header that claims 4 GB": (
        "idx",
        lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 2**22, 32, 32) + bytes(1000))
        ),
        "idx",
    ),
    "PNG of 10^10 pixels": (
        "run",
        lambda f: (f / "picture.png").write_bytes(png(100_000, 100_000)),
        "report",
    ),
    "PNG with a title of 1 GB": (
        "run",
        lambda f: (f / "picture.png").write_bytes(png(30, 20, b"a" * (1 << 30))),
        "report",
    ),
    "GIF of 100,000 frames": ("run", lambda f: (f / "film.gif").write_bytes(gif(100_000)), "report"),
    "SVG that draws a path 10^12 times": (
        "run",
        lambda f: (f / "chart.svg").write_bytes(laughs(12)),
        "report",
    ),
    "SVG of 1 GB": ("run", lambda f: sparse(f / "chart.svg", 1 << 30), "report"),
    "3,000 charts": (
        "run",
        lambda f: [(f / f"p{i}.svg").write_bytes(laughs(1)) for i in range(3000)],
        "report",
    ),
    "3,000 pictures": (
        "run",
        lambda f: [(f / f"p{i}.png").write_bytes(png(300, 200)) for i in range(3000)],
        "report",
    ),
    "deep result": ("run", lambda f: (f / "result.json").write_text(DEEP), "report"),
    "deep config": ("run", lambda f: (f / "config.json").write_text(DEEP), "stored"),
    "deep row": ("run", lambda f: (f / "metrics.jsonl").write_text(DEEP + "\n"), "report"),
    "a row of 1 GB": ("run", lambda f: sparse(f / "metrics.jsonl", 1 << 30), "report"),
    "inspections of 8 GB": ("run", lambda f: sparse(f / "inspections.jsonl", 8 << 30), "report"),
    "result of 8 GB": ("run", lambda f: sparse(f / "result.json", 8 << 30), "report"),
    "a verdict of 60 MB": ("run", lambda f: as_json(f / "result.json", verdict="a" * 60_000_000), "report"),
    "a million options": (
        "run",
        lambda f: as_json(f / "config.json", options={f"option{i}": i for i in range(1_000_000)}),
        "report",
    ),
    "steps of 10^300": (
        "run",
        lambda f: (f / "metrics.jsonl").write_text('{"step": 1' + "0" * 300 + ', "loss": 1e308}\n'),
        "report",
    ),
    "checkpoint with a header of 2^60 bytes": (
        "run",
        lambda f: (f / "checkpoint.safetensors").write_bytes(struct.pack("<Q", 1 << 60)),
        "report",
    ),
    "checkpoint of a million parameters' names": (
        "run",
        lambda f: (f / "checkpoint.safetensors").write_bytes(
            tensors(
                {"__metadata__": {"notes": "{}"}}
                | {
                    f"params/{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                    for i in range(500_000)
                }
            )
        ),
        "report",
    ),
    "checkpoint that claims 8 EB": (
        "fit",
        lambda f: (f / "checkpoint.safetensors").write_bytes(
            tensors({"params/W1": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 2**63]}})
        ),
        "resume",
    ),
    "10^9 layers in GPT-2's config": (
        "gpt2",
        lambda f: as_json(f / "config.json", n_layer=10**9),
        "load_pretrained",
    ),
    "10^9 words in GPT-2's config": (
        "gpt2",
        lambda f: as_json(f / "config.json", vocab_size=10**9),
        "load_pretrained",
    ),
    "10^9 nodes in GPT-2's config": (
        "gpt2",
        lambda f: as_json(f / "config.json", n_embd=10**9),
        "load_pretrained",
    ),
    "10^9 positions in GPT-2's config": (
        "gpt2",
        lambda f: as_json(f / "config.json", n_positions=10**9),
        "load_pretrained",
    ),
    "10^9 layers in Llama's config": (
        "llama",
        lambda f: as_json(f / "config.json", num_hidden_layers=10**9),
        "load_pretrained",
    ),
    "10^12 hidden nodes in Llama's config": (
        "llama",
        lambda f: as_json(f / "config.json", intermediate_size=10**12),
        "load_pretrained",
    ),
    "deep index": (
        "gpt2",
        lambda f: (f / "model.safetensors.index.json").write_text(DEEP),
        "load_pretrained",
    ),
    "10^9 nodes in a writer": (
        "writer",
        lambda f: as_json(f / "model.json", settings={"vocab": 3, "width": 10**9, "cell": "gru"}),
        "sample",
    ),
    "10^9 layers in a writer": (
        "writer",
        lambda f: as_json(
            f / "model.json", settings={"vocab": 3, "width": 4, "cell": "gru", "n_layers": 10**9}
        ),
        "sample",
    ),
    "10^9 layers in a writing transformer": (
        "writer",
        lambda f: as_json(
            f / "model.json",
            net="gpt",
            settings={"vocab": 3, "context": 8, "n_layers": 10**9, "n_heads": 1, "width": 4},
        ),
        "sample",
    ),
    "tokens that claim 10^15 of them": (
        "tokens",
        lambda f: (f / "tokens.npy").write_bytes(
            (f / "tokens.npy").read_bytes().replace(b"(18,), }" + b" " * 13, b"(1000000000000000,), }"[:21])
        ),
        "tokens",
    ),
    "a tokenizer of 60 MB": (
        "tokens",
        lambda f: as_json(f / "tokens.npy.tokenizer.json", symbols="é" * 10_000_000),
        "tokens",
    ),
}


def sparse(file, size):
    """Make a sparse file of zeros."""
    with file.open("wb") as out:
        out.truncate(size)


def explode(folder, name, results):
    """Put a bomb into a folder and read it in limited memory; write the faults to a file."""
    import warnings

    _, put, reader = BOMBS[name]
    warnings.simplefilter("ignore")
    read = getattr(mutations, reader)
    read(folder)  # import and compile before memory is limited
    put(Path(folder))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    signal.alarm(SECONDS)
    try:
        fault = read(folder)
    except BaseException as error:
        fault = f"{type(error).__name__}: {str(error)[:300]} {mutations.where(error)}"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(results).write_text(json.dumps(fault))


@pytest.mark.tries(all=len(BOMBS), sample=3)
def test_bombs(forks, tmp_path, tries, tally):
    names = list(BOMBS) if tries == len(BOMBS) else list(BOMBS)[:: len(BOMBS) // tries][:tries]
    for kind in {BOMBS[name][0] for name in names}:
        end = in_child(forks, make, kind, tmp_path / kind)
        assert end.code == 0, end

    def attack(job):
        number, name = job
        folder, results = tmp_path / str(number) / "run", tmp_path / f"{number}.json"
        shutil.copytree(tmp_path / BOMBS[name][0], folder)
        end = in_child(forks, explode, str(folder), name, str(results))
        shutil.rmtree(folder)
        fault = json.loads(results.read_text()) if results.exists() else str(end)
        return [f"{name}: {fault}"] if fault else []

    tally([fault for faults in at_once(attack, enumerate(names)) for fault in faults], len(names))
