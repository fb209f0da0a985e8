"""Every backbone in every use, by its name in the settings: it learns for a step, is saved, loaded, and gives the same numbers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from envs.games import GameConfig
from generative import model as generators
from generative.networks import NetworkConfig
from generative.vae import VAEConfig, VAEExperiment
from lab import classifier, runs
from lab.backbones import list_backbones
from lab.classifier import ClassifierConfig, ClassifierExperiment
from lab.config import dump
from lab.data import DataConfig
from lab.distributed import World
from lab.experiment import Experiment, TrainerConfig
from lab.recorder import Lines, Recorder
from lab.runs import Run
from lab.tracking import Tracker, TrackingConfig
from lab.trainer import Trainer
from rl import agent as agents
from rl.dqn import DQNConfig, DQNExperiment
from rl.evaluate import TestConfig
from rl.replay import ReplayConfig
from rl.sb3 import PPOConfig, SB3DQNConfig, SB3Experiment

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list_backbones()
COMMON = {"name": "use", "trainer": TrainerConfig(steps=4), "tracking": TrackingConfig(mode="disabled")}
DIGITS = DataConfig(name="digits", image_size=28, batch_size=4)
CATCH = GameConfig(name="catch", stack=2)
NO_FILM = TestConfig(games=1, video_every=0)


def one_step(experiment: Experiment, folder: Path, updates: int = 1) -> tuple[Run, nn.Module]:
    """Train and save, as a script does but without a preview; gives the module, whose weights must have moved."""
    trainer = Trainer(experiment, World())
    run = runs.create("use", folder, dump(experiment, experiment.experiment))
    task = trainer.task
    network: nn.Module = task.model.policy if isinstance(experiment, SB3Experiment) else task.learner.module
    before = [weight.detach().clone() for weight in network.parameters()]
    for _ in range(updates):
        trainer._one_step([], None)
    recorder = Recorder(run, Tracker(), Lines("use", 1))
    trainer._save(run, recorder, needed=True)
    recorder.close()
    moved = sum(not old.equal(new) for old, new in zip(before, network.parameters()))
    assert moved > 0.3 * len(before)  # a branch that starts at zero keeps its inside still for a step
    return run, network.eval()


def images(channels: int, side: int) -> Tensor:
    return torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_as_a_classifier(name, tmp_path):
    experiment = ClassifierExperiment(**COMMON, data=DIGITS, model=ClassifierConfig(backbone=name))
    experiment = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, ema=0.0, warmup_steps=0))
    run, trained = one_step(experiment, tmp_path / "run")
    loaded = classifier.load(str(run.folder))
    assert loaded.model.body.paper == trained.body.paper
    assert_close(loaded.model(images(1, 28)), trained(images(1, 28)).detach())


@pytest.mark.parametrize("name", NAMES)
def test_as_the_encoder_of_a_vae(name, tmp_path):
    experiment = VAEExperiment(**COMMON, data=DIGITS, model=VAEConfig(latent=3, network=NetworkConfig(hidden=16, encoder=name)))
    experiment = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, ema=0.0, warmup_steps=0))
    run, trained = one_step(experiment, tmp_path / "run")
    loaded = generators.load(str(run.folder))
    labels = torch.zeros(3, dtype=torch.long)
    assert_close(loaded.model.encode(images(1, 28), labels), trained.encode(images(1, 28), labels).detach())


@pytest.mark.parametrize("name", NAMES)
def test_as_the_torso_of_a_dqn(name, tmp_path):
    dqn = DQNConfig(backbone=name, hidden=8, games=2, train_every=16, batch_size=4, learning_starts=8, target_every=32, n_step=1)
    experiment = DQNExperiment(**COMMON, game=CATCH, dqn=dqn, replay=ReplayConfig(capacity=100), test=NO_FILM)
    run, trained = one_step(experiment, tmp_path / "run", 2)
    loaded = agents.load(str(run.folder))
    seen = (images(2, 12) * 255).to(torch.uint8)
    assert_close(loaded.agent.values(seen), trained(seen).detach())


@pytest.mark.parametrize("name", NAMES)
def test_as_the_features_extractor_of_stable_baselines3(name, tmp_path):
    ppo = PPOConfig(games=2, n_steps=4, batch_size=8, epochs=1)
    experiment = SB3Experiment(**COMMON, algorithm="ppo", game=CATCH, backbone=name, ppo=ppo, dqn=SB3DQNConfig(), test=NO_FILM)
    run, trained = one_step(experiment, tmp_path / "run", 2)
    loaded = agents.load(str(run.folder))
    seen = (images(2, 12) * 255).to(torch.uint8)
    expected = trained.get_distribution(seen).distribution.probs
    assert_close(loaded.agent.values(seen), expected.detach())
