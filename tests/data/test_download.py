"""Downloads from a real server on this machine: what is kept is right and whole, and nothing else is left behind."""

import gzip
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lab.data import DataConfig, DataError, load, mnist
from tests.data.conftest import TRAIN

IMAGES = "train-images-idx3-ubyte.gz"


class Mirror:
    """A server that gives the files of a table, with what it was asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, []
        self.declared: dict[str, int] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                outer.asked.append(name)
                body = outer.files.get(name)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(outer.declared.get(name, len(body))))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/mnist/"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mirror():
    made = []

    def start(files) -> Mirror:
        made.append(Mirror(dict(files)))
        return made[-1]

    yield start
    for server in made:
        server.stop()


@pytest.fixture
def dead_url() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


def kept(cache) -> set[str]:
    """What lies in the cache, but for the lock that processes wait on."""
    return {path.name for path in cache.rglob("*") if path.is_file()} - {".lock"}


def test_a_download_is_kept_unpacked_and_used_again(mirror, packed, contents, cache):
    server = mirror(packed)
    first = mnist.load(mirrors=[server.url])
    assert len(first.train) == TRAIN
    assert {path.name: path.read_bytes() for path in (cache / "mnist").iterdir() if path.name != ".lock"} == contents
    assert sorted(server.asked) == sorted(packed)

    again = mnist.load(mirrors=[])
    assert again.train.images.equal(first.train.images)
    assert len(server.asked) == len(packed)


def test_only_missing_files_are_fetched(mirror, packed, cache):
    server = mirror(packed)
    mnist.load(mirrors=[server.url])
    (cache / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    server.asked.clear()
    mnist.load(mirrors=[server.url])
    assert server.asked == ["t10k-labels-idx1-ubyte.gz"]


def test_load_uses_the_mirrors_of_the_module(mirror, packed, monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", (mirror(packed).url,))
    assert len(load(DataConfig()).train) == TRAIN


def damaged(body: bytes) -> bytes:
    return body[:3000] + bytes(10) + body[3010:]


BAD = {
    "not there": (lambda body: None, "the server answered 404 Not Found"),
    "truncated": (lambda body: body[:-20], "is truncated: its gzip data ends early"),
    "damaged": (damaged, "is damaged: its gzip data cannot be unpacked"),
    "a web page": (lambda body: b"<html>Please log in</html>", "is damaged: its gzip data cannot be unpacked"),
    "empty": (lambda body: b"", "is truncated"),
    "other content": (lambda body: gzip.compress(gzip.decompress(body)[:-1] + b"\x00"), "holds something else: SHA-256"),
    "a bomb": (lambda body: gzip.compress(bytes(80_000_000)), "unpacks to more than the 9,424 bytes"),
    "endless": (lambda body: body[:100] + gzip.compress(b"")[:10] * 200_000, "the file is"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mirror_is_passed_over(mirror, packed, contents, cache, kind):
    body = BAD[kind][0](packed[IMAGES])
    bad = mirror({IMAGES: body} if body is not None else {})
    good = mirror(packed)
    assert len(mnist.load(mirrors=[bad.url, good.url]).train) == TRAIN
    assert IMAGES in bad.asked
    assert kept(cache) == set(contents)


@pytest.mark.parametrize("kind", BAD)
def test_when_all_fail_each_reason_is_told_and_nothing_is_left(mirror, packed, cache, kind, dead_url):
    damage, reason = BAD[kind]
    body = damage(packed[IMAGES])
    bad = mirror({IMAGES: body} if body is not None else {})
    with pytest.raises(DataError) as caught:
        mnist.load(mirrors=[bad.url, dead_url])
    text = str(caught.value)
    assert f"{bad.url}{IMAGES}: " in text
    assert reason in text
    assert f"{dead_url}{IMAGES}: Connection refused" in text
    for advice in ("LAB_DATA", "--data.root", "--data.name digits"):
        assert advice in text
    assert kept(cache) == set()


def test_a_body_shorter_than_declared_is_truncated(mirror, packed, cache):
    bad = mirror({IMAGES: packed[IMAGES][:500]})
    bad.declared[IMAGES] = len(packed[IMAGES])
    with pytest.raises(DataError, match=r"truncated|IncompleteRead"):
        mnist.load(mirrors=[bad.url])
    assert kept(cache) == set()


def test_a_server_that_does_not_answer_is_left_in_time(packed, cache, monkeypatch):
    monkeypatch.setattr("lab.data.download.TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(DataError, match=r"no answer within 0.1 s"):
            mnist.load(mirrors=[url])
    assert kept(cache) == set()


def test_files_that_came_before_a_failure_are_kept_whole(mirror, packed, contents, cache):
    last = "t10k-labels-idx1-ubyte.gz"
    server = mirror({name: body for name, body in packed.items() if name != last})
    with pytest.raises(DataError, match=last):
        mnist.load(mirrors=[server.url])
    assert kept(cache) == contents.keys() - {last.removesuffix(".gz")}


def test_a_failed_write_leaves_nothing_and_says_where(mirror, packed, cache, monkeypatch):
    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        mnist.load(mirrors=[mirror(packed).url])
    assert kept(cache) == set()


def test_a_cache_that_cannot_be_made_says_what_else(tmp_path, contents, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DREAMPLAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written .*DREAMPLAY_CACHE"):
        mnist.load(mirrors=["http://127.0.0.1:1/"])


def test_an_explicit_root_never_downloads(mirror, packed, root):
    server = mirror(packed)
    with pytest.raises(DataError, match="no MNIST in"):
        mnist.load(str(root), mirrors=[server.url])
    assert server.asked == []


def test_two_loads_at_once_fetch_once(mirror, packed):
    server = mirror(packed)
    sizes: list[int] = []
    threads = [threading.Thread(target=lambda: sizes.append(len(mnist.load(mirrors=[server.url]).train))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [TRAIN] * 3
    assert len(server.asked) == len(packed)
