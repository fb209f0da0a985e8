"""What stable-baselines3 does for rl/sb3.py: models, memory, tasks, agents, and its zip files.

`learn` of SB3 is a loop around `collect_rollouts` and `train`. Here our trainer is that loop: it saves, records and stops
between two turns of it, and gives each turn its random numbers, which SB3 draws from four generators at once: PyTorch's,
NumPy's, Python's and the action space's.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import random
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor

from envs import games
from envs.sb3 import GamesVecEnv, classic
from lab import backbones, checkpoint, loading, runs, seeding
from lab.checkpoint import Stateful
from lab.config import UserError
from lab.distributed import World
from lab.experiment import Every
from lab.learner import Metrics
from lab.trainer import Trainer, TrainingStopped, leaving
from rl.agent import Agent
from rl.evaluate import Tester
from rl.replay import Replay, ReplayConfig, check_room
from rl.sb3 import PPOConfig, SB3DQNConfig, SB3Experiment
from rl.values import QAgent

# Networks


LARGEST_POLICY = 1 << 29
"""Bytes of the weights in a file of SB3 at most."""
HIDDEN = 512
"""Units over the whole last map, as in SB3's own network, where a backbone's own vector forgets where things are."""


class BackboneExtractor(BaseFeaturesExtractor):
    """One of our backbones as the part of an SB3 policy that sees; the products in bf16 where that is asked for."""

    def __init__(self, observation_space: spaces.Box, backbone: str, bf16: bool = False) -> None:
        frames, size, _ = observation_space.shape
        torso = backbones.create(backbone, frames, size)
        if torso.forgets_places:
            torso = backbones.create(backbone, frames, size, hidden=HIDDEN)
        super().__init__(observation_space, torso.out_features)
        self.torso, self.bf16 = torso, bf16

    def forward(self, observations: Tensor) -> Tensor:
        """Features float32 (N, features_dim) of images in [0, 1], (N, stack, H, W)."""
        with torch.autocast(observations.device.type, torch.bfloat16, enabled=self.bf16):
            features: Tensor = self.torso(observations)
        return features.float()


class MixedNatureCNN(NatureCNN):
    """SB3's own network, with its products in bf16; what comes after it stays fp32, as ratios of probabilities need it."""

    def forward(self, observations: Tensor) -> Tensor:
        """Features float32 (N, 512) of images in [0, 1], (N, stack, H, W)."""
        with torch.autocast(observations.device.type, torch.bfloat16):
            features: Tensor = super().forward(observations)
        return features.float()


def spaces_of(shape: Sequence[int], actions: int) -> tuple[spaces.Box, spaces.Discrete]:
    """What SB3 calls observations uint8 of `shape` (stack, H, W), and a number of actions."""
    return spaces.Box(0, 255, tuple(shape), np.uint8), spaces.Discrete(actions)


def policy_options(backbone: str, shape: Sequence[int], bf16: bool = False) -> dict[str, Any]:
    """How SB3 is to build its policy: the backbone, and one linear layer for each output on top of it."""
    # SB3's own class, wherever it takes the images: it is the same network, and its files are then read without ours.
    if backbone == "nature" and shape[1] >= 36:
        return {"features_extractor_class": MixedNatureCNN if bf16 else NatureCNN, "net_arch": []}
    options = {"backbone": backbone} | ({"bf16": True} if bf16 else {})
    return {"features_extractor_class": BackboneExtractor, "features_extractor_kwargs": options, "net_arch": []}


def make_policy(experiment: SB3Experiment, shape: Sequence[int], actions: int) -> BasePolicy:
    """The untrained policy on its own, without a model or environments."""
    kind: Any = (PPO if experiment.algorithm == "ppo" else DQN).policy_aliases["CnnPolicy"]
    policy: BasePolicy = kind(*spaces_of(shape, actions), lambda progress: 0.0, **policy_options(experiment.backbone, shape))
    return policy


class ActorAgent(Agent):
    """Plays by the probabilities of an actor."""

    meaning = "probability"

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """The probability of every action, float32 (N, actions)."""
        distribution: Any = self.policy.get_distribution(observations.to(self.policy.device)).distribution
        probabilities: Tensor = distribution.probs
        return probabilities.cpu()


