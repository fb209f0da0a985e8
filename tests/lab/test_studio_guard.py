"""Who may talk to the studio, asked of a real one over real sockets."""

import base64
import http.client
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..ui.conftest import ROOT, SCRIPT, Served, environment, free_port, reachable, serve, wait_until

TOKEN = "correct horse"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    studio = serve(tmp_path_factory.mktemp("runs"))
    yield studio
    studio.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    studio = serve(tmp_path_factory.mktemp("runs"), "--host", "0.0.0.0", "--token", TOKEN)
    yield studio
    studio.stop()


def port(studio: Served) -> int:
    return int(studio.url.rpartition(":")[2])


def ask(studio: Served, path: str = "/", **headers: str) -> http.client.HTTPResponse:
    """The answer to a request with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port(studio), timeout=30)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{port(studio)}", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


def greet(studio: Served, **headers: str) -> int:
    """The status of the answer to the first words of a WebSocket: 101 opens it."""
    key = base64.b64encode(os.urandom(16)).decode()
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13"}
    return ask(studio, "/_nicegui_ws/socket.io/?EIO=4&transport=websocket", **upgrade, **headers).status


def test_it_listens_to_this_machine_alone(local: Served) -> None:
    assert ask(local).status == 200
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]] if Path("/proc/net/tcp").exists() else []
    ours = [words[1] for words in listening if words[3] == "0A" and int(words[1].partition(":")[2], 16) == port(local)]
    assert all(address.startswith("0100007F:") for address in ours)


@pytest.mark.parametrize("host", ["evil.example:8765", "127.0.0.1.evil.example", "192.0.2.1", "", "[", "localhost@evil.example"])
def test_another_name_for_this_machine_is_refused(local: Served, host: str) -> None:
    """DNS rebinding: a page on the internet whose name suddenly means 127.0.0.1."""
    answer = ask(local, Host=host)
    assert answer.status in (400, 403)


def test_its_own_names_are_known(local: Served) -> None:
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert ask(local, Host=f"{host}:{port(local)}").status == 200


def test_requests_from_other_pages_are_refused(local: Served) -> None:
    own = f"http://127.0.0.1:{port(local)}"
    assert ask(local, Origin=own).status == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port(local) + 1}", f"{own}.evil.example"):
        assert ask(local, Origin=origin).status == 403, origin


def test_sockets_from_other_pages_are_refused(local: Served) -> None:
    own = f"http://127.0.0.1:{port(local)}"
    assert greet(local, Origin=own) == 101
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port(local) + 1}"):
        assert greet(local, Origin=origin) == 403, origin
    assert greet(local, Origin=own, Host="evil.example") == 403


def test_answers_forbid_other_hosts_and_frames(local: Served) -> None:
    headers = ask(local).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http:" not in policy
    assert headers["x-content-type-options"] == "nosniff"


# With a token


def test_other_machines_need_a_token_before_it_starts_at_all(tmp_path: Path) -> None:
    for words in (["--host", "0.0.0.0"], ["--host", "192.0.2.1", "--token", "short"]):
        command = [sys.executable, SCRIPT, "--runs", str(tmp_path), "--port", str(free_port()), "--no-browser", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "--token" in done.stderr
        assert "Traceback" not in done.stderr


def test_without_the_token_nothing_is_told(shared: Served) -> None:
    for path in ("/", "/run/a/b", "/media/a/b/c.png", "/?token=wrong", "/?token=", "/_nicegui/3.18.0/static/nicegui.js"):
        answer = ask(shared, path)
        assert answer.status == 403, path
        assert b"token" in answer.read()
    assert ask(shared, Cookie="dreamplay_token=wrong").status == 403
    assert greet(shared) == 403
    assert greet(shared, Cookie="dreamplay_token=wrong") == 403


def test_the_token_opens_and_is_kept_in_a_cookie(shared: Served) -> None:
    first = ask(shared, "/?token=correct%20horse")
    assert first.status == 200
    cookie = first.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict"} <= {word.strip() for word in cookie.split(";")}
    kept = cookie.partition(";")[0]
    assert ask(shared, Cookie=kept).status == 200
    own = f"http://127.0.0.1:{port(shared)}"
    assert greet(shared, Cookie=kept, Origin=own) == 101
    assert greet(shared, Cookie=kept, Origin="http://evil.example") == 403


def test_the_printed_address_opens_it(shared: Served) -> None:
    wait_until(lambda: shared.lines, "the address is printed")
    assert shared.lines[0].strip().endswith(f":{port(shared)}/?token=correct%20horse")


def test_a_taken_port_is_told(local: Served, tmp_path: Path) -> None:
    assert reachable(port(local))
    command = [sys.executable, SCRIPT, "--runs", str(tmp_path), "--port", str(port(local)), "--no-browser"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"127.0.0.1:{port(local)}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
