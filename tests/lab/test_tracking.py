"""The real wandb, offline and against a stand-in for its server; every run in a process of its own, as in life."""

import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from lab.config import UserError
from lab.tracking import TrackingConfig, resolved_mode

CANARY = "canary0" * 6
IDENTITY = "abc123"

WORKER = """
import json, logging, os, sys
from pathlib import Path
from lab.config import UserError
from lab.tracking import Tracker, TrackingConfig, replay

logging.basicConfig(format="%(message)s", stream=sys.stdout)
folder, upto, ending, config = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
config["tags"] = tuple(config.get("tags", ()))
log, planned = folder / "metrics.jsonl", (folder / "planned.jsonl").read_text().splitlines(keepends=True)
about = dict(identity="abc123", name="a name", group="a group", settings={"trainer": {"steps": 30}, "optimizer.lr": 1e-4},
             axes={"*": "step", "rollout/*": "env/frames"})
if ending == "replay":
    print(replay(folder, TrackingConfig(**config), **about, summary={"eval/best": 1.5}).rows)
    sys.exit()
tracker = Tracker.start(TrackingConfig(**config), folder, **about)
done = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    for line in planned[done:upto]:
        file.write(line)
        tracker.log(json.loads(line))
        if ending == "lose W&B":
            tracker.log({1: "a key that is no text makes wandb raise"})
if ending == "kill":
    os._exit(9)
tracker.summarise({"eval/best": 1.5, "media/samples": "media/one.png"})
tracker.finish()
"""


def clean_environment(home):
    """No setting or key of whoever runs the tests, and a home folder that must stay empty."""
    home.mkdir(exist_ok=True)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return {**mine, "HOME": str(home), "TMPDIR": str(home)}


def new_folder(parent):
    """A run folder with the 20 rows that its training will log."""
    run = parent / "run"
    (run / "media").mkdir(parents=True)
    for name, colour in (("one.png", "red"), ("two.gif", "blue")):
        Image.new("RGB", (8, 8), colour).save(run / "media" / name)
    (run / "media" / "three.mp4").write_bytes(b"not really a film")
    (run / "planned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in planned_rows()))
    return run


@pytest.fixture
def folder(tmp_path):
    return new_folder(tmp_path)


def planned_rows():
    rows = [{"step": 100 * i, "train/loss": math.exp(-i) / 3, "rollout/return": i - 5.0, "env/frames": 400 * i} for i in range(20)]
    rows[2] |= {"eval/bound": math.nan, "eval/high": math.inf, "eval/low": -math.inf}
    rows[3] |= {"media/samples": "media/one.png", "media/walk": "media/two.gif", "media/film": "media/three.mp4"}
    rows[15] = {"step": 2**53 + 1, "train/loss": 5e-324, "big": 1.7976931348623157e308, "zero": 0.0, "note": "a text"}
    return rows


def train(program, run, upto, ending, environment=None, **config):
    command = [sys.executable, "-c", program, str(run), str(upto), ending, json.dumps(config)]
    variables = clean_environment(run.parent / "home") | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)


def work(run, upto, ending, environment=None, **config):
    """Train up to a row in a process of its own; returns what it printed."""
    done = train(WORKER, run, upto, ending, environment, **config)
    assert (done.returncode, done.stderr) == (9 if ending == "kill" else 0, "")
    return done.stdout


def cut(run, rows):
    """What a resume does: back to the rows that the checkpoint knows of."""
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:rows]))


def offline_directory(run):
    (directory,) = (run / "wandb").glob("*run-*")
    assert directory.name.startswith("offline-run-")
    return directory


