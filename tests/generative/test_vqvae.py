"""The codebook against slow loops over equations, and a run that is cut up, stopped or shared."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F

from generative import model as families
from generative import vqvae
from generative.model import EvaluationConfig
from generative.vqvae import VQVAE, Quantiser, VQVAEConfig, VQVAEExperiment, VQVAETask
from lab.config import UserError
from lab.data import DataConfig, as_float
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.learner import Shard
from lab.trainer import Trainer
from tests.scripts.test_scripts import ROOT, call

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, CLASSES = (1, 8, 8), ("a", "b", "c")
SMALL = {"channels": 8, "codes": 6, "dimensions": 3}
TINY = """
    --data.name digits --data.image-size 8 --data.batch-size 32 --model.channels 8 --model.codes 12 --model.dimensions 4
    --model.restart-after 3 --trainer.preview-every 10 --trainer.save-every 5 --trainer.log-every 1 --tracking.mode disabled
    --trainer.threads 1 --optimizer.schedule constant --optimizer.warmup-steps 5
""".split()  # noqa: SIM905


def settings(**changes) -> VQVAEConfig:
    return VQVAEConfig(**(SMALL | changes))


def model(**changes) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(settings(**changes), SHAPE, CLASSES)


def codebook(**changes) -> Quantiser:
    torch.manual_seed(0)
    return Quantiser(settings(**changes))


def task(accumulate: int = 1, **changes) -> tuple[VQVAETask, Trainer]:
    data = DataConfig(name="digits", image_size=8, batch_size=8)
    experiment = VQVAEExperiment(model=settings(**changes), data=data, trainer=TrainerConfig(steps=100, accumulate=accumulate))
    trainer = Trainer(experiment, World())
    return trainer.task, trainer


def shard(step: int = 0, first: int = 0, count: int = 8) -> Shard:
    return Shard(first, count, 8, 0, step, torch.device("cpu"))


def normal(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The mathematics


@pytest.mark.parametrize("normalised", [True, False])
def test_the_token_is_that_of_the_nearest_code(normalised: bool) -> None:
    book = codebook(normalised=normalised)
    vectors = book.on_sphere(3 * normal(50, 3))
    expected = [min(range(6), key=lambda k: float((vector - book.codes[k]).square().sum())) for vector in vectors]
    assert book.nearest(vectors).tolist() == expected
    assert len(set(expected)) > 3
    if normalised:
        torch.testing.assert_close(book.codes.norm(dim=1), torch.ones(6))
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(50))


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    counts = torch.tensor([5.0, 1, 0, 2, 2, 7])
    assert float(vqvae.perplexity(counts)) == pytest.approx(float(Categorical(counts).entropy().exp()), rel=1e-6)
    assert float(vqvae.perplexity(torch.full((9,), 4))) == pytest.approx(9)
    assert float(vqvae.perplexity(torch.tensor([0, 3, 0]))) == pytest.approx(1)


def test_the_gradient_of_a_code_goes_straight_to_its_vector() -> None:
    vectors, quantised, weight = normal(5, 3).requires_grad_(), normal(5, 3, seed=5).requires_grad_(), normal(5, 3, seed=6)
    passed = vqvae.straight_through(vectors, quantised)
    torch.testing.assert_close(passed, quantised)
    (passed * weight).sum().backward()
    torch.testing.assert_close(vectors.grad, weight)
    assert quantised.grad is None


class SlowCodebook:
    """Equations 6 to 8 of the appendix with restarts, code by code and vector by vector."""

    def __init__(self, book: Quantiser) -> None:
        self.config = book.config
        self.codes = [code.tolist() for code in book.codes]
        self.n, self.m = [0.0] * 6, [[0.0] * 3 for _ in range(6)]
        self.idle = [book.config.restart_after] * 6

    def learn(self, vectors: list[list[float]], picks: list[int]) -> int:
        tokens = [min(range(6), key=lambda k: math.dist(vector, self.codes[k])) for vector in vectors]
        anew = 0
        for k in range(6):
            mine = [vector for vector, token in zip(vectors, tokens, strict=True) if token == k]
            g = self.config.decay
            self.n[k] = g * self.n[k] + (1 - g) * len(mine)
            self.m[k] = [g * old + (1 - g) * sum(vector[d] for vector in mine) for d, old in enumerate(self.m[k])]
            self.idle[k] = 0 if mine else self.idle[k] + 1
            if self.idle[k] >= self.config.restart_after:
                self.n[k], self.m[k], self.idle[k], anew = 1.0, vectors[picks[k]], 0, anew + 1
            mean = [value / self.n[k] for value in self.m[k]]
            length = math.hypot(*mean) if self.config.normalised else 1.0
            self.codes[k] = [value / length for value in mean]
        return anew


@pytest.mark.parametrize("normalised", [True, False])
def test_the_codebook_follows_the_appendix_of_the_paper(normalised: bool) -> None:
    book = codebook(normalised=normalised, decay=0.8, restart_after=3)
    slow, restarts = SlowCodebook(book), []
    for step in range(12):
        vectors = book.on_sphere(normal(5, 3, seed=step) + 2)  # all on one side, so that some codes die
        picks = torch.randint(5, (6,), generator=torch.Generator().manual_seed(step))
        tokens = book.nearest(vectors)
        told = book.learn(book.statistics(vectors, tokens, picks))
        restarts.append(slow.learn(vectors.tolist(), picks.tolist()))
        assert told["restarted"] == restarts[-1]
        assert float(told["perplexity"]) == pytest.approx(float(Categorical(torch.bincount(tokens).float()).entropy().exp()), rel=1e-6)
        torch.testing.assert_close(book.codes, torch.tensor(slow.codes), rtol=1e-4, atol=1e-5)
        assert book.unused.tolist() == slow.idle
    assert restarts[0] > 0
    assert 0 in restarts
    assert sum(restarts[1:]) > 0


def test_a_codebook_begins_with_vectors_of_the_first_batch() -> None:
    book, vectors = codebook(), normal(40, 3)
    vectors = book.on_sphere(vectors)
    tokens, picks = book.nearest(vectors[:2]), torch.arange(10, 16)
    book.learn(book.statistics(vectors, tokens.repeat(20), picks))
    for k in range(6):
        mine = vectors[tokens.repeat(20) == k]
        torch.testing.assert_close(book.codes[k], F.normalize(mine.mean(0), dim=0) if len(mine) else vectors[10 + k])


def test_what_parts_of_a_batch_tell_adds_up() -> None:
    book, vectors, picks = codebook(), normal(20, 3), torch.tensor([0, 19, 7, 8, 3, 12])
    tokens = book.nearest(vectors)
    whole = book.statistics(vectors, tokens, picks)
    parts = book.statistics(vectors[:8], tokens[:8], picks) + book.statistics(vectors[8:], tokens[8:], picks - 8)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole[:, 4:], vectors[picks])


# The model


def test_tokens_are_read_row_by_row_and_rendered_where_they_stood() -> None:
    net, images = model(), torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    maps = net.encoder(images)
    tokens = net.tokens(images)
    for n in range(3):
        for row in range(2):
            for column in range(2):
                vector = F.normalize(maps[n, :, row, column], dim=0)
                assert int(tokens[n, 2 * row + column]) == int((net.quantiser.codes @ vector).argmax())
    placed = torch.stack([net.quantiser.codes[each].T.unflatten(1, (2, 2)) for each in tokens])
    torch.testing.assert_close(net.render(tokens), torch.sigmoid(net.decoder(placed)))
    torch.testing.assert_close(net.render(tokens), net.reconstruct(images, torch.zeros(3)))
    torch.testing.assert_close(net.encode(images), net.quantiser.codes[tokens].flatten(1))


def test_forward_rebuilds_what_the_tokens_say_and_its_gradient_reaches_the_encoder() -> None:
    net, images = model(), torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    logits, vectors, tokens = net(images)
    torch.testing.assert_close(torch.sigmoid(logits), net.render(tokens))
    # As if the decoder had been given the codes as free inputs: their gradient is the vectors'.
    free = net.quantiser.codes[tokens].clone().requires_grad_()
    weight = normal(*logits.shape)
    (expected,) = torch.autograd.grad((net.logits(free) * weight).sum(), free)
    (found,) = torch.autograd.grad((logits * weight).sum(), vectors)
    torch.testing.assert_close(found, expected)


def test_samples_use_codes_as_often_as_training_did() -> None:
    net = model()
    net.quantiser.counts.copy_(torch.tensor([1.0, 0, 2, 3, 0, 4]))
    drawn = net.codes(normal(50_000, 4)).unflatten(1, (4, 3))
    tokens = net.quantiser.nearest(drawn)
    for place in range(4):
        share = torch.bincount(tokens[:, place], minlength=6) / 50_000
        torch.testing.assert_close(share, net.quantiser.counts / 10, rtol=0, atol=0.01)
    ends = net.quantiser.nearest(net.codes(torch.tensor([[-9.0, 9.0, -1.2816, -1.2815]])).unflatten(1, (4, 3)))
    assert ends.tolist() == [[0, 5, 0, 2]]  # 1.28155 deviations below the mean lies a tenth


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_loss_is_distortion_and_a_quarter_of_the_commitment(likelihood: str) -> None:
    one, _ = task(likelihood=likelihood)
    one.told = torch.zeros(())
    loss, metrics = one.loss(shard())
    images, _ = one.batch(shard())
    rebuilt = one.model.reconstruct(images, torch.zeros(8)).detach().double()
    distortion, commitment = 0.0, 0.0
    for image, guess, vectors, tokens in zip(images.double(), rebuilt, one.model.vectors(images), one.model.tokens(images), strict=True):
        entropy = -(image * guess.log() + (1 - image) * (1 - guess).log())
        distortion += float((entropy if likelihood == "bernoulli" else (image - guess) ** 2).sum()) / 8
        commitment += sum(math.dist(v, one.model.quantiser.codes[t].tolist()) ** 2 for v, t in zip(vectors.tolist(), tokens)) / 8
    assert metrics["distortion"].item() == pytest.approx(distortion, rel=1e-5)
    assert metrics["commitment"].item() == pytest.approx(commitment, rel=1e-5)
    assert loss.item() == pytest.approx(distortion + 0.25 * commitment, rel=1e-5)


def test_commitment_draws_vectors_to_their_codes() -> None:
    one, _ = task(commitment=1e9)
    one.told = torch.zeros(())
    before = one.loss(shard())[1]["commitment"]
    loss, _ = one.loss(shard())
    loss.backward()
    with torch.no_grad():
        for weight in one.model.encoder.parameters():
            weight.sub_(1e-3 * weight.grad / one.learner.gradient_norm())
    assert float(one.loss(shard())[1]["commitment"]) < float(before)


def test_scores_are_those_of_a_loop() -> None:
    net, images = model(), torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(1))
    scores = vqvae.measured(net, images, rows=7)
    tokens = net.tokens(images)
    error = sum(float((image - net.render(row[None])[0]).square().sum()) for image, row in zip(images, tokens, strict=True)) / 30
    assert scores["error"] == pytest.approx(error, rel=1e-5)
    assert scores["error_per_pixel"] == pytest.approx(error / 64, rel=1e-5)
    assert scores["used_codes"] == len(set(tokens.flatten().tolist())) / 6
    assert scores["perplexity"] == pytest.approx(float(vqvae.perplexity(torch.bincount(tokens.flatten()))))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="8x6 is not a multiple of 4"):
        VQVAE(settings(), (1, 8, 6), CLASSES)
    with pytest.raises(UserError, match="must be even"):
        VQVAE(settings(channels=7), SHAPE, CLASSES)


# Training


def test_a_batch_in_parts_gives_the_codebook_of_a_whole_one() -> None:
    (whole, first), (parts, second) = task(restart_after=2), task(accumulate=4, restart_after=2)
    for _ in range(5):
        metrics = [one.step(trainer) for one, trainer in ((whole, first), (parts, second))]
        first.step, second.step = first.step + 1, second.step + 1
        assert metrics[0]["restarted"] == metrics[1]["restarted"]
        for name in ("codes", "counts", "sums"):
            torch.testing.assert_close(getattr(parts.model.quantiser, name), getattr(whole.model.quantiser, name), rtol=1e-4, atol=1e-5)
        assert torch.equal(parts.model.quantiser.unused, whole.model.quantiser.unused)


def test_codes_start_anew_at_vectors_of_the_batch() -> None:
    one, trainer = task()
    with torch.no_grad():
        vectors = one.model.vectors(one.batch(shard())[0]).flatten(0, 1)
        tokens = one.model.quantiser.nearest(vectors)
    metrics = one.step(trainer)
    distance = torch.cdist(one.model.quantiser.codes, vectors).amin(1)
    anew = [k for k in range(6) if k not in tokens.tolist()]
    assert metrics["restarted"] == len(anew) > 0
    assert float(distance[anew].max()) < 1e-3


def test_an_update_that_is_skipped_moves_no_codes() -> None:
    one, trainer = task()
    one.step(trainer)
    before = {name: value.clone() for name, value in one.model.quantiser.state_dict().items()}
    with torch.no_grad():
        one.model.decoder[-1].bias.fill_(math.nan)
    metrics = one.step(trainer)
    assert all(math.isnan(value) for name, value in metrics.items() if name != "lr")
    assert all(torch.equal(before[name], value) for name, value in one.model.quantiser.state_dict().items())


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps."""
    folder = tmp_path_factory.mktemp("vqvae")
    with contextlib.chdir(folder):
        call("train_vqvae.py", *TINY, "--trainer.steps", "20", "--run-dir", "whole")
    return folder


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_is_opened_again_as_it_was(runs: Path) -> None:
    loaded = families.load(str(runs / "whole"))
    values = rows(runs / "whole")
    assert values[-1]["train/loss"] < 0.9 * values[0]["train/loss"]
    data = loaded.experiment.dataset()
    assert loaded.model.evaluate(data, EvaluationConfig())["error"] == pytest.approx(values[-1]["eval/error"])
    labels = torch.arange(4)
    first, again, other = (loaded.model.sample(4, labels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, *data.shape)
    rebuilt = loaded.model.reconstruct(as_float(data.test.images[:5]), labels)
    assert rebuilt.shape == (5, *data.shape)


def test_a_run_that_was_stopped_goes_on_exactly(runs: Path) -> None:
    with contextlib.chdir(runs):
        call("train_vqvae.py", *TINY, "--trainer.steps", "10", "--run-dir", "parts")
        call("train_vqvae.py", "--resume", "parts", "--trainer.steps", "20")
    last = "checkpoints/step_000000020"
    for file in ("metrics.jsonl", f"{last}/model.safetensors", f"{last}/ema.safetensors", f"{last}/optimizer.safetensors"):
        assert (runs / "parts" / file).read_bytes() == (runs / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_two_processes_have_the_codebook_of_one(runs: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "scripts/train_vqvae.py"), *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words, "--trainer.steps", "20", "--run-dir", "two"], cwd=runs, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for one, two in zip(rows(runs / "whole"), rows(runs / "two"), strict=True):
        assert two["train/restarted"] == one["train/restarted"]
        assert two["train/perplexity"] == pytest.approx(one["train/perplexity"], rel=1e-3)
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
    first, second = (families.load(str(runs / name)).model.quantiser.codes for name in ("whole", "two"))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-2)


def test_settings_are_plain_values_that_make_them_again() -> None:
    config = settings(likelihood="gaussian", decay=0.5)
    assert VQVAEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
