"""The Watch page in a real browser: an agent plays, and people look, change who plays, take over and keep a video."""

import json
import shutil

import pytest
from imageio_ffmpeg import count_frames_and_secs

from tests.ui.conftest import overflow, trained

STAMP = "20260101-000000-abcdef"
WORDS = """train_dqn.py --game.name catch --game.stack 2 --dqn.backbone small --dqn.hidden 16 --trainer.steps 6 --trainer.save-every 6
    --dqn.learning-starts 64 --dqn.batch-size 16 --optimizer.lr 0.01 --replay.capacity 2000 --test.video-every 0 --test.games 1
    --trainer.threads 1 --trainer.milestones 3"""
PADDLE = """() => {
  const game = document.querySelector(".watch-game"), pen = game.getContext("2d"), found = [];
  for (let column = 0; column < 12; column++) {
    const [red, green, blue] = pen.getImageData(14 * column + 7, 14 * 11 + 7, 1, 1).data;
    if (red === 96 && green === 205 && blue === 255) found.push(column);
  }
  return found;
}"""
"""The columns of Catch that the paddle covers, as they are drawn."""
FRAMES = "count => new Promise(done => { const next = () => (count-- > 0 ? requestAnimationFrame(next) : done()); next(); })"


@pytest.fixture(scope="module")
def run(studio):
    """A run of an agent that was trained on Catch for a moment."""
    return trained(WORDS, studio.root / "catch" / STAMP)


@pytest.fixture
def address(studio, run):
    """Where the agent plays."""
    return f"{studio.url}/watch/catch/{STAMP}"


def step(page):
    return int(page.text_content(".watch-told-step"))


def values(page):
    return page.locator(".watch-values .worth").all_text_contents()


def picture(page):
    return page.evaluate("document.querySelector('.watch-game').toDataURL()")


def begin(page, address):
    """Open the page, and wait until the agent plays."""
    page.goto(address)
    page.wait_for_function("Number(document.querySelector('.watch-told-step')?.textContent) > 0")


def pause(page):
    page.keyboard.press("p")
    page.wait_for_function("document.querySelector('.watch-over').textContent.includes('paused')")
    page.evaluate(FRAMES, 30)


def take(page, count=1):
    """Let so many actions be taken, one by one."""
    for _ in range(count):
        before = step(page)
        page.keyboard.press("n")
        page.wait_for_function("before => Number(document.querySelector('.watch-told-step').textContent) === before + 1", arg=before)


def look(page, action):
    """Do something that makes the page look at the game again, and wait until it has."""
    page.evaluate("""() => {
      window.seen = false;
      document.querySelector(".watch-game").addEventListener("drawn", () => { window.seen = true; }, { once: true });
    }""")
    action()
    page.wait_for_function("window.seen")


def test_an_agent_is_chosen_and_plays(page, studio, address):
    page.goto(f"{studio.url}/watch")
    page.locator(".watch-run", has_text=STAMP).click()
    page.wait_for_url(address)
    page.wait_for_function("Number(document.querySelector('.watch-told-step')?.textContent) > 2")
    first, before = picture(page), step(page)
    page.wait_for_function("before => Number(document.querySelector('.watch-told-step').textContent) > before + 3", arg=before)
    assert picture(page) != first
    assert page.locator(".watch-values li.chosen .mark").all_text_contents() == ["▶"]
    assert page.locator(".watch-frames canvas").count() == 2
    assert len(page.evaluate(PADDLE)) == 3


def test_a_pause_really_pauses_and_a_step_is_one_action(page, address):
    begin(page, address)
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.watch-over').textContent === 'paused'")
    page.evaluate(FRAMES, 30)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    before, shown = step(page), picture(page)
    page.evaluate(FRAMES, 40)
    assert (step(page), picture(page), asked) == (before, shown, [])
    take(page, 3)
    assert step(page) == before + 3
    page.get_by_label("One action (n)").click()
    page.wait_for_function("before => Number(document.querySelector('.watch-told-step').textContent) === before + 4", arg=before)
    page.get_by_label("Pause or go on (space)").click()
    page.wait_for_function("before => Number(document.querySelector('.watch-told-step').textContent) > before + 6", arg=before)


def test_the_speed_is_changed_by_keys(page, address):
    begin(page, address)
    for key, speed in (("+", "2×"), ("+", "4×"), ("+", "8×"), ("+", "8×"), ("-", "4×"), ("-", "2×")):
        page.keyboard.press(key)
        assert page.text_content(".watch-speed") == speed


def played(page, seed):
    """The states of a game that begins with a seed."""
    page.get_by_label("Seed").fill(str(seed))
    look(page, lambda: page.get_by_role("button", name="Begin again").click())
    assert step(page) == 0
    page.locator(".watch-game").focus()
    shown = [(values(page), picture(page))]
    for _ in range(4):
        take(page)
        shown.append((values(page), picture(page)))
    return shown


def test_a_seed_gives_the_same_game_again(page, address):
    begin(page, address)
    pause(page)
    first, other = played(page, 5), played(page, 6)
    assert played(page, 5) == first
    assert other != first


