"""Reports: what they tell, that damage stops nothing, and that they load nothing, in a real browser."""

import base64
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lab import panels, report
from lab.config import UserError
from lab.media import Film, save_gif, save_png
from lab.panels import number
from lab.report import MARK, Told, caption, duration, html, named, parameters
from lab.runs import Run

CONFIG = """experiment: vae
name: {name}
trainer:
  steps: {steps}
  seed: {seed}
optimizer:
  lr: {lr}
data:
  name: digits
"""
START = {"time": "2026-11-21T08:00:00+00:00", "dreamplay": "0.1.0", "git": "a" * 40, "changed": False, "python": "3.11", "threads": 2}


def made(folder: Path, *, seed: int = 0, lr: str = "0.001", rows: int = 40, name: str = "vae_digits", shift: float = 0.0) -> Run:
    """A run folder as training leaves it, of real files."""
    run = Run(folder)
    run.media.mkdir(parents=True)
    run.config.write_text(CONFIG.format(name=json.dumps(name), steps=100 * rows, seed=seed, lr=lr))
    with run.metrics.open("w") as metrics, run.timing.open("w") as timing:
        for index in range(1, rows + 1):
            row = {"step": 100 * index, "train/loss": 90 / index + shift, "train/kl": 2.0 * index}
            row |= {"eval/loss": 100 / index, "media/samples": f"media/samples_{100 * index:09d}.png"} if index == rows else {}
            metrics.write(json.dumps(row) + "\n")
            timing.write(json.dumps({"step": 100 * index, "time": 1e9 + 6 * index, "steps_per_second": 100 / 6}) + "\n")
    save_png(run.media / f"samples_{100 * rows:09d}.png", torch.rand(1, 20, 30))
    run.environment.write_text(json.dumps({"id": "x", "starts": [{**START, "torch": "2.13.0"}]}))
    (folder / "command.txt").write_text(f"python scripts/train_vae.py --trainer.seed {seed}\n")
    return run


