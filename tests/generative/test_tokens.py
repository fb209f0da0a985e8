"""Transformers on tokens against sums over all pictures there are, slow loops, and runs that lose the VQ-VAE's folder."""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from generative import model as families
from generative import tokens
from generative.model import EvaluationConfig, SamplingConfig
from generative.tokens import GPTPrior, MaskedPrior, TokensConfig, TokensExperiment, TokensTask
from generative.vqvae import VQVAE, VQVAEConfig
from lab.config import UserError
from lab.data import AugmentConfig, DataConfig, as_float
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.learner import Shard
from lab.trainer import Trainer
from tests.scripts.test_scripts import call

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, CLASSES = (1, 8, 8), ("a", "b")
CODES, PLACES = 3, 4
TINY = """
    --data.name digits --data.image-size 8 --data.batch-size 32 --trainer.preview-every 10 --trainer.save-every 5 --trainer.log-every 1
    --tracking.mode disabled --trainer.threads 1 --optimizer.schedule constant --optimizer.warmup-steps 5
""".split()  # noqa: SIM905
SMALL_VQVAE = ("--model.channels", "8", "--model.codes", "12", "--model.dimensions", "4")
SMALL = ("--model.width", "16", "--model.layers", "2", "--model.heads", "2", "--model.dropout", "0.1")
PLAIN = SamplingConfig(guidance=1.0)


def prior(kind: str = "gpt", **changes) -> GPTPrior | MaskedPrior:
    """A tiny model with weights so large that it is far from indifferent."""
    torch.manual_seed(0)
    config = TokensConfig(kind=kind, width=8, layers=2, heads=2, **changes)
    vqvae = VQVAE(VQVAEConfig(channels=8, codes=CODES, dimensions=2), SHAPE, CLASSES)
    net = {"gpt": GPTPrior, "masked": MaskedPrior}[config.kind](config, vqvae).eval()
    with torch.no_grad():
        for weight in net.network.parameters():
            weight.add_((0.6 if kind == "gpt" else 0.25) * torch.randn(weight.shape))
    return net


def uniform(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


EVERY_PICTURE = torch.tensor(list(itertools.product(range(CODES), repeat=PLACES)))


# Schedules and choices


def test_the_places_left_fall_by_a_cosine_to_none() -> None:
    assert tokens.places_left(12, 49) == [max(0, math.floor(49 * math.cos(math.pi / 2 * t / 12) + 1e-9)) for t in range(1, 13)]
    assert tokens.places_left(1, 49) == [0]
    assert tokens.places_left(2, 4) == [2, 0]
    for steps in (3, 49, 200):
        left = tokens.places_left(steps, 49)
        assert left[-1] == 0
        assert len(left) <= min(steps, 49)
        assert all(before > after for before, after in itertools.pairwise([49, *left]))


def test_hidden_places_are_those_with_the_lowest_numbers_and_as_many_as_the_cosine_says() -> None:
    rows, draws = torch.arange(200 * 6).view(200, 6), uniform(200, 7)
    draws[0, 0], draws[1, 0] = 0.0, 0.999999
    seen, hidden = tokens.hide(rows, draws, -1)
    for row, draw, found, mask in zip(rows, draws, seen, hidden, strict=True):
        count = max(1, math.ceil(6 * math.cos(math.pi / 2 * float(draw[0]))))
        lowest = sorted(range(6), key=lambda place: float(draw[1 + place]))[:count]
        assert mask.nonzero().flatten().tolist() == sorted(lowest)
        assert found.tolist() == [-1 if place in lowest else int(row[place]) for place in range(6)]
    assert [int(hidden[row].sum()) for row in (0, 1)] == [6, 1]


def test_the_surest_are_kept_and_what_was_there_stays() -> None:
    before = torch.tensor([[9, 9, 4, 9, 9, 1]])
    drawn, confidence = torch.tensor([[0, 1, 2, 3, 5, 6]]), torch.tensor([[-3.0, -1.0, -9.0, -2.0, -4.0, -9.0]])
    assert tokens.keep_surest(before, drawn, confidence, 3, 9).tolist() == [[9, 1, 4, 9, 9, 1]]
    assert tokens.keep_surest(before, drawn, confidence, 1, 9).tolist() == [[0, 1, 4, 3, 9, 1]]
    assert tokens.keep_surest(before, drawn, confidence, 0, 9).tolist() == [[0, 1, 4, 3, 5, 1]]


def test_guidance_goes_from_without_the_class_past_with_it() -> None:
    told, untold = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]])
    both = torch.cat([told, untold])
    torch.testing.assert_close(tokens.guided(both, 0.0), untold)
    torch.testing.assert_close(tokens.guided(both, 3.0), torch.tensor([[3.0, 0.0]]))
    torch.testing.assert_close(tokens.guided(told, 1.0), told)


