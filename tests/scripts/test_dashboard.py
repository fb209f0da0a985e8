"""scripts/dashboard.py: the views that it makes of real runs, shown offline and sent to a stand-in for W&B's server."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.test_scripts import ROOT

KEY = "canary0" * 6
ROWS = {
    "dqn": [
        {"step": 50, "train/loss": 1.0, "train/q": 2.0, "frames": 9},
        {"step": 99, "eval/return": 3.0, "media/play": "media/play.mp4"},
    ],
    "vae": [{"step": 50, "train/loss": 1.0, "rollout/x": 1.0}],
}


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    environment = {**mine, "HOME": str(folder / "home"), "COLUMNS": "100", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(ROOT / "scripts/dashboard.py"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of an agent, one of a VAE and one whose metrics are damaged."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "home").mkdir()
    for kind, rows in ROWS.items():
        (folder / f"runs/{kind}/a").mkdir(parents=True)
        (folder / f"runs/{kind}/a/config.yaml").write_text(f"experiment: {kind}\n")
        (folder / f"runs/{kind}/a/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "runs/gan/a").mkdir(parents=True)
    (folder / "runs/gan/a/config.yaml").write_text("experiment: gan\n")
    (folder / "runs/gan/a/metrics.jsonl").write_text("not JSON\n")
    return folder


def test_without_an_account_the_views_are_shown(lab: Path) -> None:
    done = run(lab, "teaching")
    assert (done.returncode, done.stderr) == (0, "")
    shown = [line.strip("│├└─ ") for line in done.stdout.splitlines()]
    assert shown == [
        "project teaching",
        "view vae: Config(\"experiment\") == 'vae', grouped by group",
        "train",
        "curve of train/loss over step",
        "rollout",
        "curve of rollout/x over step",
        "speed (closed)",
        "curve of speed/steps_per_second over step",
        "settings (closed)",
        "run comparer: what differs",
        "view dqn: Config(\"experiment\") == 'dqn', grouped by group",
        "eval",
        "curve of eval/return over frames",
        "train",
        "curve of train/loss over updates",
        "curve of train/q over frames",
        "speed (closed)",
        "curve of speed/steps_per_second over frames",
        "media",
        "pictures of media/play",
        "settings (closed)",
        "run comparer: what differs",
        "nothing was sent: there is no API key, or WANDB_MODE forbids it; these are the views that would be made",
    ]


def test_kinds_without_runs_have_a_panel_for_every_group_of_metrics(lab: Path) -> None:
    done = run(lab, "--kinds", "flow")
    assert done.returncode == 0
    assert "curve of train/* over step" in done.stdout
    wrong = run(lab, "--kinds", "flows")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --kinds flows: expected some of autoencoder, ")


class Server(ThreadingHTTPServer):
    """So much of W&B's server as saving a view needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.views: list[dict[str, Any]] = []
        self.authorized: set[bool] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL query."""
        if "upsertView" in query["query"]:
            self.views.append(query["variables"])
            view = {"id": f"V{len(self.views)}", "name": query["variables"]["name"]}
            return {"upsertView": {"view": view, "inserted": True}}
        viewer = {"id": "U", "entity": "me", "username": "me", "email": "", "admin": False, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}}}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        answer = json.dumps({"data": self.server.answer(json.loads(body))}).encode()
        self.server.authorized.add("Authorization" in self.headers)
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_with_an_account_the_views_are_saved_and_the_key_stays_secret(lab: Path, server: Server) -> None:
    done = run(lab, "teaching", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == ["view", "view"]
    assert all(f"{server.url}/me/teaching?nw=" in line for line in done.stdout.splitlines())
    assert [(view["entityName"], view["projectName"], view["displayName"]) for view in server.views] == [
        ("me", "teaching", "vae"),
        ("me", "teaching", "dqn"),
    ]
    section = json.loads(server.views[1]["spec"])["section"]
    assert section["runSets"][0]["filters"]["filters"][0]["key"] == {"section": "config", "name": "experiment"}
    sections = {each["name"]: each["panels"] for each in section["panelBankConfig"]["sections"]}
    panels = {(name, panel["viewType"]): panel["config"] for name, shown in sections.items() for panel in shown}
    curve = panels["eval", "Run History Line Plot"]
    assert (curve["xAxis"], curve["metrics"]) == ("frames", ["eval/return"])
    assert panels["media", "Media Browser"]["mediaKeys"] == ["media/play"]
    assert ("settings", "Run Comparer") in panels
    assert server.authorized == {True}
    assert KEY not in done.stdout
    assert not [path for path in lab.rglob("*") if path.is_file() and KEY in path.read_text(errors="replace")]


@pytest.mark.slow  # wandb itself takes its time to give up
def test_a_server_out_of_reach_is_one_sentence(lab: Path) -> None:
    done = run(lab, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: W&B does not answer (")
    assert done.stderr.count("\n") == 1