def records(run):
    """Every record of the one offline directory, read by wandb's own tool."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(offline_directory(run)), "--json"]
    variables = clean_environment(run.parent / "reader")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(found, kind):
    return [record[kind] for record in found if record["type"] == kind]


def history(found):
    return [{key: value for key, value in row["item"].items() if not key.startswith("_")} for row in of_kind(found, "history")]


def expected(rows):
    """Rows as wandb keeps them: exact, with NaN and infinities as texts; media, which become several keys, left out."""
    special = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return [{key: special.get(str(value), value) for key, value in row.items()} for row in without_media(rows)]


def without_media(rows):
    return [{key: value for key, value in row.items() if not key.startswith("media/")} for row in rows]


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files(directory):
    return [path for path in directory.rglob("*") if not path.is_dir()]


# What lands on the disk


def test_a_run_killed_twice_leaves_one_offline_directory_with_every_row_once(folder):
    work(folder, 7, "kill", mode="offline")
    cut(folder, 5)
    work(folder, 12, "kill", mode="offline")
    cut(folder, 9)
    assert work(folder, 20, "finish", mode="offline") == ""
    found = records(folder)
    assert logged(folder)[4] == planned_rows()[4]
    assert len(logged(folder)) == 20
    assert without_media(history(found)) == expected(logged(folder))
    assert [row["item"]["_step"] for row in of_kind(found, "history")] == list(range(20))
    assert of_kind(found, "exit") == [{"exit_code": 0}]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a finished offline run, and the records that wandb's tool finds in it."""
    run = new_folder(tmp_path_factory.mktemp("recorded"))
    environment = {"WANDB_API_KEY": CANARY, "WANDB_MODE": "online"}
    assert work(run, 20, "finish", environment, mode="offline", project="a project", tags=["a tag"]) == ""
    return run, records(run)


def test_all_that_a_reader_of_the_run_needs_is_recorded(recorded):
    found = recorded[1]
    (run,) = of_kind(found, "run")
    assert (run["run_id"], run["display_name"], run["run_group"], run["project"]) == (IDENTITY, "a name", "a group", "a project")
    assert run["tags"] == ["a tag"]
    assert run["config"]["update"] == {"trainer": {"steps": 30}, "optimizer.lr": 1e-4, "_wandb": {}}
    axes = {metric["glob_name"]: metric["step_metric"] for metric in of_kind(found, "metric") if "glob_name" in metric}
    assert axes == {"*": "step", "rollout/*": "env/frames"}
    summary = {key: value for record in of_kind(found, "summary") for key, value in record["update"].items()}
    assert summary["eval/best"] == 1.5
    assert "media/samples" not in summary


def test_media_are_copied_with_their_hash_in_the_row(recorded):
    folder, found = recorded
    row = history(found)[3]
    for key, name, kind in (("samples", "one.png", "image-file"), ("walk", "two.gif", "image-file"), ("film", "three.mp4", "video-file")):
        content = (folder / "media" / name).read_bytes()
        copy = offline_directory(folder) / "files" / row[f"media/{key}.path"]
        assert copy.read_bytes() == content
        assert not copy.is_symlink()
        assert row[f"media/{key}.sha256"] == hashlib.sha256(content).hexdigest()
        assert row[f"media/{key}._type"] == kind


def test_nothing_is_written_outside_the_run_folder_and_no_key_or_machine_is_in_it(recorded):
    folder, found = recorded
    assert files(folder.parent / "home") == []
    assert not any(CANARY.encode() in path.read_bytes() for path in files(folder))
    assert "host" not in of_kind(found, "run")[0]
    directory = offline_directory(folder)
    log = directory / f"run-{IDENTITY}.wandb"
    assert str(folder.parent).encode() not in log.read_bytes()
    media = {directory / "files" / value for key, value in history(found)[3].items() if key.endswith(".path")}
    assert {path for path in files(directory) if path.parent.name != "logs"} == {log, *media}