# One after another


def test_the_probabilities_of_all_pictures_of_a_class_sum_to_one() -> None:
    net = prior()
    for label in (0, 1):
        nats = net.nats(EVERY_PICTURE, torch.full((81,), label)).detach().double().sum(1)
        assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-5)
        assert float(nats.max() - nats.min()) > 1


def test_each_token_is_told_the_class_and_those_before_it() -> None:
    net = prior()
    for row, label in ((EVERY_PICTURE[50], 1), (EVERY_PICTURE[7], 0)):
        found = net.nats(row[None], torch.tensor([label]))[0]
        for place in range(PLACES):
            sequence = torch.tensor([[CODES + label, *row[:place].tolist()]])
            logits = net.network(sequence)[0, -1, :CODES]
            assert found[place].item() == pytest.approx(-logits.log_softmax(0)[row[place]].item(), rel=1e-4)


def test_pictures_are_drawn_as_often_as_they_are_likely() -> None:
    net, count = prior(), 40_000
    drawn = net.draw(uniform(count, PLACES), torch.ones(count, dtype=torch.long), PLAIN)
    places = CODES ** torch.arange(PLACES - 1, -1, -1)
    share = torch.bincount((drawn * places).sum(1), minlength=81) / count
    expected = (-net.nats(EVERY_PICTURE, torch.ones(81, dtype=torch.long)).sum(1)).exp()
    torch.testing.assert_close(share, expected.detach(), rtol=0, atol=0.01)


@pytest.mark.parametrize("how", [PLAIN, SamplingConfig(guidance=2.5, temperature=0.7, top_k=2), SamplingConfig()])
def test_drawing_with_a_cache_is_drawing_without_one(how: SamplingConfig) -> None:
    net, numbers, labels = prior(guidance=1.7, temperature=0.9), uniform(30, PLACES), torch.arange(30) % 2
    guidance, temperature = how.guidance or 1.7, how.temperature or 0.9
    for row, label, found in zip(numbers, labels, net.draw(numbers, labels, how), strict=True):
        written: list[int] = []
        for number in row:
            told, untold = (net.network(torch.tensor([[first, *written]]))[0, -1, :CODES] for first in (CODES + int(label), CODES + 2))
            logits = (untold + guidance * (told - untold)).double() / temperature
            allowed = logits.topk(how.top_k or CODES).indices.tolist()
            weights = [math.exp(float(value)) if k in allowed else 0.0 for k, value in enumerate(logits)]
            summed = list(itertools.accumulate(weights))
            written.append(next(k for k in range(CODES) if summed[k] > float(number) * summed[-1]))
        assert found.tolist() == written


def test_bits_are_those_of_whole_pictures() -> None:
    net, labels = prior(), torch.arange(81) % 2
    expected = net.nats(EVERY_PICTURE, labels).double().sum(1).mean() / math.log(2)
    scores = tokens.measured_bits(net, EVERY_PICTURE, labels)
    assert scores["bits_per_image"] == pytest.approx(float(expected), rel=1e-6)
    assert scores["bits_per_token"] == pytest.approx(float(expected) / PLACES, rel=1e-6)


# All in a few rounds


def test_a_hidden_token_is_told_the_class_and_all_that_is_seen() -> None:
    net, draws, labels = prior("masked"), uniform(81, PLACES + 1), torch.arange(81) % 2
    found = net.nats(EVERY_PICTURE, labels, draws)
    for row in (0, 13, 40, 77):
        seen, hidden = tokens.hide(EVERY_PICTURE[row : row + 1], draws[row : row + 1], CODES + 3)
        logits = net.network(torch.tensor([[CODES + int(labels[row]), *seen[0].tolist()]]))[0, 1:, :CODES].log_softmax(1)
        each = [-logits[place, EVERY_PICTURE[row, place]].item() for place in range(PLACES) if hidden[0, place]]
        assert found[row].item() == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rounds_keep_the_surest_tokens(steps: int, guidance: float) -> None:
    net, numbers, labels = prior("masked", choice_temperature=0.0), uniform(20, PLACES), torch.arange(20) % 2
    drawn = net.draw(numbers, labels, SamplingConfig(guidance=guidance, steps=steps))
    assert len(drawn.unique(dim=0)) > 5
    for row, label, found in zip(numbers, labels, drawn, strict=True):
        assert found.tolist() == filled_slowly(net, row.tolist(), int(label), guidance, tokens.places_left(steps, PLACES))


