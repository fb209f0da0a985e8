"""Autoencoders: their error, the damage they mend, the Gaussian over their codes."""

import pytest
import torch
from torch.nn import functional as F

from generative.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderExperiment, AutoencoderTask, corrupt, squared_error
from generative.model import encode_all, neighbour_accuracy
from generative.networks import NetworkConfig
from lab.data import DataConfig, ImageSet, Split
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.learner import Shard
from lab.trainer import Trainer

SMALL = NetworkConfig(hidden=32)


def task(steps: int = 1, **changes) -> tuple[AutoencoderTask, Trainer]:
    config = AutoencoderConfig(**({"latent": 4, "network": SMALL} | changes))
    data = DataConfig(name="digits", image_size=8, batch_size=32)
    trainer = Trainer(AutoencoderExperiment(model=config, data=data, trainer=TrainerConfig(steps=steps)), World())
    return trainer.task, trainer


def test_the_error_is_summed_over_pixels_and_averaged_over_the_batch() -> None:
    one, _ = task()
    shard = Shard(0, 32, 32, 0, 0, torch.device("cpu"))
    loss, _ = one.loss(shard)
    images, _ = one.batch(shard)
    torch.testing.assert_close(loss, F.mse_loss(one.model(images), images, reduction="sum") / 32)
    assert squared_error(images, images + 0.5).tolist() == pytest.approx([0.25 * 64] * 32)


def test_masking_blackens_the_given_part_of_the_pixels_in_all_channels_alike() -> None:
    images = torch.ones(50, 3, 40, 40)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    damaged = corrupt(images, noise, "mask", 0.25)
    assert float((damaged == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert torch.equal(damaged[:, 0], damaged[:, 2])


def test_gaussian_corruption_adds_noise_of_the_given_strength() -> None:
    images = torch.zeros(20, 1, 30, 30)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(corrupt(images, noise, "gaussian", 0.3), 0.3 * noise)
    assert torch.equal(corrupt(images, noise, "none", 0.3), images)


def test_a_denoising_model_is_trained_towards_the_clean_image() -> None:
    one, _ = task(corruption="gaussian", strength=0.5)
    shard = Shard(0, 32, 32, 0, 0, torch.device("cpu"))
    images, _ = one.batch(shard)
    damaged = images + 0.5 * shard.normal("corruption", 1, 8, 8)
    torch.testing.assert_close(one.loss(shard)[0], squared_error(one.model(damaged), images).mean())


def test_masking_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="must be below 1"):
        AutoencoderConfig(corruption="mask", strength=1.0)


def test_the_gaussian_over_codes_has_their_mean_and_covariance() -> None:
    one, _ = task()
    one.model.fit_codes(one.data.train)
    codes = encode_all(one.model, one.data.train).detach()
    torch.testing.assert_close(one.model.mean, codes.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.model.factor @ one.model.factor.T, torch.cov(codes.T), rtol=1e-3, atol=1e-4)
    drawn = one.model.codes(torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(codes.T), rtol=0.05, atol=0.01)


def test_training_beats_the_mean_image_and_denoising_beats_the_damage() -> None:
    one, trainer = task(steps=3000, latent=16, network=NetworkConfig(hidden=64), corruption="gaussian", strength=0.3)
    trainer.fit()
    with one.learner.judged() as model:
        scores = one.test(model, 1000)
    test, train = one.data.test.images.float() / 255, one.data.train.images.float() / 255
    assert scores["error"] < 0.5 * float(squared_error(test, train.mean(0)).mean())
    assert scores["denoised_error"] < 0.8 * scores["damaged_error"]


def test_the_average_keeps_the_gaussian_between_previews() -> None:
    one, trainer = task(steps=4)
    trainer.fit()
    one.preview(trainer)
    fitted = one.learner.ema.module.mean.clone()
    trainer.config = TrainerConfig(steps=8)
    trainer.fit()
    assert torch.equal(one.learner.ema.module.mean, fitted)
    assert bool(fitted.any())


def test_neighbour_accuracy_is_that_of_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    one, _ = task()
    train, test = (Split(split.images[:300], split.labels[:300]) for split in (one.data.train, one.data.test))
    data = ImageSet("digits", one.data.classes, train, test)
    codes, queries = (encode_all(one.model, split).detach().numpy() for split in (train, test))
    expected = KNeighborsClassifier(5).fit(codes, train.labels).score(queries, test.labels)
    assert neighbour_accuracy(one.model, data)["neighbour_accuracy"] == pytest.approx(expected, abs=0.02)


def test_an_autoencoder_knows_no_labels() -> None:
    assert not Autoencoder(AutoencoderConfig(network=SMALL), (1, 8, 8), ("a",)).conditional
