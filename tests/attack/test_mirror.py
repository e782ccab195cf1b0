"""A mirror that sends wrong, slow or endless data: one line of error, and only complete files in the cache."""

import contextlib
import gzip
import http.server
import importlib
import random
import threading
import time

import pytest

from gradfn.data import DataError
from gradfn.data._mnist import download_missing

download = importlib.import_module("gradfn.data.download")
PIECE = bytes(1 << 16)


def respond(handler, evil, rng):
    """Respond to a request in one of many wrong ways."""
    write = handler.wfile.write

    def head(status=200, **headers):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()

    match evil:
        case "endless":
            head()
            while True:
                write(PIECE)
        case "a length of 4 GB":
            head(Content_Length=4 << 30)
            while True:
                write(PIECE)
        case "a length that is too long":
            head(Content_Length=10_000)
            write(rng.randbytes(rng.randrange(10_000)))
        case "a length that is too short":
            head(Content_Length=10)
            write(rng.randbytes(10_000))
        case "no length that is a number":
            head(Content_Length=rng.choice(["-1", "1e3", "", "999999999999999999999999", "ten"]))
            write(b"abc")
        case "a byte now and then":
            head(Content_Length=10_000)
            for _ in range(300):
                write(b"a")
                time.sleep(0.1)
        case "headers without end":
            write(b"HTTP/1.1 200 OK\r\n")
            for i in range(100_000):
                write(b"X-%d: y\r\n" % i)
        case "silence":
            time.sleep(rng.choice([0.5, 30]))
        case "another place":
            where = [
                "file:///etc/passwd",
                "ftp://127.0.0.1/a",
                handler.path,
                "http://127.0.0.1:9/",
                "gopher://x",
                "",
            ]
            head(302, Location=rng.choice(where))
        case "a bomb":
            block = gzip.compress(bytes(1 << 24))
            head(Content_Length=len(block) * 300)
            for _ in range(300):
                write(block)
        case "noise":
            head()
            write(rng.randbytes(rng.randrange(100_000)))
        case "chunks that lie":
            write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            write(rng.choice([b"ffffffffffff\r\nabc", b"-5\r\n", b"x"]))
        case "an error":
            head(rng.choice([301, 400, 404, 418, 500, 503]))
        case "no HTTP":
            write(rng.randbytes(1000))


EVILS = [
    "endless",
    "a length of 4 GB",
    "a length that is too long",
    "a length that is too short",
    "a bomb",
    "noise",
]
EVILS += [
    "no length that is a number",
    "a byte now and then",
    "headers without end",
    "silence",
    "another place",
]
EVILS += ["chunks that lie", "an error", "no HTTP"]


@pytest.fixture
def mirror():
    """Serve the kind of data that `mirror.evil` selects, on localhost."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.close_connection = True
            with contextlib.suppress(OSError):
                respond(self, server.evil, server.rng)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request, address):
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        server.address = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.tries(all=5 * len(EVILS), sample=len(EVILS) // 2)
def test_mirror(mirror, tmp_path, tries, tally, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    faults = []
    for number in range(tries):
        mirror.evil, mirror.rng = EVILS[number % len(EVILS)], random.Random(number)
        folder, began = tmp_path / str(number), time.monotonic()
        try:
            download_missing(folder, mirror.address)
            faults.append(f"{mirror.evil}: was taken for MNIST")
        except DataError as error:
            if "\n" in str(error) or mirror.address not in str(error):
                faults.append(
                    f"{mirror.evil}: expected a line that names the address, got {str(error)[:300]!r}"
                )
        except BaseException as error:
            faults.append(f"{mirror.evil}: {type(error).__name__}: {error}")
        if time.monotonic() - began > 20:
            faults.append(f"{mirror.evil}: took {time.monotonic() - began:.0f} s")
        left = [file.name for file in folder.rglob("*") if file.is_file()] if folder.exists() else []
        faults += [f"{mirror.evil}: left {left}"] if left else []
    tally(faults, tries)
