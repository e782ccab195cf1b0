"""MNIST: the real files, damaged folders, and the download."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from gradfn.data import DataError, idx_folder, mnist

# `gradfn.data._mnist` is the function; this is the module of that name.
module = importlib.import_module("gradfn.data._mnist")
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = module.SHA256


def encode(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def small_arrays():
    rng = np.random.default_rng(0)
    return {
        TRAIN_IMAGES: rng.integers(0, 256, (30, 4, 3), dtype=np.uint8),
        TRAIN_LABELS: rng.integers(0, 10, 30, dtype=np.uint8),
        TEST_IMAGES: rng.integers(0, 256, (20, 4, 3), dtype=np.uint8),
        TEST_LABELS: rng.integers(0, 10, 20, dtype=np.uint8),
    }


def write(folder, arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(encode(array)))
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a folder of four small files, whose checksums replace MNIST's."""
    arrays = small_arrays()
    sums = {name: hashlib.sha256(encode(array)).hexdigest() for name, array in arrays.items()}
    monkeypatch.setattr(module, "SHA256", sums)
    return write(tmp_path / "small", arrays)


# The real files


@pytest.fixture(scope="module")
def real(shared_data):
    return mnist(shared_data / "mnist")


def test_real_mnist_is_in_nielsens_split(real):
    sizes = [(x.shape, y.shape) for x, y in (real.train, real.validation, real.test)]
    assert sizes == [((n, 784), (n,)) for n in (50_000, 10_000, 10_000)]
    assert all(x.dtype == np.float32 and y.dtype == np.int32 for x, y in real[:3])
    assert real.name == "MNIST"
    assert real.shape == (28, 28)
    assert real.classes == tuple("0123456789")
    assert real.train[0].min() == 0.0
    assert real.train[0].max() == 1.0
    # Published values: the first labels, the counts of each digit in the test part, and the mean gray level that is
    # commonly used for normalization (0.1307, over all 60,000).
    assert real.train[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert np.bincount(real.test[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels = (real.train[0].sum(dtype=np.float64) + real.validation[0].sum(dtype=np.float64)) / (60_000 * 784)
    assert abs(pixels - 0.1307) < 5e-5


def test_swapped_real_files_are_recognized(shared_data, tmp_path):
    for name, other in [
        (TRAIN_IMAGES, TEST_IMAGES),
        (TRAIN_LABELS, TEST_LABELS),
        (TEST_IMAGES, TRAIN_IMAGES),
        (TEST_LABELS, TRAIN_LABELS),
    ]:
        (tmp_path / f"{name}.gz").symlink_to(shared_data / "mnist" / f"{other}.gz")
    with pytest.raises(
        DataError, match=f"{TRAIN_IMAGES}.gz: expected MNIST's {TRAIN_IMAGES}, got its {TEST_IMAGES}.*swapped"
    ):
        mnist(tmp_path)


# Folders


def test_folder(small):
    arrays = small_arrays()
    data = mnist(small, validation=10)
    np.testing.assert_array_equal(data.train[0] * 255, arrays[TRAIN_IMAGES][:20].reshape(20, 12))
    np.testing.assert_array_equal(data.validation[1], arrays[TRAIN_LABELS][20:])
    np.testing.assert_array_equal(data.test[1], arrays[TEST_LABELS])
    assert data.shape == (4, 3)


def test_decompressed_files_are_read(small):
    expected = mnist(small, validation=0)
    for file in list(small.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    np.testing.assert_array_equal(mnist(small, validation=0).train[0], expected.train[0])


def test_order_of_folders(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GRADFN_MNIST", str(small))
    mnist(validation=0)  # the environment's folder, nothing is downloaded
    monkeypatch.setenv("GRADFN_MNIST", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere: there is no such folder"):
        mnist()
    mnist(small, validation=0)  # an explicit folder has priority
    monkeypatch.delenv("GRADFN_MNIST")
    (tmp_path / "cache" / "gradfn").mkdir(parents=True)
    small.rename(tmp_path / "cache" / "gradfn" / "mnist")
    mnist(validation=0)  # the cache, and nothing is downloaded
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder("mnist") == tmp_path / ".cache" / "gradfn" / "mnist"


def swap(folder, one, other):
    one, other = folder / f"{one}.gz", folder / f"{other}.gz"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def change(folder, name, new):
    (folder / f"{name}.gz").write_bytes(gzip.compress(encode(new)))


def cut(folder, name):
    file = folder / f"{name}.gz"
    file.write_bytes(file.read_bytes()[:-20])


DAMAGE = {
    "missing": (lambda f: (f / f"{TEST_LABELS}.gz").unlink(), f"{TEST_LABELS}.gz: there is no such file"),
    "cut off": (lambda f: cut(f, TEST_IMAGES), f"{TEST_IMAGES}.gz: truncated or damaged gzip data"),
    "not gzip": (
        lambda f: (f / f"{TRAIN_LABELS}.gz").write_text("Not Found"),
        f"{TRAIN_LABELS}.gz: expected gzip data, got .*Not Found",
    ),
    "labels for images": (
        lambda f: swap(f, TRAIN_IMAGES, TRAIN_LABELS),
        rf"{TRAIN_IMAGES}.gz: expected images with 3 dimension\(s\), got shape \[30\].*swapped",
    ),
    "the test's images for training": (
        lambda f: swap(f, TRAIN_IMAGES, TEST_IMAGES),
        f"{TRAIN_IMAGES}.gz: expected 30 images, as many as labels in {TRAIN_LABELS}.gz, got 20",
    ),
    "a label too few": (
        lambda f: change(f, TRAIN_LABELS, small_arrays()[TRAIN_LABELS][1:]),
        f"{TRAIN_IMAGES}.gz: expected 29 images, as many as labels in {TRAIN_LABELS}.gz, got 30",
    ),
    "a label of 10": (
        lambda f: change(f, TEST_LABELS, np.arange(20, dtype=np.uint8) % 11),
        f"{TEST_LABELS}.gz: labels must be from 0 to 9, got 10 at index 10",
    ),
}


@pytest.mark.parametrize("read", [mnist, idx_folder])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folder(small, kind, read):
    damage, message = DAMAGE[kind]
    damage(small)
    with pytest.raises(DataError, match=message):
        read(small, validation=0)


def test_contents_that_are_not_mnists(small):
    labels = small_arrays()[TRAIN_LABELS]
    change(small, TRAIN_LABELS, 9 - labels)
    with pytest.raises(DataError, match=f"{TRAIN_LABELS}.gz: damaged or not MNIST.*idx_folder"):
        mnist(small)
    data = idx_folder(small, validation=5)
    np.testing.assert_array_equal(data.train[1], 9 - labels[:25])
    assert data.name == f"IDX files in {small}"


def test_train_and_test_swapped(small):
    swap(small, TRAIN_IMAGES, TEST_IMAGES)
    swap(small, TRAIN_LABELS, TEST_LABELS)
    with pytest.raises(
        DataError, match=f"{TRAIN_IMAGES}.gz: expected MNIST's {TRAIN_IMAGES}, got its {TEST_IMAGES}"
    ):
        mnist(small)


def test_images_of_two_shapes(small):
    change(small, TEST_IMAGES, np.zeros([20, 3, 4], np.uint8))
    with pytest.raises(DataError, match=r"training images are \(4, 3\) pixels, test images \(3, 4\)"):
        idx_folder(small)


def test_bad_validation(small):
    for bad in (-1, 30):
        with pytest.raises(ValueError, match=f"validation must be an integer from 0 to 29, got {bad}"):
            mnist(small, validation=bad)
    with pytest.raises(TypeError, match=r"validation must be an integer, got 0\.5"):
        mnist(small, validation=0.5)


# The download, from a local server


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and records the requests; `cut` names files whose body ends early."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.attack is not None:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client closed the connection
                self.server.attack(self)
            return None
        if self.path.split("/")[-1] not in self.server.cut:
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            body = file.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-20])
        return None

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder):
    """Serve a folder as http://127.0.0.1:.../mnist."""
    handler = functools.partial(Handler, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.sent, server.cut, server.folder, server.attack = [], 0, set(), folder, None
        server.mirror = f"http://127.0.0.1:{server.server_port}/mnist"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache folder, with an environment that does not name another."""
    monkeypatch.delenv("GRADFN_MNIST", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "gradfn" / "mnist"


@pytest.fixture
def server(small, cache, tmp_path):
    (tmp_path / "pub").mkdir()
    with serving(small.rename(tmp_path / "pub" / "mnist")) as server:
        server.cache = cache
        yield server


def kept(server):
    return sorted(file.name for file in server.cache.iterdir()) if server.cache.exists() else []


def test_the_real_files_are_downloaded(shared_data, cache):
    with serving(shared_data / "mnist") as server:
        data = mnist(mirror=server.mirror)
    assert repr(data) == (
        "Dataset('MNIST': 50,000 train, 10,000 validation, 10,000 test; inputs 28x28; 10 classes)"
    )
    for file in cache.iterdir():
        assert file.read_bytes() == (shared_data / "mnist" / file.name).read_bytes()


def test_files_are_downloaded_once(server, capfd):
    data = mnist(mirror=server.mirror + "/", validation=10)
    np.testing.assert_array_equal(data.test[1], small_arrays()[TEST_LABELS])
    names = [f"{name}.gz" for name in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)]
    assert server.asked == [f"/mnist/{name}" for name in names]
    assert kept(server) == sorted(names)
    out, err = capfd.readouterr()
    assert out == ""  # the progress bar is on standard error
    assert TRAIN_IMAGES in err
    server.asked.clear()
    mnist(mirror=server.mirror, validation=10)
    assert server.asked == []
    (server.cache / names[2]).unlink()
    mnist(mirror=server.mirror, validation=10)
    assert server.asked == [f"/mnist/{names[2]}"]


def expect_failure(server, message, keeps=()):
    with pytest.raises(DataError, match=message) as caught:
        mnist(mirror=server.mirror)
    assert server.mirror in str(caught.value)
    assert "GRADFN_MNIST" in str(caught.value)  # the alternative
    assert kept(server) == sorted(keeps)


def test_truncated_body(server):
    server.cut.add(f"{TRAIN_IMAGES}.gz")
    size = (server.folder / f"{TRAIN_IMAGES}.gz").stat().st_size
    expect_failure(
        server, f"{TRAIN_IMAGES}.gz: truncated download: expected {size:,} bytes, got {size - 20:,}"
    )


def test_files_downloaded_before_a_failure_stay(server):
    server.cut.add(f"{TEST_IMAGES}.gz")
    expect_failure(server, "truncated", keeps=[f"{TRAIN_IMAGES}.gz", f"{TRAIN_LABELS}.gz"])
    server.cut.clear()
    server.asked.clear()
    mnist(mirror=server.mirror, validation=0)
    assert len(server.asked) == 2


def test_wrong_sum(server):
    change(server.folder, TRAIN_IMAGES, 255 - small_arrays()[TRAIN_IMAGES])
    expect_failure(server, f"{TRAIN_IMAGES}.gz: damaged or not MNIST: expected sha256")


def test_a_page_instead_of_the_file(server):
    (server.folder / f"{TRAIN_IMAGES}.gz").write_text("<html>please log in</html>")
    expect_failure(server, f"{TRAIN_IMAGES}.gz: expected gzip data, got .*<html>")


def test_not_there(server):
    (server.folder / f"{TRAIN_IMAGES}.gz").unlink()
    expect_failure(server, f"{TRAIN_IMAGES}.gz: the server returned 404")


def test_no_server(server):
    server.mirror = "http://127.0.0.1:9/mnist"  # the discard port: nobody listens
    expect_failure(server, "could not be downloaded to")


def test_interrupted_write_leaves_nothing(server, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mnist(mirror=server.mirror)
    assert kept(server) == []


def test_a_damaged_cache_raises_with_a_remedy(server):
    mnist(mirror=server.mirror, validation=0)
    cut(server.cache, TRAIN_IMAGES)
    with pytest.raises(
        DataError, match=f"(?s){TRAIN_IMAGES}.gz: truncated or damaged gzip data.*Delete that file"
    ):
        mnist(mirror=server.mirror)


def test_bad_mirror(server):
    with pytest.raises(ValueError, match=r"mirror must be an address .* got 'example\.org/mnist'"):
        mnist(mirror="example.org/mnist")


# Hostile mirrors


def write_for(handler, seconds, piece, pause=0.0):
    """Write a piece repeatedly until the test ends; count the bytes that the client received."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        handler.wfile.write(piece)
        handler.server.sent += len(piece)
        time.sleep(pause)


def endless(handler, *headers, chunked=False):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    for header in headers:
        handler.send_header(*header)
    handler.end_headers()
    piece = bytes(1 << 16)
    write_for(handler, 20, b"10000\r\n" + piece + b"\r\n" if chunked else piece)


TOO_LONG = {
    "no length": lambda handler: endless(handler),
    "chunked": lambda handler: endless(handler, ("Transfer-Encoding", "chunked"), chunked=True),
    "a length of 4 GB": lambda handler: endless(handler, ("Content-Length", str(4 << 30))),
    "chunked, with a length of 5": lambda handler: endless(
        handler, ("Content-Length", "5"), ("Transfer-Encoding", "chunked"), chunked=True
    ),
}


@pytest.mark.parametrize("kind", TOO_LONG)
def test_an_endless_body_raises_at_the_file_size(server, kind, monkeypatch):
    monkeypatch.setattr(module, "SIZES", dict.fromkeys(module.SIZES, 1 << 20))
    server.attack = TOO_LONG[kind]
    expect_failure(
        server, r"train-images-idx3-ubyte.gz: expected at most 1,060,061 bytes, got (more|a file of)"
    )
    assert len(server.asked) == 1
    assert server.sent < 16 << 20  # and that in buffers of the system
    wait_for_downloads()


def test_a_length_that_is_not_a_number_or_too_short_or_too_long(server):
    body = gzip.compress(encode(small_arrays()[TRAIN_IMAGES]))

    def answer(length):
        def attack(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", length)
            handler.end_headers()
            handler.wfile.write(body)

        return attack

    for length, message in {
        str(len(body) - 9): "truncated or damaged gzip data",
        str(len(body) + 9): f"truncated download: expected {len(body) + 9:,} bytes, got {len(body):,}",
        "9" * 5000: "could not be downloaded to",
    }.items():
        server.attack = answer(length)
        expect_failure(server, message)


def trickle(handler, start, piece):
    handler.wfile.write(start)
    write_for(handler, 20, piece, pause=0.05)


TRICKLES = {
    "status": (b"", b"x"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
}


def wait_for_downloads():
    """Wait until no thread downloads, or fail."""
    end = time.monotonic() + 2
    while any(thread.name == "download" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", TRICKLES)
def test_a_slow_body_times_out(server, kind, monkeypatch):
    download = importlib.import_module("gradfn.data.download")
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.attack = lambda handler: trickle(handler, *TRICKLES[kind])
    began = time.monotonic()
    expect_failure(
        server, r"too slow: expected 10,000 bytes per second after the first 0\.3 s, got \d bytes in \d s"
    )
    assert time.monotonic() - began < 2
    wait_for_downloads()


def test_a_body_that_is_slow_but_not_too_slow_is_received(server, monkeypatch):
    monkeypatch.setattr(importlib.import_module("gradfn.data.download"), "TIMEOUT", 0.2)

    def attack(handler):
        body = (server.folder / handler.path.split("/")[-1]).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for part in range(0, len(body), 100):
            handler.wfile.write(body[part : part + 100])
            time.sleep(0.005)

    server.attack = attack
    assert len(mnist(mirror=server.mirror, validation=0).train[1]) == 30


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1:9/x", "data:,x", "//127.0.0.1:9/x"])
def test_redirects_to_other_schemes_raise(server, to):
    def attack(handler):
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    server.attack = attack
    expect_failure(server, "the server returned 302|could not be downloaded to|unknown url type")
    server.attack = lambda handler: (
        handler.send_response(302),
        handler.send_header("Location", handler.path),
        handler.end_headers(),
    )
    expect_failure(server, "the server returned 302")  # an endless redirect


def test_a_compression_bomb_from_a_mirror_raises_at_the_size_in_its_header(server):
    bomb = zlib.compressobj(9, wbits=31)
    header = struct.pack(">HBB3I", 0, 8, 3, 1, 10, 10)
    body = bomb.compress(header + bytes(40 << 20)) + bomb.flush()
    (server.folder / f"{TRAIN_IMAGES}.gz").write_bytes(body)
    expect_failure(server, "too long: expected 1 x 10 x 10 = 100 bytes of data, got .* or more")


# Compression bombs in a folder


def peak_of(code, *arguments):
    """Run a program; return its exit status, its standard error, and its memory use beyond imports."""
    program = (
        "import resource, sys, gradfn as gf, gradfn.data.idx\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try:\n    {code}\n"
        "except gf.data.DataError as error:\n    print(error, file=sys.stderr)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=env, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    return ran.stderr, int(ran.stdout) * unit


@pytest.mark.parametrize("claims", [100, 1 << 32])
def test_memory_for_a_compression_bomb_is_bounded(tmp_path, claims):
    n = 100 << 20
    shape = (claims, 1, 1) if claims < 1 << 32 else (claims // 4, 2, 2)
    file = tmp_path / "bomb.gz"
    header = struct.pack(">HBB3I", 0, 8, 3, *shape)
    if claims == 100:  # far more data than it describes, in two members
        data = gzip.compress(header + bytes(100)) + gzip.compress(bytes(n), 1)
    else:  # far less
        data = gzip.compress(header + bytes(1000))
    file.write_bytes(data)
    error, peak = peak_of("gf.data.read_idx(sys.argv[1])", str(file))
    assert ("too long" if claims == 100 else "truncated: expected 1073741824 x 2 x 2") in error
    assert len(error.splitlines()) == 1
    assert peak < 32 << 20


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_special_files_raise(small, kind):
    file = small / f"{TRAIN_LABELS}.gz"
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    for read in (mnist, idx_folder):
        with pytest.raises(DataError, match=f"{TRAIN_LABELS}.gz: is not a regular file"):
            read(small)


def test_the_size_limits_hold_for_mnist(shared_data):
    for name, size in module.SIZES.items():
        with gzip.open(shared_data / "mnist" / f"{name}.gz") as content:
            assert len(content.read()) == size
