"""The Sample pages in a real browser, over tiny runs of real digits that were trained by the scripts."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lab.checkpoint import folders
from tests.scripts.test_scripts import call
from tests.ui.conftest import Browsing, Served, overflow, wait_until

TINY = """
    --data.name digits --data.image-size 8 --trainer.preview-every 50 --trainer.threads 1 --trainer.precision fp32 --tracking.mode disabled
""".split()  # noqa: SIM905
RUNS = {
    "diffusion": "--trainer.steps 30 --model.network.widths 8 16 --model.steps 6 --trainer.save-every 15",
    "vae": "--trainer.steps 60 --model.network.hidden 32 --model.latent 2",
    "superresolution": "--data.image-size 16 --trainer.steps 3 --model.channels 8 --model.blocks 1 --model.factor 2 --model.adversarial 0",
    "classifier": """
        --trainer.steps 80 --data.batch-size 64 --model.backbone resnet_small --optimizer.warmup-steps 10 --optimizer.ema 0.9
        --data.augment.shift 0 --data.augment.rotation 0 --data.augment.zoom 0
    """,
}
pytestmark = pytest.mark.usefixtures("one_thread")
PNG = "img[src^='data:image/png']"


@pytest.fixture(scope="module")
def runs(studio: Served) -> Path:
    """A run of each kind below `digits/`, and a VAE whose checkpoints are all damaged below `damaged/`."""
    for name, words in RUNS.items():
        call(f"train_{name}.py", *TINY, *words.split(), "--run-dir", str(studio.root / "digits" / name))
    shutil.copytree(studio.root / "digits/vae", studio.root / "damaged/vae")
    for root in ("checkpoints", "milestones"):
        for folder in folders(studio.root / "damaged/vae" / root):
            for part in folder.glob("*.safetensors"):
                part.write_bytes(b"none")
    return studio.root


def opened(page: Any, studio: Served, name: str) -> Any:
    page.goto(f"{studio.url}/sample/digits/{name}")
    page.wait_for_selector("[role=tab]")
    return page


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def pictures(page: Any) -> list[str]:
    """What the grid of samples shows, once it is whole."""
    page.wait_for_selector(f".sample-cell {PNG}")
    page.wait_for_function("[...document.querySelectorAll('.sample-cell img')].every(i => i.src.startsWith('data:image/png'))")
    return list(page.evaluate("[...document.querySelectorAll('.sample-cell img')].map(i => i.src)"))


def listing(page: Any, studio: Served) -> None:
    """Open the list of runs, with all its pictures: one that is given up half-way is an error of the server's."""
    page.goto(f"{studio.url}/sample")
    page.wait_for_selector(".sample-card")
    page.wait_for_function("[...document.querySelectorAll('.sample-card img')].every(i => i.complete && i.naturalWidth)")


def source(page: Any, selector: str) -> str:
    return str(page.locator(selector).first.get_attribute("src"))


def changed(page: Any, selector: str, before: str) -> str:
    wait_until(lambda: source(page, selector) != before, f"{selector} shows something else")
    return source(page, selector)


def press(page: Any, slider: str, key: str, times: int = 1) -> None:
    """Move a slider by the keyboard."""
    thumb = page.get_by_role("slider", name=slider).locator("[tabindex]")
    thumb.focus()
    for _ in range(times):
        page.keyboard.press(key)


def settled(page: Any) -> None:
    page.wait_for_selector(".sample-busy[aria-label=done]", state="attached")


@pytest.mark.usefixtures("runs")
def test_all_runs_are_listed_and_found(page: Any, studio: Served) -> None:
    listing(page, studio)
    assert page.locator(".sample-card").count() == 5
    assert page.locator(".sample-card img").count() == 5
    page.get_by_label("Search").fill("superres")
    wait_until(lambda: page.locator(".sample-card:visible").count() == 1, "one card is left")
    page.locator(".sample-card:visible").click()
    page.wait_for_url("**/sample/digits/superresolution")


@pytest.mark.usefixtures("runs")
def test_a_slider_changes_the_picture_and_the_seed_fixes_it(page: Any, studio: Served) -> None:
    first = pictures(opened(page, studio, "diffusion"))
    assert len(set(first)) == 16
    press(page, "Guidance", "ArrowRight", 12)
    wait_until(lambda: pictures(page) != first, "another guidance gives other pictures")
    settled(page)
    page.wait_for_selector("code:has-text('--guidance 4.0')")
    guided = pictures(page)
    seed = page.get_by_label("Seed")
    seed.fill("7")
    wait_until(lambda: pictures(page)[0] != guided[0], "another seed gives other pictures")
    settled(page)
    seed.fill("0")
    wait_until(lambda: pictures(page) == guided, "the first seed gives the first pictures again")
    press(page, "Guidance", "ArrowLeft", 12)
    wait_until(lambda: pictures(page) == first, "and the first guidance the very first ones")