def agent_of(policy: BasePolicy) -> Agent:
    """What plays by a policy of SB3."""
    policy.set_training_mode(False)
    return ActorAgent(policy) if isinstance(policy, ActorCriticPolicy) else QAgent(cast(DQNPolicy, policy).q_net, policy.device)


# Memory


class FrameMemory(ReplayBuffer):
    """Our memory, which keeps every frame once, behind the interface of SB3's: 7 GB instead of 56 for a million transitions.

    SB3's environments show the first frame of the next game where the final one of the last would stand, so final frames are
    no rows here. An end needs none, as nothing is bootstrapped from it. A game that was broken off would, so that one
    transition of it is kept for the stacks of frames only and never drawn.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        config: ReplayConfig | None = None,
    ) -> None:
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)  # ReplayBuffer's takes the 56 GB
        self.config = config or ReplayConfig(capacity=buffer_size)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        # With a discount of 1 the memory says by 1 or 0 whether there is something to bootstrap from; SB3 has the discount.
        shape = cast(tuple[int, int, int], self.obs_shape)
        self.frames = Replay(self.config, self.n_envs, shape, n_step=1, discount=1.0)
        self.started = np.ones(self.n_envs, np.bool_)
        """The next frame is the first of a game, (N,)."""

    def size(self) -> int:
        """Transitions that may be drawn."""
        return self.frames.sampleable

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Remember one transition of every game, (N, ...)."""
        broken_off = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        # SB3's own wrappers begin a new stack of frames even after a lost life; ours say that the game went on.
        ended = done & ~np.array([info.get("life_lost", False) for info in infos])
        self.frames.append(
            frames=obs[:, -1],
            actions=action.reshape(-1),
            rewards=reward.astype(np.float32),
            started=self.started,
            terminal=done & ~broken_off,
            ended=ended,
            playable=~broken_off,
        )
        self.started = ended

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Transitions drawn by NumPy's generator, as in SB3; observations uint8 (B, stack, H, W), all else (B, 1)."""
        seed = int(np.random.randint(2**31))

        def draw(attempt: int) -> Tensor:
            return torch.rand(batch_size, 2, generator=seeding.generator(seed, "replay", attempt))

        batch = self.frames.sample(batch_size, draw).to(self.device)
        actions, dones, rewards = batch.actions[:, None], 1 - batch.discounts[:, None], batch.returns[:, None]
        return ReplayBufferSamples(batch.observations, actions, batch.next_observations, dones, rewards)


# Training


class Record(BaseCallback):
    """Collects the games that end and what SB3 logs, under our names; nothing of it depends on the clock."""

    names: ClassVar[Mapping[str, tuple[str, int]]] = {
        "train/loss": ("loss", 1),
        "train/policy_gradient_loss": ("policy_loss", 1),
        "train/value_loss": ("value_loss", 1),
        "train/entropy_loss": ("entropy", -1),
        "train/approx_kl": ("approx_kl", 1),
        "train/clip_fraction": ("clip_fraction", 1),
        "train/explained_variance": ("explained_variance", 1),
        "train/learning_rate": ("lr", 1),
        "rollout/exploration_rate": ("epsilon", 1),
    }
    """What SB3 calls a number, what we call it, and its sign."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = {}

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self._add("return", info["episode"]["r"])
                self._add("length", info["episode"]["l"])
        return True

    def _add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(float(value))

    def read_logger(self) -> None:
        """Take over what SB3 has logged since the last time."""
        for name, value in self.logger.name_to_value.items():
            if name in self.names and not (name == "train/explained_variance" and math.isnan(value)):  # of returns that are all the same
                ours, sign = self.names[name]
                self._add(ours, sign * value)
        self.logger.dump()

    def take(self) -> dict[str, float]:
        """The mean of each number since the last time."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values.clear()
        return means