def test_a_medium_that_cannot_be_shown_is_left_out_with_a_warning(folder):
    for name in ("media/broken.png", "media/notes.txt"):
        (folder / name).write_text("no image")
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    paths = ["media/missing.png", "media/broken.png", "../secret.png", "media/notes.txt"]
    rows = [{"step": step, "media/samples": path, "train/loss": 0.5} for step, path in enumerate(paths)]
    (folder / "planned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = work(folder, 4, "finish", mode="offline").splitlines()
    assert [line.partition(":")[0] for line in said] == [f"W&B is sent no {path}" for path in paths]
    assert history(records(folder)) == without_media(rows)


# Failures


def test_a_failure_of_wandb_is_one_warning_and_the_run_goes_on(folder):
    said = work(folder, 20, "lose W&B", mode="offline")
    assert said.startswith("W&B failed and is off; the run goes on")
    assert said.count("\n") == 1
    assert len(logged(folder)) == 20


def test_the_death_of_wandbs_own_process_is_one_warning_and_the_run_goes_on(folder):
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc to find the process")
    program = WORKER.replace("tracker.summarise", "kill_children()\nfor _ in range(500): tracker.log({'step': 1})\ntracker.summarise")
    killer = """
def kill_children():
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), 9)
"""
    done = train(killer + program, folder, 3, "finish", mode="offline")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("W&B failed and is off; the run goes on")


def test_without_a_server_an_online_run_is_recorded_offline(folder):
    environment = {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    said = work(folder, 20, "finish", environment, mode="online", init_timeout=0.5)
    assert said.startswith("W&B is not reachable, so this process records offline")
    assert said.count("\n") == 1
    assert without_media(history(records(folder))) == expected(planned_rows())
    assert not any(CANARY.encode() in path.read_bytes() for path in files(folder))


def test_a_disabled_tracker_does_not_even_import_wandb(folder):
    assert train(WORKER + "print('wandb' in sys.modules)", folder, 20, "finish", mode="disabled").stdout == "False\n"
    assert not (folder / "wandb").exists()


# Replay


def test_replaying_offline_twice_makes_one_complete_directory(folder):
    (folder / "planned.jsonl").rename(folder / "metrics.jsonl")
    (folder / "planned.jsonl").touch()
    rows = logged(folder)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 12')  # the kill came here
    for _ in range(2):
        assert work(folder, 0, "replay", mode="offline") == "20\n"
    assert without_media(history(records(folder))) == expected(rows)


def test_replay_refuses_a_damaged_log_and_names_the_line(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1}\n[1]\n')
    done = train(WORKER, folder, 0, "replay", mode="offline")
    assert done.stderr.splitlines()[-1] == f"lab.config.UserError: {folder / 'metrics.jsonl'}:2: expected a JSON object, found '[1]\\n'"


class Server(ThreadingHTTPServer):
    """As much of W&B's server as one run needs: it keeps the rows and refuses any that do not follow the last one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows, self.made, self.complaints, self.seen = [], False, [], b""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that ends with its connection open is no error."""

    def answer(self, path, body):
        self.seen += body
        if path.endswith("/file_stream"):
            return self.take_rows(json.loads(body)["files"].get("wandb-history.jsonl") if b'"files"' in body else None)
        query = json.loads(body) if path == "/graphql" else {}
        return {"data": getattr(self, query.get("operationName", ""), lambda _: {})(query.get("variables"))}

    def take_rows(self, chunk):
        if chunk and chunk["offset"] != len(self.rows):
            self.complaints.append(f"rows from {chunk['offset']} on, but there are {len(self.rows)}")
        self.rows += map(json.loads, chunk["content"]) if chunk else []
        return {}

    def project(self):
        return {"id": "P", "name": "dreamplay", "entity": {"id": "E", "name": "me"}}

    def bucket(self):
        tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
        lines = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(self.rows), "historyTail": tail, "eventsTail": "[]"}
        return {"id": "R", "name": IDENTITY, "config": "{}", "summaryMetrics": "{}", "wandbConfig": '{"t": 1}', **lines}

    def RunResumeStatus(self, _):
        return {"model": {**self.project(), "bucket": self.bucket() if self.made else None}}

    def UpsertBucket(self, _):
        self.made = True
        return {"upsertBucket": {"bucket": {**self.bucket(), "project": self.project()}, "inserted": True}}

    def CreateRunFiles(self, variables):
        addresses = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": addresses}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def on_server(server):
    rows = sorted(server.rows, key=lambda row: row["_step"])
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def test_online_a_resumed_run_and_two_replays_leave_every_row_once_on_the_server(folder, server):
    environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": CANARY}
    (folder / "wandb" / "offline-run-20260101_000000-abc123").mkdir(parents=True)
    assert work(folder, 12, "finish", environment) == ""
    assert len(server.rows) == 12
    cut(folder, 9)  # the server is ahead of the checkpoint
    assert work(folder, 15, "finish", environment) == ""
    (folder / "planned.jsonl").rename(folder / "metrics.jsonl")
    (folder / "planned.jsonl").touch()
    assert work(folder, 0, "replay", environment, mode="offline") == "20\n"
    assert work(folder, 0, "replay", environment) == "5\n"
    assert work(folder, 0, "replay", environment) == "0\n"
    assert server.complaints == []
    assert expected(on_server(server)) == expected(planned_rows())
    assert (folder / "media" / "one.png").read_bytes() in server.seen
    assert str(folder).encode() not in server.seen
    assert [path.name.partition("-")[0] for path in (folder / "wandb").glob("*run-*")] == ["run"]
    assert not any(CANARY.encode() in path.read_bytes() for path in files(folder))


# The mode

HOSTS = {"": "", "hosted": "machine api.wandb.ai", "forge": "machine api.forge.coreweave.com", "own": "machine wandb.example:8080"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, and an environment that says nothing of W&B."""
    for name in [*(name for name in os.environ if name.startswith("WANDB_")), "NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "host", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": CANARY}, "", "online"),
        ({"WANDB_API_KEY": ""}, "", "offline"),
        ({}, "hosted", "online"),
        ({}, "forge", "online"),
        ({}, "own", "offline"),
        ({"WANDB_BASE_URL": "http://wandb.example:8080/"}, "own", "online"),
        ({"WANDB_BASE_URL": "http://wandb.example:8080"}, "hosted", "offline"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": CANARY}, "", "offline"),
        ({"WANDB_MODE": "dryrun", "WANDB_API_KEY": CANARY}, "", "offline"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": CANARY}, "", "disabled"),
        ({"WANDB_MODE": "online"}, "hosted", "online"),
    ],
)
@pytest.mark.parametrize("place", [".netrc", "_netrc", "elsewhere"])
def test_auto_goes_online_only_where_a_key_is_configured(environment, host, mode, place, home, monkeypatch):
    entries = home / place
    entries.write_text(f"{HOSTS[host]} login user password {CANARY}\n" if host else "")
    entries.chmod(0o600)
    for name, value in {**environment, **({"NETRC": str(entries)} if place == "elsewhere" else {})}.items():
        monkeypatch.setenv(name, value)
    assert resolved_mode(TrackingConfig()) == mode


@pytest.mark.parametrize("content", [b"machine", b"\xff\xfe", b"machine api.wandb.ai login user\n"])
def test_a_netrc_without_a_usable_key_is_no_key(content, home):
    (home / ".netrc").write_bytes(content)
    (home / ".netrc").chmod(0o600)
    assert resolved_mode(TrackingConfig()) == "offline"


def test_a_mode_in_the_settings_beats_the_environment(home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert [resolved_mode(TrackingConfig(mode=mode)) for mode in ("online", "offline", "disabled")] == ["online", "offline", "disabled"]


def test_online_without_a_key_says_what_to_do(home, monkeypatch):
    with pytest.raises(UserError, match=r"needs an API key: run `wandb login` or set WANDB_API_KEY, or choose --tracking\.mode offline"):
        resolved_mode(TrackingConfig(mode="online"))
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE=shared: expected one of online, offline, disabled"):
        resolved_mode(TrackingConfig())
