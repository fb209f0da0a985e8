"""The Runs part in a real browser: the table, a run that is followed, stopped and resumed, and runs compared."""

import http.client
import json
import os
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import torch

from lab import media

from .conftest import Browsing, Served, overflow, serve
from .run_pages import curve, line, wait_for_other_line, write_run

RATES = {"vae_slow/a": "0.0001", "vae_fast/a": "0.01"}
SIZES = pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])


@pytest.fixture(scope="module")
def shelf(studio: Served) -> Served:
    """A studio with runs of every state but a running one."""
    write_run(studio.root / "vae_slow" / "a", 40, optimizer__lr=RATES["vae_slow/a"])
    write_run(studio.root / "vae_fast" / "a", 20, optimizer__lr=RATES["vae_fast/a"])
    for seed in "123":
        write_run(studio.root / "vae_seeds" / f"seed{seed}", 40 + int(seed), trainer__seed=seed)
    dead = write_run(studio.root / "vae_dead" / "a", 5)
    owner = {"pid": 2**22 - 1, "host": os.uname().nodename, "since": "2026-11-21T08:00:00+00:00"}
    (dead.folder / "owner.json").write_text(json.dumps(owner))
    damaged = write_run(studio.root / "vae_damaged" / "a", 5)
    damaged.config.write_bytes(b"experiment: vae\ntrainer: [}\xff")
    damaged.metrics.write_text('{"step": 10, "train/loss": 3.5}\n{"step": \nnull\n')
    damaged.environment.write_text("{")
    (damaged.media / "samples_000000100.png").write_bytes(b"no picture")
    return studio


def names(page) -> list[str]:
    """The runs in the table, from top to bottom."""
    return page.locator(".runs-name a").evaluate_all("links => links.map(link => link.firstChild.textContent)")


def wait_for_names(page, wanted: list[str]) -> None:
    page.wait_for_function(
        "wanted => JSON.stringify([...document.querySelectorAll('.runs-name a')].map(a => a.firstChild.textContent)) === wanted",
        arg=json.dumps(wanted, separators=(",", ":")),
    )


# The table


def test_the_table_tells_how_every_run_stands(shelf: Served, page) -> None:
    page.goto(shelf.url)
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="vae_slow"))
    for text in ("finished", "400 of 400", "50.5", "eval/bound", "vae"):
        assert text in row.inner_text()
    assert row.get_by_role("progressbar").get_attribute("aria-valuenow") == "100"
    for name, state in {"vae_fast": "stopped", "vae_dead": "failed", "vae_damaged": "damaged"}.items():
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name=name))
        assert state in row.inner_text()
        assert row.locator(".state i").inner_text()  # an icon, so that it is not told by a colour alone
    assert "is gone" in page.locator("td.runs-state .failed").first.get_attribute("title")


def test_search_filter_and_sort(shelf: Served, page) -> None:
    page.goto(shelf.url)
    page.get_by_label("Search runs").fill("vae seed2")
    wait_for_names(page, ["vae_seeds"])
    page.get_by_label("Search runs").fill("nowhere")
    page.get_by_text("No run fits this search.").wait_for()
    page.get_by_label("Search runs").fill("")
    page.get_by_label("State", exact=True).select_option("finished")
    page.get_by_role("button", name="Run").click()
    wait_for_names(page, ["vae_seeds", "vae_seeds", "vae_seeds", "vae_slow"])
    page.get_by_role("button", name="Run").click()
    wait_for_names(page, ["vae_slow", "vae_seeds", "vae_seeds", "vae_seeds"])
    page.get_by_label("State", exact=True).select_option("")
    page.get_by_role("button", name="Progress").click()
    assert names(page)[-2:] in (["vae_damaged", "vae_dead"], ["vae_dead", "vae_damaged"])
    assert page.get_by_role("columnheader", name="Progress").get_attribute("aria-sort") == "descending"


def test_a_run_that_appears_disturbs_neither_search_nor_choice(shelf: Served, page) -> None:
    page.goto(shelf.url)
    page.get_by_label("Search runs").fill("vae_")
    page.get_by_label("Select vae_slow/a").check()
    page.get_by_role("button", name="Duration").click()
    before = len(names(page))
    write_run(shelf.root / "vae_later" / "a", 3)
    page.get_by_role("link", name="vae_later").wait_for()
    assert len(names(page)) == before + 1
    assert page.get_by_label("Select vae_slow/a").is_checked()
    assert page.get_by_label("Search runs").input_value() == "vae_"
    assert page.get_by_role("columnheader", name="Duration").get_attribute("aria-sort") == "descending"


def test_the_keyboard_reaches_a_run(shelf: Served, page) -> None:
    page.goto(shelf.url)
    page.get_by_label("Search runs").focus()
    page.keyboard.type("vae_slow")
    wait_for_names(page, ["vae_slow"])
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.runs-name a')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/run/vae_slow/a")
    page.get_by_role("heading", name="vae_slow/a").wait_for()