def test_a_picture_is_saved_and_its_command_can_be_copied(page: Any, studio: Served, runs: Path) -> None:
    pictures(opened(page, studio, "diffusion"))
    saved = runs / "digits/diffusion/media/samples.png"
    assert not saved.exists()
    page.get_by_role("button", name="Save picture").first.click()
    page.get_by_text(f"saved as {saved}").wait_for()
    assert saved.read_bytes().startswith(b"\x89PNG")
    page.get_by_label("Copy the command").first.click()
    folder = runs / "digits/diffusion"
    wait_until(
        lambda: page.evaluate("navigator.clipboard.readText()") == f"python scripts/sample.py {folder} --count 16 --seed 0",
        "the command is copied",
    )


@pytest.mark.usefixtures("runs")
def test_an_earlier_checkpoint_draws_otherwise(page: Any, studio: Served) -> None:
    last = pictures(opened(page, studio, "diffusion"))
    press(page, "Checkpoint", "ArrowLeft")
    wait_until(lambda: pictures(page) != last, "an earlier model draws otherwise")
    page.wait_for_selector("code:has-text('/step_0000000')")
    press(page, "Checkpoint", "ArrowRight")
    wait_until(lambda: pictures(page) == last, "and the last one as before")


@pytest.mark.usefixtures("runs")
def test_a_trajectory_is_scrubbed_from_noise_to_the_picture(page: Any, studio: Served) -> None:
    opened(page, studio, "diffusion")
    tab(page, "Trajectory")
    page.wait_for_selector(".sample-picture[src^='data:image/png']")
    page.get_by_text("6 of 6").wait_for()
    seen = {source(page, ".sample-picture")}
    for moment in reversed(range(6)):
        before = source(page, ".sample-picture")
        press(page, "Moment", "ArrowLeft")
        page.get_by_text(f"{moment} of 6").wait_for()
        seen.add(changed(page, ".sample-picture", before))
    assert len(seen) == 7


@pytest.mark.usefixtures("runs")
def test_the_latent_plane_follows_the_pointer_and_the_keyboard(page: Any, studio: Served) -> None:
    opened(page, studio, "vae")
    tab(page, "Latent plane")
    decoded = "[data-role=decoded]"
    page.wait_for_selector(f".sample-plane {PNG}")
    page.wait_for_selector(f"{decoded}[src^='data:image/png']")
    settled(page)
    middle = source(page, decoded)
    box = page.locator(".sample-plane").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"], steps=5)
    corner = changed(page, decoded, middle)
    page.mouse.up()
    settled(page)
    assert re.search(r"left: (89|90)", page.locator(".sample-mark").get_attribute("style"))
    corner = source(page, decoded)
    page.locator(".sample-plane").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    changed(page, decoded, corner)


@pytest.mark.usefixtures("runs")
def test_the_way_between_two_picks(page: Any, studio: Served) -> None:
    grid = pictures(opened(page, studio, "vae"))
    page.locator(".sample-cell").nth(3).click()
    page.wait_for_selector(".sample-cell[data-pick=B]")
    page.locator(".sample-cell").nth(9).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".sample-cell:nth-child(10)[data-pick=B]")
    assert page.locator(".sample-cell").nth(3).get_attribute("data-pick") == "A"
    tab(page, "Interpolation")
    page.wait_for_selector(f".sample-strip {PNG}")
    settled(page)
    strip = page.evaluate("[...document.querySelectorAll('.sample-strip img')].map(i => i.src)")
    assert len(set(strip)) == 9
    assert (strip[0], strip[-1]) == (grid[3], grid[9])
    press(page, "From A to B", "ArrowRight", 8)
    wait_until(lambda: page.locator("img[alt='100 % from A to B']").count() == 1, "the end is shown")
    assert source(page, "img[alt='100 % from A to B']") == grid[9]