def test_the_slider_shows_the_agent_as_it_was(page, address):
    begin(page, address)
    pause(page)
    slider = page.get_by_role("slider", name="Trained for").locator("[tabindex]")
    found = {page.locator(".watch-amount").first.text_content(): values(page)}
    shown = picture(page)
    for key in ("PageDown", "ArrowRight", "ArrowRight"):
        look(page, lambda key=key: slider.press(key))
        found[page.locator(".watch-amount").first.text_content()] = values(page)
    assert list(found) == ["step 6", "random actions", "step 2", "step 4"]
    assert found["random actions"] == ["0.333"] * 3
    assert len({tuple(value) for value in found.values()}) == 4
    assert picture(page) == shown
    assert page.text_content(".watch-meaning") == "Q-value of each action"


def test_taking_over_moves_the_paddle_as_pressed(page, address):
    begin(page, address)
    pause(page)
    page.keyboard.press("t")
    assert page.get_by_role("button", name="Hand back").get_attribute("aria-pressed") == "true"
    page.keyboard.down("ArrowLeft")
    assert page.locator(".watch-values li.chosen").text_content().startswith("▶left")
    assert len(values(page)) == 3
    page.evaluate("watching.pause()")
    page.wait_for_function(f"String(({PADDLE})()) === '0,1,2'")
    page.keyboard.up("ArrowLeft")
    page.keyboard.down("d")
    page.wait_for_function(f"String(({PADDLE})()) === '9,10,11'")
    page.keyboard.up("d")
    pause(page)
    for key, columns in (("ArrowLeft", [8, 9, 10]), ("a", [7, 8, 9]), ("ArrowRight", [8, 9, 10]), ("w", [9, 10, 11])):
        page.keyboard.press(key)  # pressed and let go before the action: it counts even so
        take(page)
        assert page.evaluate(PADDLE) == columns
    page.get_by_role("button", name="Hand back").click()
    take(page, 2)
    assert page.locator(".watch-over").text_content() == "paused"


def test_saliency_is_laid_over_the_game(page, address):
    begin(page, address)
    colours = "document.querySelector('.watch-heat').getContext('2d').getImageData(0, 0, 12, 12).data"
    alpha = f"Math.max(...{colours}.filter((_, at) => at % 4 === 3))"
    assert page.evaluate(alpha) == 0
    page.get_by_role("switch", name="Saliency").click()
    page.wait_for_function(f"{alpha} > 150")
    page.wait_for_function("document.querySelector('.watch-salient').textContent.startsWith('shown: step')")
    page.get_by_role("switch", name="Saliency").click()
    page.wait_for_function(f"document.querySelector('.watch-salient').textContent === '' && {alpha} === 0")


def test_the_last_minute_is_saved_as_a_video(page, studio, run, address):
    begin(page, address)
    pause(page)
    actions = step(page)
    page.get_by_role("button", name="Save the last minute").click()
    link = page.get_by_role("link", name=f"Video of {actions + 1} moments")
    link.wait_for()
    (path,) = (run / "media").glob("watch_*.mp4")
    assert count_frames_and_secs(path)[0] == actions + 1
    reply = page.request.get(studio.url + link.get_attribute("href"))
    assert (reply.headers["content-type"], reply.body()) == ("video/mp4", path.read_bytes())
    assert page.request.get(f"{studio.url}/watching/catch/{STAMP}/..%2F..%2Fconfig.yaml").status == 404
    assert page.request.get(f"{studio.url}/watching/catch/{STAMP}/config.yaml").status == 404


def test_keys_do_nothing_where_something_is_written(page, address):
    begin(page, address)
    page.get_by_label("Seed").focus()
    for key in ("n", "p", "t", "+", "Space"):
        page.keyboard.press(key)
    assert page.locator(".watch-over").text_content() == ""
    assert page.text_content(".watch-speed") == "1×"
    before = step(page)
    page.wait_for_function("before => Number(document.querySelector('.watch-told-step').textContent) > before", arg=before)


def test_a_session_ends_with_its_page(page, browsing, studio, address):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    begin(page, address)
    session = next(url for url in asked if "/next?" in url).partition("/next")[0]
    other = browsing.page()
    assert other.request.post(f"{session}/next?actions=0").ok
    assert other.request.post(f"{session}/next?actions=17").status == 422
    page.goto(f"{studio.url}/watch")
    reply = other.request.post(f"{session}/next?actions=1")
    assert (reply.status, "This game was closed" in json.loads(reply.body())["detail"]) == (410, True)
    assert other.request.post(f"{studio.url}/watching/guessed/next?actions=1").status == 410


def test_a_damaged_run_is_told_in_a_sentence(page, studio, run):
    for name, damage in (("weights", "checkpoints/step_000000006/model.safetensors"), ("settings", "config.yaml")):
        copy = shutil.copytree(run, studio.root / name / STAMP, ignore=shutil.ignore_patterns("milestones", "run.lock"))
        content = (copy / damage).read_bytes()
        (copy / damage).write_bytes(content[:40] + b"\n: ]" if name == "settings" else b"")
    for name, sentence in (("weights", "no whole checkpoint"), ("settings", "config.yaml"), ("nowhere", f"no run nowhere/{STAMP}")):
        page.goto(f"{studio.url}/watch/{name}/{STAMP}")
        page.get_by_role("alert").filter(has_text=sentence).wait_for()
        assert page.locator(".watch").count() == 0
    for name in ("weights", "settings"):
        shutil.rmtree(studio.root / name)


@pytest.mark.parametrize("dark", [False, True])
def test_a_telephone_shows_all_of_it(browsing, address, dark):
    page = browsing.page(width=400, dark=dark)
    begin(page, address)
    assert overflow(page) <= 0
    for name in (".watch-game", ".watch-plot", ".watch-settings", ".watch-frames"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 400