def test_an_empty_folder_says_how_to_make_a_run(tmp_path: Path, page) -> None:
    empty = serve(tmp_path)
    try:
        page.goto(empty.url)
        page.get_by_text("python scripts/train_vae.py --data.name digits").wait_for()
        write_run(tmp_path / "first" / "a", 3)
        page.get_by_role("link", name="first").wait_for()
        assert not page.get_by_text("python scripts/train_vae.py --data.name digits").is_visible()
    finally:
        page.goto("about:blank")
        empty.stop()


# A run


def test_curves_follow_the_tools(shelf: Served, page) -> None:
    page.goto(f"{shelf.url}/run/vae_slow/a")
    smooth = line(page, "train/loss")
    assert curve(page, "train/loss").locator('path[stroke-opacity="0.3"]').count() == 1  # what was recorded, pale
    assert curve(page, "eval/bound").locator('path[stroke-opacity="0.3"]').count() == 0  # four points are not smoothed
    titles = page.locator(".curve-title").all_inner_texts()
    assert titles == ["train/loss", "train/kl", "eval/bound"]
    page.get_by_role("slider", name="Smoothing").locator("[tabindex]").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    raw = wait_for_other_line(page, "train/loss", smooth)
    page.get_by_role("switch", name="log scale").click()
    logarithmic = wait_for_other_line(page, "train/loss", raw)
    page.get_by_role("button", name="time").click()
    curve(page, "train/loss").get_by_text("seconds").wait_for()
    assert line(page, "train/loss") == logarithmic  # steps were done evenly, so only the numbers below change
    assert curve(page, "train/loss").get_by_text("40", exact=True).count() == 1


def test_hovering_tells_values(shelf: Served, page) -> None:
    page.goto(f"{shelf.url}/run/vae_slow/a")
    line(page, "eval/bound")
    curve(page, "eval/bound").scroll_into_view_if_needed()
    box = curve(page, "eval/bound").locator(".nicegui-echart").bounding_box()
    page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + box["height"] / 2)
    page.locator(".curve-tip").get_by_text("50.500").wait_for()