def stroke(page: Any, *points: tuple[float, float]) -> None:
    """Draw on the canvas from point to point, as parts of its sides."""
    box = page.locator("canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def take(page: Any, split: str, number: int) -> None:
    """Put an image of the set on the canvas."""
    page.get_by_label("Or an image").click()
    page.get_by_role("option", name=split).click()
    page.get_by_label("Number").fill(str(number))
    page.get_by_role("button", name="Take").click()


def test_a_drawn_digit_is_classified_and_a_real_one_rightly(page: Any, studio: Served, runs: Path) -> None:
    from lab import classifier

    opened(page, studio, "classifier")
    page.wait_for_selector("canvas")
    stroke(page, (0.5, 0.1), (0.5, 0.9))
    page.wait_for_selector(".sample-bars")
    shares = [float(text.split()[0]) for text in page.locator(".sample-bars > :nth-child(3n)").all_inner_texts()]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100.5
    test = classifier.load(str(runs / "digits/classifier"))
    images = test.experiment.dataset().test
    guesses = test.model.probabilities(images.images.float() / 255).argmax(1)
    right = (guesses == images.labels).nonzero().flatten().tolist()
    assert len(right) > 0.8 * len(images)
    chosen = [right[0], right[7], right[40]]
    for index in chosen:
        take(page, "test", index)
        page.get_by_text(re.compile(f"^Taken for {int(images.labels[index])},")).wait_for()
    page.locator("canvas").focus()
    before = page.locator(".sample-bars").inner_text()
    page.keyboard.press("Space")
    page.keyboard.down("Shift")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.up("Shift")
    wait_until(lambda: page.locator(".sample-bars").inner_text() != before, "what the keyboard paints is judged")


@pytest.mark.usefixtures("runs")
def test_a_drawing_is_rebuilt_filled_in_and_enlarged(page: Any, studio: Served) -> None:
    opened(page, studio, "vae")
    tab(page, "Draw")
    stroke(page, (0.3, 0.2), (0.7, 0.2), (0.5, 0.9))
    page.wait_for_selector("img[alt=reconstruction][src^='data:image/png']")
    opened(page, studio, "diffusion")
    tab(page, "Draw")
    stroke(page, (0.3, 0.2), (0.7, 0.2), (0.5, 0.9))
    page.wait_for_selector("img[alt='way 4'][src^='data:image/png']")
    left = source(page, "img[alt='what is left']")
    page.get_by_role("button", name="Marker").click()
    page.get_by_label("Fill in").click()
    page.get_by_role("option", name="what I mark").click()
    stroke(page, (0.2, 0.8), (0.8, 0.8))
    changed(page, "img[alt='what is left']", left)
    opened(page, studio, "superresolution")
    take(page, "test", 4)
    page.wait_for_selector("img[alt='2 times its size'][src^='data:image/png']")


@pytest.mark.usefixtures("runs")
def test_a_training_image_is_its_own_nearest_neighbour_and_a_classifier_looks_at_it(page: Any, studio: Served) -> None:
    opened(page, studio, "classifier")
    take(page, "training", 17)
    page.wait_for_selector(".sample-bars")
    tab(page, "Neighbours")
    page.wait_for_selector(f"figure {PNG}[alt^='training image 17,'][alt$='at 0.000']")
    tab(page, "Attention")
    page.wait_for_selector("img[alt='where it looks'][src^='data:image/png']")
    auto = source(page, "img[alt='where it looks']")
    page.get_by_label("Map by").click()
    page.get_by_role("option", name="saliency").click()
    changed(page, "img[alt='where it looks']", auto)


@pytest.mark.usefixtures("runs")
def test_a_damaged_run_and_one_that_is_not_there_are_told_in_a_sentence(browsing: Browsing, studio: Served) -> None:
    page = browsing.page()
    page.goto(f"{studio.url}/sample/damaged/vae")
    page.locator("[role=alert]").get_by_text("has no whole checkpoint yet").wait_for()
    page.goto(f"{studio.url}/sample/digits/nothing")
    page.locator("[role=alert]").get_by_text("no run digits/nothing").wait_for()
    pictures(opened(page, studio, "vae"))


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_telephone(browsing: Browsing, studio: Served, dark: bool) -> None:
    page = browsing.page(400, dark)
    listing(page, studio)
    assert overflow(page) <= 0
    pictures(opened(page, studio, "diffusion"))
    for name in page.get_by_role("tab").all_inner_texts():
        page.get_by_role("tab", name=name.splitlines()[-1]).click()
        page.wait_for_selector(f"[role=tabpanel][aria-label='{name.splitlines()[-1]}']:visible")
        assert overflow(page) <= 0
        inner = "[...document.querySelectorAll('.sample-pane')].filter(p => p.offsetParent).map(p => p.scrollWidth - p.clientWidth)"
        assert max(page.evaluate(inner)) <= 0