def filled_slowly(net: MaskedPrior, numbers: list[float], label: int, guidance: float, rounds: list[int]) -> list[int]:
    """One picture, place by place."""
    picture = [CODES + 3] * PLACES
    for index, left in enumerate(rounds):
        told, untold = (net.network(torch.tensor([[first, *picture]]))[0, 1:, :CODES] for first in (CODES + label, CODES + 2))
        share = (untold + guidance * (told - untold)).double().softmax(1)
        guesses = {}
        for place in (place for place in range(PLACES) if picture[place] == CODES + 3):
            number = (numbers[place] + index * 0.6180339887498949) % 1
            token = next(k for k in range(CODES) if float(share[place, : k + 1].sum()) > number or k == CODES - 1)
            guesses[place] = (float(share[place, token]), token)
        for place in sorted(guesses, key=guesses.__getitem__, reverse=True)[: len(guesses) - left]:
            picture[place] = guesses[place][1]
    return picture


def test_chance_decides_which_places_come_first() -> None:
    net, numbers, labels = prior("masked", choice_temperature=50.0, steps=4), uniform(200, PLACES), torch.zeros(200, dtype=torch.long)
    how = SamplingConfig(guidance=1.0)
    same, again, other = (net.draw(numbers, labels, how, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(net.draw(numbers, labels, how), net.draw(numbers, labels, how))


# Both


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_pictures_are_what_the_vqvae_makes_of_the_tokens(kind: str) -> None:
    net, labels = prior(kind), torch.arange(6) % 2
    noise = torch.randn(6, PLACES, generator=torch.Generator().manual_seed(1))
    drawn = net.draw(torch.special.ndtr(noise.double()), labels, SamplingConfig())
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < CODES
    torch.testing.assert_close(net.generate(noise, labels, SamplingConfig()), net.vqvae.render(drawn))
    assert net.conditional
    assert net.latent == PLACES
    assert net.knobs == {"guidance", "temperature", "top_k"} | ({"steps"} if kind == "masked" else set())
    assert not torch.equal(drawn, net.draw(torch.special.ndtr(noise.double()), 1 - labels, SamplingConfig(guidance=5.0)))


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_a_class_that_is_dropped_is_not_told(kind: str) -> None:
    net, labels, dropped = prior(kind), torch.arange(81) % 2, torch.arange(81) % 3 == 0
    more = () if kind == "gpt" else (uniform(81, PLACES + 1),)
    first, other = (net.nats(EVERY_PICTURE, each, *more, dropped=dropped) for each in (labels, 1 - labels))
    assert torch.equal(first[dropped], other[dropped])
    assert not torch.isclose(first[~dropped], other[~dropped]).all(-1).any()


def test_only_the_transformer_learns() -> None:
    net = prior()
    assert not any(weight.requires_grad for weight in net.vqvae.parameters())
    net.nats(EVERY_PICTURE, torch.zeros(81, dtype=torch.long)).mean().backward()
    assert all(weight.grad is not None for weight in net.network.parameters())


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ-VAE's run, and one of each kind of prior that learnt its tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    with contextlib.chdir(folder):
        call("train_vqvae.py", *TINY, *SMALL_VQVAE, "--trainer.steps", "20", "--run-dir", "vq")
        for kind in ("gpt", "masked"):
            call("train_tokens.py", *TINY, *SMALL, "--model.kind", kind, "--vqvae", "vq", "--trainer.steps", "20", "--run-dir", kind)
    return folder


def task(runs: Path, **changes) -> TokensTask:
    data = DataConfig(name="digits", image_size=8, batch_size=16)
    experiment = TokensExperiment(
        vqvae=str(runs / "vq"), data=data, model=TokensConfig(width=8, layers=1, heads=2), trainer=TrainerConfig()
    )
    return Trainer(dataclasses.replace(experiment, **changes), World()).task


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_a_run_learns_and_is_whole_without_the_run_of_the_vqvae(runs: Path, tmp_path: Path, kind: str) -> None:
    rows = [json.loads(line) for line in (runs / kind / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.05
    shutil.copytree(runs / kind, tmp_path / kind)
    loaded, source = families.load(str(tmp_path / kind)), families.load(str(runs / "vq"))
    for name, value in source.model.state_dict().items():
        assert torch.equal(loaded.model.vqvae.state_dict()[name], value), name
    labels = torch.arange(6)
    first, again, other = (loaded.model.sample(6, labels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (6, *SHAPE)
    score = "bits_per_image" if kind == "gpt" else "bits_per_hidden_token"
    data = loaded.experiment.dataset()
    codes = tokens.encoded(loaded.model.vqvae, data.test)
    judge = tokens.measured_bits if kind == "gpt" else tokens.measured_guesses
    assert judge(loaded.model, codes, data.test.labels)[score] == pytest.approx(rows[-1][f"eval/{score}"], rel=1e-5)
    scores = loaded.model.evaluate(data, EvaluationConfig())
    assert scores.get(score) == (pytest.approx(rows[-1][f"eval/{score}"], rel=1e-5) if kind == "gpt" else None)


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_a_run_that_was_stopped_goes_on_exactly(runs: Path, kind: str) -> None:
    parts = f"parts_{kind}"
    with contextlib.chdir(runs):
        call("train_tokens.py", *TINY, *SMALL, "--model.kind", kind, "--vqvae", "vq", "--trainer.steps", "10", "--run-dir", parts)
        call("train_tokens.py", "--resume", parts, "--trainer.steps", "20")
    last = "checkpoints/step_000000020"
    for file in ("metrics.jsonl", f"{last}/model.safetensors", f"{last}/ema.safetensors", f"{last}/optimizer.safetensors"):
        assert (runs / parts / file).read_bytes() == (runs / kind / file).read_bytes(), file


def test_a_batch_is_tokens_of_training_images_with_their_classes(runs: Path) -> None:
    one = task(runs, model=TokensConfig(width=8, layers=1, heads=2, label_drop=1e-9))
    shard = Shard(0, 16, 16, 0, 0, torch.device("cpu"))
    index = shard.indices(len(one.data.train))
    codes = one.model.vqvae.tokens(as_float(one.data.train.images[index]))
    logits = one.model(torch.cat([12 + one.data.train.labels[index][:, None], codes[:, :-1]], 1))
    torch.testing.assert_close(one.loss(shard)[0], F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
    assert {id(weight) for weight in one.learner.weights} == {id(weight) for weight in one.model.network.parameters()}


def test_a_training_set_becomes_tokens_bit_by_bit_and_always_the_same(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lots: list[torch.Tensor] = []
    encode = tokens.encoded
    monkeypatch.setattr(tokens, "encoded", lambda vqvae, split: lots.append(split.labels) or encode(vqvae, split))
    monkeypatch.setattr(tokens, "ROWS", 100)
    one, other = task(runs), task(runs)
    train = one.data.train
    steps = range(2 * math.ceil(len(train) / 32))  # two epochs
    batches = [Shard(0, 32, 32, 0, step, torch.device("cpu")).indices(len(train)) for step in steps]
    seen = torch.cat([one.tokens[batches[0]], one.tokens[batches[1]]])
    assert [len(lot) for lot in lots] == [100], "no more than what the first batches need"
    seen = torch.cat([seen, *(one.tokens[batch] for batch in batches[2:])])
    assert len(lots) == math.ceil(len(train) / 100)
    assert torch.equal(torch.cat(lots), train.labels[torch.cat(batches)[: len(train)]]), "in the order of the first epoch"
    backwards = [other.tokens[batch] for batch in reversed(batches)]  # as a run that goes on in the second epoch asks
    assert torch.equal(torch.cat(backwards[::-1]), seen)
    alike = one.tokens[torch.arange(len(train))] == encode(one.model.vqvae, train)
    assert float(alike.double().mean()) > 0.999


def test_classes_are_hidden_as_often_as_the_settings_say(runs: Path) -> None:
    one = task(runs, model=TokensConfig(width=8, layers=1, heads=2, label_drop=0.3))
    told = []
    one.model.nats = lambda codes, labels, dropped: told.append(dropped) or torch.zeros(1)
    for step in range(200):
        one.loss(Shard(0, 16, 16, 0, step, torch.device("cpu")))
    assert float(torch.cat(told).double().mean()) == pytest.approx(0.3, abs=0.03)


def test_mistakes_are_told(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vqvae: name the run"):
        task(runs, vqvae="")
    with pytest.raises(UserError, match="a run of 'tokens'; expected vqvae"):
        task(runs, vqvae=str(runs / "gpt"))
    with pytest.raises(UserError, match="no vqvae run here"):
        task(runs, vqvae=str(tmp_path))
    with pytest.raises(UserError, match="trained on images of shape 1 x 8 x 8, and these are 1 x 12 x 12; use the same data"):
        task(runs, data=DataConfig(name="digits", image_size=12, batch_size=16))
    with pytest.raises(ValueError, match=r"data\.augment: images become tokens once"):
        TokensExperiment(data=DataConfig(augment=AugmentConfig(shift=1.0)))
    with pytest.raises(ValueError, match="30 is no multiple of heads"):
        TokensConfig(width=30)
    with pytest.raises(ValueError, match="label_drop"):
        TokensConfig(label_drop=1.0)