def test_pictures_settings_log_and_command(shelf: Served, page) -> None:
    page.goto(f"{shelf.url}/run/vae_slow/a")
    page.get_by_role("tab", name="Media").click()
    picture = page.get_by_role("img", name="samples, step 200")
    picture.wait_for()
    page.wait_for_function("document.querySelector('.media img').naturalWidth === 16")
    page.locator(".media").get_by_role("slider").locator("[tabindex]").focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("img", name="samples, step 100").wait_for()
    media.save_png(shelf.root / "vae_slow" / "a" / "media" / "other_000000300.png", torch.zeros(1, 8, 8))
    page.get_by_role("img", name="other, step 300").wait_for()

    page.get_by_role("tab", name="Settings").click()
    page.get_by_label("Search settings").fill("optimizer.lr")
    page.get_by_role("cell", name=RATES["vae_slow/a"], exact=True).wait_for()
    assert page.locator(".settings tbody tr").count() == 1

    page.get_by_role("tab", name="Log").click()
    page.get_by_text("Nothing was said on the way").wait_for()
    with (shelf.root / "vae_slow" / "a" / "log.txt").open("a") as file:
        file.write("".join(f"line {number} <b>bold</b>\n" for number in range(600)))
    page.get_by_text("line 599 <b>bold</b>").wait_for()
    assert page.get_by_label("Log").locator(":scope *").filter(has_text=re.compile("^line 9[89] ")).count() == 0
    page.get_by_role("button", name="Copy the command").click()
    page.get_by_text("Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".run-command").inner_text()


def test_a_report_is_handed_out(shelf: Served, page, tmp_path: Path) -> None:
    page.goto(f"{shelf.url}/run/vae_slow/a")
    with page.expect_download() as download:
        page.get_by_role("button", name="Report").click()
    download.value.save_as(tmp_path / "report.html")
    assert download.value.suggested_filename == "report.html"
    assert 'content="dreamplay report' in (tmp_path / "report.html").read_text()


def test_damaged_and_dead_runs_are_shown_as_such(shelf: Served, browsing: Browsing) -> None:
    page = browsing.page()
    page.goto(f"{shelf.url}/run/vae_damaged/a")
    page.get_by_role("status").get_by_text("damaged").wait_for()
    page.get_by_text("2 damaged lines of metrics are left out.").wait_for()
    curve(page, "train/loss").wait_for()
    page.get_by_role("tab", name="Settings").click()
    page.get_by_role("alert").filter(has_text="config.yaml").last.wait_for()
    page.get_by_role("tab", name="Media").click()
    page.get_by_role("img", name="samples, step 200").wait_for()
    page.goto(f"{shelf.url}/run/vae_dead/a")
    page.get_by_role("status").get_by_text("failed").wait_for()
    page.get_by_text("is gone: killed").wait_for()
    assert page.get_by_role("button", name="Resume").is_visible()
    assert not page.get_by_role("button", name="Stop").is_visible()


def raw(studio: Served, path: str) -> tuple[int, str]:
    """The status and the text of an answer to exactly this path, which a browser would tidy up first."""
    connection = http.client.HTTPConnection(urlsplit(studio.url).netloc, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.parametrize(
    "path", ["/run/no/such", "/run/%2e%2e/etc", "/run/vae_slow/%2e%2e", "/run/vae_slow/%2e%2e%5ca", "/compare?runs=../etc"]
)
def test_a_name_that_is_no_run_gets_a_sentence(shelf: Served, path: str) -> None:
    status, text = raw(shelf, path)
    assert status == 200
    assert "no run" in text


@pytest.mark.parametrize(
    "path", ["/run/../../etc/passwd", "/run/..%2f..%2f..%2fetc/passwd", "/run//etc/passwd", "/media/../../../../etc/passwd"]
)
def test_a_path_that_leads_elsewhere_leads_nowhere(shelf: Served, path: str) -> None:
    status, text = raw(shelf, path)
    assert status == 404
    assert "root:" not in text


def test_only_listed_media_are_served(shelf: Served, browsing: Browsing) -> None:
    folder, context = shelf.root / "vae_slow" / "a", browsing.page().context
    outside = shelf.root.parent / "secret.png"
    outside.write_bytes(b"secret")
    (folder / "media" / "link.png").symlink_to(outside)
    (folder / "media" / "page.html").write_text("<script>alert(1)</script>")
    good = context.request.get(f"{shelf.url}/media/vae_slow/a/samples_000000100.png")
    assert (good.status, good.headers["content-type"], good.headers["x-content-type-options"]) == (200, "image/png", "nosniff")
    assert good.body() == (folder / "media" / "samples_000000100.png").read_bytes()
    for name in (
        "link.png",
        "page.html",
        "../config.yaml",
        "..%2fconfig.yaml",
        "%2e%2e%2f%2e%2e%2f%2e%2e%2fsecret.png",
        quote(str(outside), safe=""),
    ):
        assert context.request.get(f"{shelf.url}/media/vae_slow/a/{name}").status == 404, name


# Several runs


def test_compare_marks_what_differs(shelf: Served, page) -> None:
    page.goto(shelf.url)
    page.get_by_label("Select vae_slow/a").check()
    page.get_by_label("Select vae_fast/a").check()
    page.get_by_role("link", name="Compare 2").click()
    page.get_by_text("2 runs compared").wait_for()
    keys = page.locator(".settings tbody td:first-child")
    keys.first.wait_for()
    assert keys.all_inner_texts() == ["optimizer.lr"]
    row = page.get_by_role("row").filter(has_text="optimizer.lr")
    shown = dict(zip(page.locator(".settings th").all_inner_texts(), row.get_by_role("cell").all_inner_texts()))
    assert {name: shown[name] for name in RATES} == RATES
    page.get_by_label("show all settings").check()
    page.get_by_role("cell", name="trainer.seed").wait_for()
    assert page.locator(".settings tr.differs").count() == 1
    assert "differs" in page.locator(".settings tr.differs").inner_text()
    strokes = curve(page, "train/loss").locator('path[fill="none"][stroke-width="2"]')
    assert len({stroke.get_attribute("stroke") for stroke in strokes.all()}) == 2


def test_seeds_are_a_band_until_they_are_taken_apart(shelf: Served, page) -> None:
    page.goto(f"{shelf.url}/compare?runs=" + ",".join(f"vae_seeds/seed{seed}" for seed in "123"))
    page.locator(".legend").get_by_text("vae_seeds, 3 seeds").wait_for()
    lines = curve(page, "train/loss").locator('path[fill="none"][stroke-width="2"]')
    area = curve(page, "train/loss").locator('path[fill-opacity="0.2"]')
    lines.first.wait_for(state="attached")
    assert (lines.count(), area.count()) == (1, 1)
    page.get_by_role("switch", name="seeds as a band").click()
    page.locator(".legend").get_by_text("vae_seeds/seed3").wait_for()
    page.wait_for_function(
        """() => document.querySelectorAll('figure[aria-label="Curve of train/loss"] path[fill="none"][stroke-width="2"]').length === 3"""
    )
    assert area.count() == 0


@SIZES
def test_nothing_is_wider_than_the_window(shelf: Served, browsing: Browsing, width: int, dark: bool) -> None:
    page = browsing.page(width, dark)
    for path, sign in {
        "/": ".runs-name a",
        "/run/vae_slow/a": ".curve svg path",
        "/compare?runs=vae_slow/a,vae_fast/a,vae_seeds/seed1": ".curve svg path",
    }.items():
        page.goto(shelf.url + path)
        page.locator(sign).first.wait_for(state="attached")
        assert overflow(page) <= 0, path
        assert dark == page.evaluate("document.body.classList.contains('body--dark')")