class Rest:
    """What SB3 keeps of a training beside weights, optimiser and memory, as a part of a checkpoint."""

    names = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate")

    def __init__(self, model: Any) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """Counters, and what the games showed last."""
        arrays = {"shown": self.model._last_obs, "starts": self.model._last_episode_starts}
        if isinstance(self.model, DQN):
            arrays["started"] = cast(FrameMemory, self.model.replay_buffer).started
        counters = {name: getattr(self.model, name) for name in self.names if hasattr(self.model, name)}
        return counters | {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name in set(self.names) & set(state):
            setattr(self.model, name, state[name])
        self.model._last_obs, self.model._last_episode_starts = state["shown"].numpy(), state["starts"].numpy()
        if "started" in state:
            self.model.replay_buffer.started = state["started"].numpy()


class Unsaved:
    """Stands in a checkpoint for environments that cannot say where they are."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        UserError: always.
        """
        raise UserError("a run with --environments classic cannot be resumed, as its games cannot be put back; train anew, or take native")


class SB3Task(ABC):
    """A training of SB3, an iteration of its loop at a time."""

    model: Any

    def __init__(self, experiment: SB3Experiment, trainer: Trainer) -> None:
        check(experiment, trainer)
        self.experiment, self.seed = experiment, trainer.config.seed
        self.environment = environment(experiment, self.seed)
        shape = self.environment.observation_space.shape or ()
        self.facts: dict[str, Any] = {"shape": list(shape), "actions": action_names(self.environment)}
        options = {"policy_kwargs": policy_options(experiment.backbone, shape, trainer.bf16), "device": trainer.world.device}
        torch.manual_seed(seeding.derive(self.seed, "weights", 0))
        self.model = self.create(self.environment, options)
        self.model.policy.to(memory_format=trainer.layout)
        if experiment.initial_zip is not None:
            adopt(self.model.policy, Path(experiment.initial_zip))
        self.record = Record()
        self.model.set_logger(Logger(None, []))
        self.model._setup_learn(trainer.config.steps * experiment.actions_per_step, self.record)
        self.tester = Tester(experiment.game, experiment.test, self.seed, experiment.usual_policy)

    @abstractmethod
    def create(self, environment: VecEnv, options: dict[str, Any]) -> BaseAlgorithm:
        """SB3's model."""

    @abstractmethod
    def iterate(self) -> None:
        """One turn of SB3's loop."""

    turns: int = 1
    """Turns of SB3's loop in a step of the trainer."""
    updates_per_count: int = 1
    """Updates for each one that SB3 counts."""

    def parts(self) -> Mapping[str, Stateful]:
        """The policy with all its networks, the optimiser, the games where they stand, and what else SB3 keeps."""
        place = self.environment if isinstance(self.environment, GamesVecEnv) else Unsaved()
        return {"model": self.model.policy, "optimizer": self.model.policy.optimizer, "games": place, "rest": Rest(self.model)}

    def step(self, trainer: Trainer) -> Metrics:
        """Play and learn as SB3 does, with the random numbers of this step."""
        seed = seeding.derive(self.seed, "sb3", trainer.step) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        self.model.action_space.seed(seed)  # PyTorch's own generator is set by the trainer
        try:
            with leaving(trainer.requested) if trainer.leaves_steps else nullcontext():
                for _ in range(self.turns):
                    self.iterate()
                    self.record.read_logger()
        except ValueError as error:
            if "Expected parameter logits" not in str(error):  # PyTorch refuses to draw by numbers that are not finite
                raise
            raise self._diverged(trainer) from None
        if not all(bool(weight.isfinite().all()) for weight in self.model.policy.parameters()):
            raise self._diverged(trainer)
        return self.record.take()

    def _diverged(self, trainer: Trainer) -> TrainingStopped:
        hint = f"try a smaller --{self.experiment.algorithm}.lr and --resume from the last checkpoint"
        run = trainer.media.parent if trainer.media else "RUN"
        again = f"see it happen again: python scripts/replay_step.py {run} --step {trainer.step + 1}"
        return TrainingStopped(f"stopped at step {trainer.step}: the network's numbers are not finite any more; {hint}; {again}")

    def hooks(self, trainer: Trainer) -> Sequence[Every]:
        """How far the run is, how well the agent plays, and in the end a file for other users of SB3."""
        return [
            Every(trainer.config.log_every, lambda: self.progress(trainer)),
            Every(trainer.config.preview_every, lambda: self.progress(trainer) | self.test(trainer)),
            Every(trainer.config.steps, lambda: self.export(trainer)),
        ]

    def progress(self, trainer: Trainer) -> dict[str, float | int | str]:
        """The axes: frames of the emulator, actions, and updates so far."""
        actions = self.model.num_timesteps
        skip = 1 if self.experiment.game.rom in games.SMALL else self.experiment.game.frame_skip
        return {"frames": actions * skip, "actions": actions, "updates": self.model._n_updates * self.updates_per_count}

    def test(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Scores of whole games that are played for nothing else, and now and then a video."""
        return self.tester(agent_of(self.model.policy), trainer)

    def export(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Write export/model.zip into the run folder."""
        if trainer.media:
            write_zip(self.model, trainer.media.parent / "export" / "model.zip")
        return {}


class PPOTask(SB3Task):
    """PPO: some actions in every game, then some epochs of learning from them."""

    long_steps = True  # of a thousand actions and more: seconds on a CPU

    def create(self, environment: VecEnv, options: dict[str, Any]) -> BaseAlgorithm:
        """SB3's model."""
        config: PPOConfig = self.experiment.ppo
        self.updates_per_count = config.games * config.n_steps // config.batch_size  # SB3 counts epochs
        return PPO(
            "CnnPolicy",
            environment,
            learning_rate=LinearSchedule(config.lr, config.lr * config.final_lr, 1.0),
            n_steps=config.n_steps,
            batch_size=config.batch_size,
            n_epochs=config.epochs,
            gamma=config.discount,
            gae_lambda=config.gae_lambda,
            clip_range=LinearSchedule(config.clip, config.clip * config.final_clip, 1.0),
            ent_coef=config.entropy,
            vf_coef=config.value,
            max_grad_norm=config.max_grad_norm,
            **options,
        )

    def iterate(self) -> None:
        """The body of `OnPolicyAlgorithm.learn`."""
        self.model.collect_rollouts(self.environment, self.record, self.model.rollout_buffer, n_rollout_steps=self.model.n_steps)
        self.model._update_current_progress_remaining(self.model.num_timesteps, self.model._total_timesteps)
        self.model.train()


class DQNTask(SB3Task):
    """DQN: an action in every game or several, then an update or several, over and over."""

    def create(self, environment: VecEnv, options: dict[str, Any]) -> BaseAlgorithm:
        """SB3's model, with our memory."""
        config: SB3DQNConfig = self.experiment.dqn
        self.turns = config.actions_per_step // config.train_every
        replay = self.experiment.replay
        check_room(replay, config.games, tuple(self.facts["shape"]))
        return DQN(
            "CnnPolicy",
            environment,
            learning_rate=config.lr,
            buffer_size=replay.capacity,
            learning_starts=config.learning_starts,
            batch_size=config.batch_size,
            gamma=config.discount,
            train_freq=config.train_every // config.games,  # which SB3 counts in actions of each game
            gradient_steps=config.gradient_steps,
            replay_buffer_class=FrameMemory,
            replay_buffer_kwargs={"config": replay},
            target_update_interval=config.target_every,
            exploration_fraction=config.exploration_fraction,
            exploration_final_eps=config.final_epsilon,
            max_grad_norm=config.max_grad_norm,
            **options,
        )

    def parts(self) -> Mapping[str, Stateful]:
        """Also the memory."""
        return {**super().parts(), "replay": self.model.replay_buffer.frames}

    def iterate(self) -> None:
        """The body of `OffPolicyAlgorithm.learn`."""
        model = self.model
        model.collect_rollouts(self.environment, self.record, model.train_freq, model.replay_buffer, learning_starts=model.learning_starts)
        if model.num_timesteps > model.learning_starts:
            model.train(model.gradient_steps, model.batch_size)


TASKS: Mapping[str, type[SB3Task]] = {"ppo": PPOTask, "dqn": DQNTask}


def check(experiment: SB3Experiment, trainer: Trainer) -> None:
    """Raises:
    UserError: something is asked for that SB3 does in its own way.
    """
    if trainer.world.size > 1:
        raise UserError("train_sb3.py runs as one process; to use more, start one run for each seed")
    config = trainer.config
    if config.compile or config.accumulate > 1:
        raise UserError("stable-baselines3 updates in its own way: leave trainer.compile and trainer.accumulate at their defaults")
    if experiment.replay.prioritised:
        raise UserError("replay.prioritised: stable-baselines3's DQN draws uniformly; train_dqn.py can prioritise")


def environment(experiment: SB3Experiment, seed: int) -> VecEnv:
    """The games to learn in."""
    config, count, seed = experiment.game, experiment.games, seeding.derive(seed, "games", 0)
    if experiment.environments == "classic":
        return classic(config, count, seed, experiment.life_loss, experiment.clip_rewards)
    return GamesVecEnv(games.make(config, count, seed), life_loss=experiment.life_loss, clip_rewards=experiment.clip_rewards)


def action_names(environment: VecEnv) -> list[str]:
    """What the actions are called, in order."""
    if isinstance(environment, GamesVecEnv):
        return list(environment.games.actions)
    return list(environment.env_method("get_action_meanings", indices=0)[0])


# SB3's files


def write_zip(model: BaseAlgorithm, path: Path) -> None:
    """Save a model in SB3's own format, which `PPO.load` and `DQN.load` read.

    Beside the weights such a file holds pickles, of settings only: who reads it runs them.
    """
    plain: Any = copy.copy(model)
    for name in ("_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"):
        setattr(plain, name, None)
    if isinstance(plain, DQN):  # with SB3's memory, and a small one, as whoever reads the file allocates it
        plain.replay_buffer_class, plain.replay_buffer_kwargs, plain.buffer_size = None, {}, min(plain.buffer_size, 10_000)
    if plain.policy_kwargs["features_extractor_class"] is MixedNatureCNN:  # a class that others do not have
        plain.policy_kwargs = plain.policy_kwargs | {"features_extractor_class": NatureCNN}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    plain.save(unfinished)
    os.replace(unfinished, path)


def export(name: str) -> Path:
    """Write export/model.zip of a run that was stopped before its end, from its newest checkpoint (or one that is named)."""
    found, names = runs.find(name, ["sb3"]), ("model", "optimizer", "rest")
    settings: SB3Experiment = loading.settings_of(found.run, {"sb3": "rl.sb3"})
    task: Any = Trainer(dataclasses.replace(settings, environments="native", initial_zip=None), World()).task
    checkpoint.restore({name: task.parts()[name] for name in names}, loading.saved(found, only=names).parts)
    write_zip(task.model, path := found.run.folder / "export" / "model.zip")
    return path


def read_zip(path: Path) -> dict[str, Tensor]:
    """The weights of the policy in a file of SB3.

    The rest of the file is pickled Python, which runs whatever it likes when it is loaded; it is left alone. The weights are
    read by PyTorch's restricted loader, which makes tensors and nothing else.

    Raises:
        UserError: no such file, or there is more than weights where the weights should be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            weights = _weights(archive, archive.getinfo("policy.pth"))
    except OSError as error:
        raise UserError(f"initial_zip: {path} cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, KeyError):
        raise UserError(f"initial_zip: {path} is no file that stable-baselines3 saved") from None
    if not isinstance(weights, dict):
        raise UserError(f"initial_zip: {path} holds something else than weights, which is not loaded since it could run code")
    return weights


def _weights(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """What the restricted loader makes of a file in an archive; None where it makes nothing of it, or it unpacks to too much."""
    if member.file_size > LARGEST_POLICY:  # it never unpacks to more than it says
        return None
    try:
        content = io.BytesIO(archive.read(member))
        if zipfile.is_zipfile(content):
            with zipfile.ZipFile(content) as inner:
                if any(part.compress_type != zipfile.ZIP_STORED for part in inner.infolist()):  # PyTorch stores them as they are
                    return None
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # whatever is said of what is damaged or not to be loaded
        return None


def adopt(policy: BasePolicy, path: Path) -> None:
    """Give a policy the weights in a file of SB3.

    Raises:
        UserError: they are those of another network.
    """
    try:
        missing, unexpected = policy.load_state_dict(read_zip(path), strict=False)
    except RuntimeError as error:
        raise UserError(f"initial_zip: {path} holds another network ({str(error).splitlines()[-1].strip()})") from None
    # Other names of the same weights, which SB3 did not write before version 1.7.
    missing = [name for name in missing if not name.startswith(("pi_features_extractor", "vf_features_extractor"))]
    if names := [*missing, *unexpected]:
        raise UserError(f"initial_zip: {path} holds another network; {names[0]} and {len(names) - 1} other weights do not match")
