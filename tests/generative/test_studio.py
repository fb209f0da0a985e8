"""What the Sample page computes, without a browser: beside `scripts/sample.py`, and beside plain reckoning."""

import base64
import contextlib
import threading
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from generative import easel, panes, studio
from generative.easel import Drawing, Dropped, Easel, Wish
from generative.metrics import find_features
from generative.model import FAMILIES, SamplingConfig
from lab import classifier, loading, media
from lab.config import UserError
from lab.data import DataConfig, as_float
from lab.runs import Run
from tests.scripts.test_scripts import call

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
    --data.name digits --data.image-size 8 --data.batch-size 16 --trainer.steps 3 --trainer.preview-every 9 --trainer.precision fp32
    --tracking.mode disabled --trainer.threads 1
""".split()  # noqa: SIM905
SMALLEST = {
    "diffusion": "--model.network.widths 8 16 --model.steps 3",
    "vae": "--model.network.hidden 16 --model.latent 4",
    "gan": "--model.channels 8 --model.latent 4",
    "classifier": "--model.backbone small",
    "superresolution": "--data.image-size 16 --model.channels 8 --model.blocks 1 --model.factor 2 --model.adversarial 0",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of some families, trained for three steps."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        for family, words in SMALLEST.items():
            call(f"train_{family}.py", *TINY, *words.split(), "--run-dir", f"digits/{family}")
    return folder


def run_of(root: Path, family: str) -> Run:
    return Run(root / "digits" / family)


def opened(root: Path, family: str) -> Easel:
    return easel.opened(run_of(root, family))


def test_the_studio_knows_every_family_and_classifiers() -> None:
    assert set(studio.TAB.experiments) == {*FAMILIES, "classifier"}


# Samples


WISHES = [
    ("diffusion", Wish(seed=5, count=9, labels="3", how=SamplingConfig(steps=2, sampler="ancestral", guidance=2.0))),
    ("diffusion", Wish(count=4)),
    ("vae", Wish(seed=1, count=16)),
    ("gan", Wish(seed=2, count=4, labels="7", how=SamplingConfig(temperature=0.5))),
]


@pytest.mark.parametrize(("family", "wish"), WISHES)
def test_the_command_beside_a_picture_draws_the_same_bytes(root: Path, family: str, wish: Wish) -> None:
    run = run_of(root, family)
    saved = easel.save(run, "samples", media.grid(opened(root, family).samples(wish)))
    assert saved == run.media / "samples.png"
    ours = saved.read_bytes()
    saved.unlink()
    python, script, *words = wish.command(run.folder).split()
    assert (python, script) == ("python", "scripts/sample.py")
    call("sample.py", *words)
    assert saved.read_bytes() == ours


def test_the_command_beside_a_trajectory_and_a_plane_draws_the_same_pixels(root: Path) -> None:
    from generative import drawing

    wish, run = Wish(seed=3, count=4), run_of(root, "diffusion")
    moments = opened(root, "diffusion").trajectory(wish)
    ours = easel.save(run, "trajectory", drawing.side_by_side(drawing.thinned(moments, 10))).read_bytes()
    call("sample.py", *wish.command(run.folder, "trajectory").split()[2:])
    assert (run.media / "trajectory.png").read_bytes() == ours
    assert torch.allclose(moments[-1], opened(root, "diffusion").samples(wish), atol=1e-6)
    vae, run = opened(root, "vae"), run_of(root, "vae")
    across, down, *_ = vae.telling(wish)
    ours = easel.save(run, "plane", drawing.side_by_side(vae.plane(wish, across, down))).read_bytes()
    call("sample.py", *wish.command(run.folder, "plane").split()[2:])
    assert (run.media / "plane.png").read_bytes() == ours


def test_the_seed_fixes_the_picture_whatever_was_drawn_in_between(root: Path) -> None:
    gan = opened(root, "gan")
    first = gan.samples(Wish(seed=4))
    assert not torch.equal(gan.samples(Wish(seed=5)), first)
    assert torch.equal(gan.samples(Wish(seed=4)), first)


def test_a_way_between_two_samples_begins_and_ends_at_them(root: Path) -> None:
    for family in ("vae", "gan"):
        wish, model = Wish(seed=1, count=9), opened(root, family)
        samples, line = model.samples(wish), model.between(wish, 2, 7)
        torch.testing.assert_close(line[[0, -1]], samples[[2, 7]], rtol=0, atol=1e-5)
        torch.testing.assert_close(model.between(wish, 3, 3), samples[3].expand(easel.LINE, -1, -1, -1), rtol=0, atol=1e-5)


def test_a_point_of_the_plane_is_the_image_that_the_plane_shows_there(root: Path) -> None:
    model, wish = opened(root, "vae"), Wish()
    columns = model.plane(wish, 2, 0)
    for column, row in ((0, 0), (9, 0), (4, 7), (9, 9)):
        image, numbers = model.point(wish, 2, 0, ((column + 0.5) / 10, (row + 0.5) / 10))
        torch.testing.assert_close(image, columns[column][row], rtol=0, atol=1e-5)
        expected = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.02 + 0.96 * column / 9, 0.02 + 0.96 * row / 9]))
        torch.testing.assert_close(numbers, expected, rtol=0, atol=1e-4)


def test_what_a_model_knows_is_what_the_page_offers(root: Path) -> None:
    diffusion, vae, gan, large = (opened(root, family) for family in ("diffusion", "vae", "gan", "superresolution"))
    assert (diffusion.knob("steps"), diffusion.knob("guidance"), diffusion.knob("temperature")) == (3, 1, None)
    assert "euler" in diffusion.samplers
    assert (gan.knob("temperature"), gan.knob("steps"), gan.samplers) == (1, None, [])
    assert [(one.moves, one.plane_shown, one.rebuilds, one.edits, one.enlarges) for one in (diffusion, vae, gan, large)] == [
        (True, False, False, True, False),
        (False, True, True, False, False),
        (False, True, False, False, False),
        (False, False, False, False, True),
    ]


# Giving up


def test_work_that_nobody_waits_for_ends_at_the_next_layer_and_leaves_the_model_as_it_was(root: Path) -> None:
    model, calls = opened(root, "diffusion"), [0]

    def wanted() -> bool:
        calls[0] += 1
        return calls[0] < 20

    with pytest.raises(Dropped):
        model.samples(Wish(how=SamplingConfig(steps=1000)), wanted)
    assert calls[0] == 20
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    assert torch.equal(model.samples(Wish(count=4)), model.samples(Wish(count=4)))


def test_threads_share_a_model_and_each_gets_its_own_picture(root: Path) -> None:
    model = opened(root, "diffusion")
    alone = {seed: model.samples(Wish(seed=seed)) for seed in range(4)}
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: model.samples(Wish(seed=seed))})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], alone[seed]) for seed in alone)


def test_a_model_is_opened_once_and_its_checkpoints_one_for_each_step(root: Path) -> None:
    assert opened(root, "vae") is opened(root, "vae")
    run = run_of(root, "vae")
    steps = [int(path.name[5:]) for path in [*loading.moments(run).values()]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3
    assert easel.opened(run, [*loading.moments(run).values()][-1]).loaded.step == 3


# Drawings


def sent(greys: numpy.ndarray, marks: numpy.ndarray) -> str:
    return ",".join(base64.b64encode(part.astype(numpy.uint8).tobytes()).decode() for part in (greys, marks))


def test_a_drawing_is_read_as_it_was_painted() -> None:
    greys, marks = numpy.arange(12).reshape(3, 4) * 20, numpy.eye(3, 4)
    found = easel.read_drawing(sent(greys, marks), (2, 3, 4))
    assert torch.equal(found.image, torch.tensor(greys).float().expand(2, 3, 4) / 255)
    assert torch.equal(found.marked, torch.tensor(marks) > 0)
    assert easel.greys(found.image) == sent(greys, marks).split(",")[0]


@pytest.mark.parametrize("text", ["", "AAAA", "AAAA,AAAA", "A,B", "@@@@,AAAA", ",", "AAAA,AAAA,AAAA", "é,é"])
def test_what_is_no_drawing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="open the page again"):
        easel.read_drawing(text, (1, 2, 2))


def test_what_is_filled_in_and_what_stays(root: Path) -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 2:4, 1:3] = 0.8
    marked = torch.zeros(8, 8, dtype=torch.bool)
    marked[5] = True
    drawing = Drawing(image, marked)
    assert torch.equal(easel.stays(drawing, "marked"), 1 - marked.float())
    assert torch.equal(easel.stays(drawing, "undrawn"), (image[0] > 0).float())
    left = easel.stays(drawing, "left")
    assert left[:, :4].sum() == 0
    assert left[:, 4:].all()
    for what in panes.HOLES:
        kept = easel.stays(drawing, what)
        made = opened(root, "diffusion").filled(image, kept, 3, Wish())
        torch.testing.assert_close(made * kept, image.expand(4, -1, -1, -1) * kept, rtol=0, atol=1e-5)
        assert not torch.equal(made[0], made[1])


def test_an_empty_canvas_stays_empty_and_a_corner_comes_to_the_middle() -> None:
    empty = torch.zeros(1, 28, 28)
    assert torch.equal(easel.centred(empty), empty)
    corner = empty.clone()
    corner[0, :6, :3] = 1
    found = easel.centred(corner)[0]
    rows, columns = (found.sum(axis).nonzero().flatten() for axis in (1, 0))
    assert int(rows[-1] - rows[0]) + 1 == 20
    middle = [(found.sum(axis) * (torch.arange(28) + 0.5)).sum() / found.sum() for axis in (1, 0)]
    assert all(abs(float(place) - 14) <= 1 for place in middle), (rows, columns)


def test_an_enlarged_drawing_is_what_the_model_makes_of_the_small_one(root: Path) -> None:
    model = opened(root, "superresolution")
    image = as_float(easel.images_of(model.loaded.experiment.data).test.images[0])
    found = model.enlarged(image)
    assert [tuple(each.shape) for each in found.values()] == [(1, 16, 16)] * 4 + [(1, 32, 32)]
    small = media.to_uint8(F.interpolate(image[None], (8, 8), mode="bicubic", antialias=True))
    assert torch.equal(found["small"][:, ::2, ::2], as_float(small)[0])
    assert torch.equal(found["as it is"], image)


# Judges and neighbours


def test_only_classifiers_of_such_images_judge_them_and_say_what_they_say_elsewhere(root: Path) -> None:
    run = run_of(root, "classifier")
    loaded = classifier.load(str(run.folder))
    found = easel.judges(loaded.model.shape, loaded.model.classes, "digits", [run, run_of(root, "vae")])
    assert run.folder in [judge.path for judge in found]
    assert not easel.judges((3, 64, 64), loaded.model.classes, "digits", [run])
    assert run.folder not in [judge.path for judge in easel.judges((1, 28, 28), loaded.model.classes, "mnist", [run])]
    assert easel.judges((1, 28, 28), tuple("0123456789"), "mnist", [])[0].path.name == "mnist.safetensors"
    image = as_float(easel.images_of(loaded.experiment.data).test.images[3])
    eyes = next(judge for judge in found if judge.path == run.folder).eyes()
    shares = eyes.shares(image)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    expected = loaded.model.probabilities(image[None])[0]
    torch.testing.assert_close(torch.tensor([shares[name] for name in loaded.model.classes]), expected)
    for method in ("auto", *eyes.methods):
        colours, over = eyes.look(image, method)
        assert colours.shape == over.shape == (3, 8, 8)
        assert float(over.min()) >= 0
        assert float(over.max()) <= 1


def test_the_nearest_training_images_are_those_of_a_plain_search(root: Path) -> None:
    images = easel.images_of(opened(root, "vae").loaded.experiment.data)
    image = as_float(images.train.images[17])
    found = easel.nearest_pixels(image, images)
    assert (found[0].index, found[0].distance, found[0].label) == (17, 0.0, images.classes[int(images.train.labels[17])])
    pixels = images.train.images.numpy().astype(numpy.float64) / 255
    distances = numpy.sqrt(((pixels - pixels[17]) ** 2).sum((1, 2, 3)))
    assert [each.distance for each in found] == pytest.approx(numpy.sort(distances)[: len(found)].tolist(), abs=1e-5)
    assert all(distances[each.index] == pytest.approx(each.distance, abs=1e-5) for each in found)
    with pytest.raises(Dropped):
        easel.nearest_pixels(image, images, lambda: False)


def test_features_are_computed_once_and_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = easel.images_of(DataConfig(name="digits"))
    features = find_features(images)
    assert features
    image, told = as_float(images.train.images[5]), []
    found = easel.nearest_features(image, images, features, told.append)
    assert (found[0].index, found[0].distance) == (5, pytest.approx(0, abs=1e-3))
    assert told == sorted(told)
    assert told[0] == 0
    easel._seen.clear()
    again = easel.nearest_features(image, images, features, lambda _: pytest.fail("they were in the cache"))
    assert [(each.index, each.distance) for each in again] == [(each.index, each.distance) for each in found]


# Damage


def test_a_damaged_checkpoint_and_a_place_that_cannot_be_written_are_told_in_a_sentence(root: Path, tmp_path: Path) -> None:
    import shutil

    copy = Run(tmp_path / "digits/vae")
    shutil.copytree(run_of(root, "vae").folder, copy.folder)
    moment = [*loading.moments(copy).values()][-1]
    for folder in [*loading.moments(copy).values()]:
        (folder / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="not what was saved"):
        easel.opened(copy, moment)
    shutil.rmtree(copy.media)
    copy.media.write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
        easel.save(copy, "samples", torch.zeros(1, 4, 4))


def test_a_picture_goes_to_the_browser_bit_by_bit() -> None:
    import io

    image = torch.arange(48).reshape(3, 4, 4).float() / 255
    head, _, body = easel.url(image).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as found:
        assert numpy.array_equal(numpy.array(found), media.to_uint8(image).movedim(0, -1).numpy())