def text_of(page: str) -> str:
    """What a reader reads, without pictures and markup."""
    plain = re.sub(r"<style>.*?</style>|data:[^\"]*", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", plain))


def film(path: Path) -> None:
    with Film(path, rate=10) as video:
        for shade in range(0, 250, 25):
            video.add(np.full((32, 48, 3), shade, np.uint8))


# What is told


def test_a_run_tells_what_was_trained_how_long_and_with_what(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    place = run.checkpoints / "step_000004000"
    place.mkdir(parents=True)
    save_file({"weight": np.zeros((30, 40)), "bias": np.zeros(7)}, place / "model.safetensors")
    (run.folder / "evaluation.json").write_text(
        json.dumps({"step": 4000, "bits_per_dim": 1.25, "protocol": "1000 test images", "ladder": {}})
    )
    said = text_of(html([run]))
    assert "vae on digits: 4,000 of 4,000 steps (finished), a model of 1,207 parameters, 4 min of training, on a CPU with 2 threads" in said
    assert f"seed 0. Started 2026-11-21 08:00; Dreamplay 0.1.0, commit {'a' * 10}, Python 3.11, PyTorch 2.13.0." in said
    assert "bits per dim 1.25" in said
    assert "How it was judged: 1000 test images." in said
    assert "python scripts/train_vae.py --trainer.seed 0" in said
    assert f"git checkout {'a' * 40}" in said
    assert "optimizer.lr 0.001" in said
    assert "train/loss 2.25 2.25 (step 4,000) 90 (step 100)" in said
    assert "Settings that differ" not in said
    assert 'class="problems"' not in html([run])


def test_a_resumed_run_says_so(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    again = {**START, "time": "2026-11-22T09:30:00+00:00", "changed": True, "gpu": "H100", "processes": 4}
    run.environment.write_text(json.dumps({"starts": [START, START, again]}))
    said = text_of(html([run]))
    assert "on a H100 in 4 processes" in said
    assert "Started 2026-11-21 08:00, resumed 2 times, last 2026-11-22 09:30" in said
    assert "with changes" in said


def test_runs_that_differ_in_their_seed_are_one_curve_with_a_band(tmp_path: Path) -> None:
    runs = [made(tmp_path / str(seed), seed=seed, shift=10.0 * seed) for seed in (1, 2, 3)]
    page = html(runs)
    assert "vae_digits: mean of 3 seeds (1, 2, 3), in a band from the least to the greatest" in text_of(page)
    assert "train/loss 22.25 (12.25 to 32.25) 12.25 22.25 32.25" in text_of(page)
    loss, kl = re.findall(r'<figure class="panel">.*?</figure>', page, re.S)
    assert 'aria-label="loss over step"' in loss
    assert (loss.count('class="band"'), loss.count('class="line'), kl.count('class="line')) == (2, 2, 1)  # training and test
    assert 'class="c0"' in loss
    assert 'class="c1"' not in loss


def test_other_settings_are_told_apart(tmp_path: Path) -> None:
    page = html([made(tmp_path / "a", lr="0.001"), made(tmp_path / "b", lr="0.01", name="faster")])
    assert re.search(r"Settings that differ setting vae_digits faster name vae_digits faster optimizer\.lr 0\.001 0\.01", text_of(page))
    loss = re.findall(r'<figure class="panel">.*?</figure>', page, re.S)[0]
    assert "dashed" in loss
    assert {'class="c0"', 'class="c1"'} <= set(re.findall(r'class="c\d"', loss))


def drawn_points(page: str, name: str) -> np.ndarray:
    """The places (x, y) of the first line of a panel."""
    panel = next(one for one in re.findall(r'<figure class="panel">.*?</figure>', page, re.S) if f"<b>{name}</b>" in one)
    path = re.search(r'class="line" d="([^"]*)"', panel)[1]
    return np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path), float)


def test_a_curve_stands_where_its_values_are(tmp_path: Path) -> None:
    points = drawn_points(html([made(tmp_path / "run")]), "kl")
    assert points.shape == (40, 2)
    across, up = np.arange(1, 41) / 40, 2.0 * np.arange(1, 41)
    np.testing.assert_allclose(points[:, 0], panels.LEFT + across * (panels.RIGHT - panels.LEFT), atol=0.06)
    np.testing.assert_allclose(np.corrcoef(points[:, 1], up)[0, 1], -1, atol=1e-6)
    assert panels.TOP < points[-1, 1] < panels.TOP + 20


def test_long_curves_are_thinned_and_smoothed(tmp_path: Path) -> None:
    run = made(tmp_path / "run", rows=3000)
    page = html([run])
    assert "smoothed over a fiftieth" in text_of(page)
    assert 100 < len(drawn_points(page, "kl")) <= panels.DRAWN
    assert len(page) < 200_000


def test_a_gap_of_numbers_that_are_none_is_seen(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    rows = [json.dumps({"step": step, "train/x": float("nan") if 10 < step < 20 else step}) for step in range(30)]
    run.metrics.write_text("\n".join(rows) + "\n")
    page = html([run])
    path = re.search(r'class="line" d="([^"]*)"', page)[1]
    assert path.count("M") == 2
    assert "nan" not in path


def test_pictures_are_the_newest_of_each_kind_and_what_was_drawn_by_hand(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    for name in ("samples_000000100", "reconstructions_000000200", "curves", "samples", "odd_thing"):
        save_png(run.media / f"{name}.png", torch.rand(1, 8, 8))
    found = {one.caption: one.source for one in Told(run).exhibits}
    assert list(found) == [
        "Samples, after 4,000 steps",
        "Samples",
        "Test images, each above what the model makes of it, after 200 steps",
        "Odd thing",
    ]
    assert base64.b64decode(found["Samples"].partition(",")[2]) == (run.media / "samples.png").read_bytes()


def test_the_newest_film_is_shown_unless_films_are_left_out(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    film(run.media / "play_000000200.mp4")
    assert base64.b64encode((run.media / "play_000000200.mp4").read_bytes()).decode() in html([run])
    assert "video/mp4" not in html([run], films=False)
    save_gif(run.media / "walk.gif", [torch.rand(1, 8, 8) for _ in range(3)], seconds=1)
    assert next(one.caption for one in Told(run).exhibits) == "Walk"


def test_files_that_are_too_large_stay_out_and_are_named(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    with (run.media / "play.mp4").open("wb") as file:
        file.truncate(report.MOST_FILM + 1)
    told = Told(run)
    assert told.problems == ["media/play.mp4 has 8.0 MiB and stays out: a report takes up to 8 MiB of one file."]
    assert len(told.exhibits) == 1
    film(run.media / "earlier.mp4")
    os.utime(run.media / "earlier.mp4", (0, 0))
    assert [one.caption for one in Told(run).exhibits] == ["Earlier", "Samples, after 4,000 steps"]


def test_warnings_of_the_log_are_shown_and_what_goes_well_is_not(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    lines = ["2026-11-21 08:00:00 INFO resuming after an ERROR at step 10", "2026-11-21 08:00:01 WARNING disk <full>"]
    run.log.write_text("\n".join(lines))
    assert Told(run).warnings == lines[1:]
    assert "WARNING disk &lt;full&gt;" in html([run])


# What is damaged or missing


def cut_line(run: Run) -> None:
    run.metrics.write_text(run.metrics.read_text() + '{"step": 4100, "train/lo')


def broken_line(run: Run) -> None:
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([*lines[:3], "{{\n", *lines[3:]]))


def broken_film(run: Run) -> None:
    film(run.media / "play.mp4")
    data = (run.media / "play.mp4").read_bytes()
    (run.media / "play.mp4").write_bytes(data[: len(data) // 2])


def broken_picture(run: Run) -> None:
    path = run.media / "samples_000004000.png"
    path.write_bytes(path.read_bytes()[:200])


def killed(run: Run) -> None:
    import socket

    owner = {"pid": 2**22 - 1, "host": socket.gethostname(), "since": "2026-11-21T08:00:00+00:00"}
    (run.folder / "owner.json").write_text(json.dumps(owner))


BROKEN = {
    "The last line of metrics.jsonl was cut short and is left out.": cut_line,
    "1 line of metrics.jsonl cannot be read: left out.": broken_line,
    "It has recorded no metrics.": lambda run: run.metrics.unlink(),
    "Its config.yaml is missing.": lambda run: run.config.unlink(),
    "Its settings cannot be told: ": lambda run: run.config.write_text("trainer: ["),
    "environment.json is damaged and left out.": lambda run: run.environment.write_text('{"id"'),
    "evaluation.json is damaged and left out.": lambda run: (run.folder / "evaluation.json").write_text("[1]"),
    "media/samples_000004000.png, which the metrics name, is not there.": lambda run: (run.media / "samples_000004000.png").unlink(),
    "media/samples_000004000.png is damaged and left out.": broken_picture,
    "media/play.mp4 is damaged and left out.": broken_film,
    "The run has failed: ": killed,
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_damaged_run_is_told_as_such_and_stops_no_other(tmp_path: Path, sentence: str) -> None:
    run, whole = made(tmp_path / "damaged", name="hurt"), made(tmp_path / "whole", name="sound", lr="0.5")
    BROKEN[sentence](run)
    assert [problem for problem in Told(run).problems if problem.startswith(sentence)]
    assert not Told(whole).problems
    said = text_of(html([run, whole]))
    assert sentence.rstrip() in said
    assert "sound : vae on digits: 4,000 of 4,000 steps (finished)" in said


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b'{"starts": 7}', b'{"starts": [7, null]}', b'{"starts": [{"threads": "x", "git": 3}]}']
)
def test_any_facts_of_an_environment_are_borne(tmp_path: Path, content: bytes) -> None:
    run = made(tmp_path / "run")
    run.environment.write_bytes(content)
    assert "vae on digits" in text_of(html([run]))


@pytest.mark.parametrize("name", ["x" * 5000, "\0", ""])
def test_any_name_of_a_picture_is_borne(tmp_path: Path, name: str) -> None:
    run = made(tmp_path / "run")
    run.metrics.write_text(json.dumps({"step": 1, "train/loss": 1.0, "media/x": name}) + "\n")
    assert "which the metrics name, is not there." in text_of(html([run]))


def test_an_empty_folder_is_a_run_that_tells_nothing(tmp_path: Path) -> None:
    said = text_of(html([Run(tmp_path)]))
    assert "Its config.yaml is missing." in said
    assert "It has recorded no metrics." in said


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    run = made(tmp_path / "run", name="<script>alert(1)</script>")
    run.metrics.write_text(json.dumps({"step": 1, 'train/"><img src=x>': 1.0, "media/x": "../../<b>.png"}) + "\n")
    page = html([run])
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"<script|<img src=x|<b>\.png", page)


def test_what_a_row_names_outside_of_the_run_is_not_read(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    save_png(tmp_path / "secret.png", torch.zeros(1, 4, 4))
    run.metrics.write_text(json.dumps({"step": 1, "train/loss": 1.0, "media/secret": "../secret.png"}) + "\n")
    assert base64.b64encode((tmp_path / "secret.png").read_bytes()).decode() not in html([run])


# In a file


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    page, place = html([made(tmp_path / "run")]), tmp_path / "new" / "report.html"
    report.write("<!doctype html>" + MARK, place)
    report.write(page, place)
    assert place.read_text() == page
    assert list(place.parent.iterdir()) == [place]
    other = tmp_path / "mine.html"
    other.write_text("my own page" * 1000 + MARK)
    with pytest.raises(UserError, match=r"mine\.html is no report and stays as it is"):
        report.write(page, other)
    with pytest.raises(UserError, match="is no report"):
        report.write(page, tmp_path)
    with pytest.raises(UserError, match="cannot be written here"):
        report.write(page, other / "report.html")
    assert other.read_text().startswith("my own page")


# Words


def test_numbers_are_written_as_people_read_them() -> None:
    values = [14000, 14000.0, 0.20501, 1e-5, 1234.567, -3, None, "x", float("nan"), True]
    assert [number(value) for value in values] == ["14,000", "14,000", "0.205", "1e-05", "1,234.57", "-3", "–", "x", "nan", "True"]
    assert [duration(seconds) for seconds in (0.4, 99, 100, 3540, 7500)] == ["0 s", "99 s", "2 min", "59 min", "2 h 5 min"]


def test_captions_are_of_the_files_names() -> None:
    assert named(Path("media/samples_000002000.png")) == ("samples", 2000)
    assert named(Path("media/watch_000000200_seed0.mp4")) == ("watch", 200)
    assert named(Path("media/samples.png")) == ("samples", 0)
    assert caption("odd_thing", 1000) == "Odd thing, after 1,000 steps"


def test_the_marks_of_an_axis_are_round_and_even() -> None:
    for low, high in ((0, 1), (-3.7, 12.2), (0.20, 0.27), (0, 14000), (1e-9, 3e-9)):
        marks = panels.Scale(low, high, 0, 100).marks
        values = np.array([low + place / 100 * (high - low) for place, _ in marks])
        assert 2 <= len(marks) <= 7
        step = np.diff(values)
        np.testing.assert_allclose(step, step[0])
        assert round(step[0] / 10 ** np.floor(np.log10(step[0]) + 1e-9), 6) in (1, 2, 5)
        np.testing.assert_allclose(values / step[0], np.round(values / step[0]), atol=1e-6)


def test_values_beside_an_axis_have_the_decimals_that_tell_them_apart() -> None:
    cases = [((0, 14000), ["0", "5k", "10k"]), ((0.9990, 0.9999), ["0.9990", "0.9992", "0.9994", "0.9996", "0.9998"])]
    cases += [((-0.5, 1.2), ["-0.5", "0", "0.5", "1.0"]), ((0, 4e-7), ["0", "1e-07", "2e-07", "3e-07", "4e-07"])]
    cases += [((1_000_000, 2_100_000), ["1.0M", "1.2M", "1.4M", "1.6M", "1.8M", "2.0M"]), ((-6.5, -3), ["-6", "-5", "-4", "-3"])]
    for (low, high), words in cases:
        assert [word for _, word in panels.Scale(low, high, 0, 1).marks] == words


@pytest.mark.parametrize("values", [[1e308, -1e308], [5e-324, 0.0], [float("inf")] * 3, [float("nan")] * 3, [7.0], [1e16, 1e16 + 2]])
def test_any_numbers_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    run = made(tmp_path / "run")
    run.metrics.write_text("".join(json.dumps({"step": step, "train/x": value}) + "\n" for step, value in enumerate(values)))
    page = html([run])
    assert 'aria-label="x over step"' in page
    assert not re.search(r"[ML \"](nan|-?inf)", "".join(re.findall(r"<svg.*?</svg>", page, re.S)).replace("━ inf", ""))


def test_parameters_of_a_run_without_a_whole_checkpoint_are_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert parameters(run) == 0
    (run.checkpoints / "step_000000002").mkdir(parents=True)
    (run.checkpoints / "step_000000002" / "model.safetensors").write_bytes(b"damaged")
    assert parameters(run) == 0
    (run.checkpoints / "step_000000001").mkdir()
    save_file({"weight": np.zeros((3, 4))}, run.checkpoints / "step_000000001" / "model.safetensors")
    assert parameters(run) == 12


# In a real browser


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two seeds, one of them with a film, and of a damaged run with a hostile name."""
    place = tmp_path_factory.mktemp("reports")
    runs = [
        made(place / "a", seed=1),
        made(place / "b", seed=2, shift=1.0),
        made(place / "c", name="<img src=http://other.host/x>", lr="0.1"),
    ]
    film(runs[1].media / "play_000004000.mp4")
    save_gif(runs[0].media / "walk.gif", [torch.rand(1, 8, 8) for _ in range(3)], seconds=1)
    cut_line(runs[2])
    report.write(html(runs), place / "report.html")
    return place / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_all_of_it_and_asks_for_nothing(chromium: Any, written: Path, width: int, scheme: str) -> None:
    asked, said = [], []
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(written.as_uri())
    page.wait_for_function("[...document.querySelectorAll('video')].every(one => one.readyState >= 2)")
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert said == []
    sizes = page.eval_on_selector_all("img", "all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    assert sorted(sizes) == [[16, 16], [60, 40], [60, 40], [60, 40]]
    assert page.eval_on_selector_all("video", "all => all.map(one => [one.videoWidth, one.videoHeight])") == [[48, 32]]
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")
    page.close()


def test_pointing_at_a_curve_tells_its_values(chromium: Any, written: Path) -> None:
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(written.as_uri())
    panel = page.locator(".panel", has_text="kl")
    told = panel.locator(".told text")
    assert not [index for index in range(told.count()) if told.nth(index).is_visible()]
    panel.locator(".hit").nth(19).hover()
    shown = [index for index in range(told.count()) if told.nth(index).is_visible()]
    assert shown == [19]
    assert told.nth(19).text_content() == "step 2,000━ 40━ 40"
    page.close()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and what it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_the_page_forbids_itself_the_network(chromium: Any, written: Path, server: tuple[str, list[str]], tmp_path: Path) -> None:
    """Even if something got in that asks for more, nothing leaves."""
    address, asked = server
    (tmp_path / "plain.html").write_text("<!doctype html><body>")
    page = chromium.new_page()
    for place, expected in ((tmp_path / "plain.html", ["/x.png"]), (written, [])):
        page.goto(place.as_uri())
        page.evaluate(
            "src => document.body.append(Object.assign(new Image(), {src, onerror() { this.id = 'refused' }}))", f"{address}/x.png"
        )
        page.wait_for_selector("#refused", state="attached")
        assert [path for path in asked if path == "/x.png"] == expected
        asked.clear()
    page.close()


def test_a_report_prints_whole_curves(chromium: Any, written: Path) -> None:
    page = chromium.new_page(color_scheme="dark")
    page.goto(written.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".hover").first.is_visible()
    assert page.pdf().startswith(b"%PDF")
    page.close()
