"""stable-baselines3 in our loop: against its own `learn`, its own memory and its own files."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from envs.games import GameConfig, make
from envs.sb3 import GamesVecEnv, classic
from lab import checkpoint, seeding
from lab.config import UserError, dump
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.recorder import Lines, Recorder
from lab.runs import Run, create
from lab.tracking import Tracker, TrackingConfig
from lab.trainer import DONE, Trainer, TrainingStopped
from rl import agent, stable_baselines
from rl.evaluate import TestConfig
from rl.replay import ReplayConfig
from rl.sb3 import PPOConfig, SB3DQNConfig, SB3Experiment

STEPS = 6
GAMES = {"catch": GameConfig(name="catch", stack=2, max_frames=50), "breakout": GameConfig(name="breakout", size=36, max_frames=240)}


def experiment(name="catch", algorithm="ppo", **changes) -> SB3Experiment:
    """A training so small that it takes a second."""
    many = 4 if name == "catch" else 2  # an emulator takes a quarter of a second to start
    small = {"batch_size": 8, "learning_starts": 40, "train_every": 8, "actions_per_step": 64, "target_every": 28}
    settings = {
        "name": "small",
        "algorithm": algorithm,
        "game": GAMES[name],
        "backbone": "small" if name == "catch" else "nature",
        "ppo": PPOConfig(games=many, n_steps=24, batch_size=12 * many, epochs=2),
        "dqn": SB3DQNConfig(games=many, **small, exploration_fraction=0.8),
        "replay": ReplayConfig(capacity=200),
        "test": TestConfig(games=1, video_every=0),
        "trainer": TrainerConfig(steps=STEPS, log_every=2, save_every=3, preview_every=6, seed=5),
        "tracking": TrackingConfig(mode="disabled"),
    }
    return SB3Experiment(**settings | changes)


def trained(settings: SB3Experiment, run: Run) -> Trainer:
    """Train to the end, from wherever the run is, as the launcher does."""
    trainer = Trainer(settings, World())
    recorder = Recorder(run, Tracker(), Lines("small", settings.trainer.steps))
    if size := trainer.resume(run):
        with run.metrics.open("r+b") as file:
            file.truncate(size)
    recorder.start(trainer.step)
    assert trainer.fit(run, recorder) == DONE
    recorder.close()
    return trainer


def new_run(settings: SB3Experiment, folder: Path) -> Run:
    return create("small", folder, dump(settings, "sb3"))


def fingerprint(run: Run) -> dict[str, str]:
    """SHA-256 of the metrics and of all that the last checkpoint holds."""
    last = checkpoint.folders(run.checkpoints)[0]
    files = [run.metrics, *sorted(last.glob("*.*")), *sorted((run.checkpoints / "segments").glob("*"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "manifest.json"}


# Exactly on


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
@pytest.mark.parametrize("name", ["catch", "breakout"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_if_it_had_never_stopped(name: str, algorithm: str, tmp_path: Path) -> None:
    settings = experiment(name, algorithm)
    whole = new_run(settings, tmp_path / "whole")
    trained(settings, whole)
    shutil.copytree(whole.folder, tmp_path / "killed")
    killed = Run(tmp_path / "killed")
    shutil.rmtree(killed.checkpoints / f"step_{STEPS:09d}")
    random.seed(1), np.random.seed(1)  # nothing may hang on what was drawn before
    assert trained(settings, killed).step == STEPS
    names = set(fingerprint(whole))
    assert {"model.safetensors", "optimizer.safetensors", "rest.json", "metrics.jsonl"} <= names
    assert any(name.startswith("replay_") for name in names) == (algorithm == "dqn")
    assert fingerprint(killed) == fingerprint(whole)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_what_is_remembered_as_shown_last_is_what_the_games_show(algorithm: str) -> None:
    task = Trainer(experiment(algorithm=algorithm), World()).task
    for _ in range(4):
        task.iterate()
    assert np.array_equal(task.model._last_obs, task.environment.games.last.observations)
    if algorithm == "dqn":
        assert np.array_equal(task.model.replay_buffer.started, task.environment.games.last.started)


# Against SB3's own loop


class Seeds(BaseCallback):
    """Gives SB3's `learn` the random numbers that our trainer gives."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns, self.turn = turns, 0

    def _on_rollout_start(self) -> None:
        step, inside = divmod(self.turn, self.turns)
        self.turn += 1
        if inside == 0:
            torch.default_generator.manual_seed(seeding.derive(5, "global/0", step))
            seed = seeding.derive(5, "sb3", step) % 2**32
            random.seed(seed), np.random.seed(seed), self.model.action_space.seed(seed)

    def _on_step(self) -> bool:
        return True


def plain(settings: SB3Experiment, kind, **options):
    """A model made of SB3 alone, but for the games."""
    games = make(settings.game, settings.games, seeding.derive(5, "games", 0))
    torch.manual_seed(seeding.derive(5, "weights", 0))
    environment = GamesVecEnv(games, life_loss=True, clip_rewards=True)
    shared = stable_baselines.policy_options(settings.backbone, games.shape)
    model = kind("CnnPolicy", environment, policy_kwargs=shared, device="cpu", **options)
    model.policy.to(memory_format=torch.channels_last)
    return model


def assert_same_weights(one, other) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_our_loop_trains_a_ppo_to_the_same_weights_as_learn_does() -> None:
    settings = experiment()
    trainer = Trainer(settings, World())
    trainer.fit()
    lr, clip = LinearSchedule(2.5e-4, 0.0, 1.0), LinearSchedule(0.1, 0.0, 1.0)
    model = plain(settings, PPO, n_steps=24, batch_size=48, n_epochs=2, learning_rate=lr, clip_range=clip, ent_coef=0.01)
    fresh = {name: weight.clone() for name, weight in model.policy.state_dict().items()}
    model.learn(STEPS * 96, callback=Seeds(1))
    assert_same_weights(trainer.task.model.policy, model.policy)
    assert not torch.equal(fresh["action_net.weight"], model.policy.state_dict()["action_net.weight"])
    assert trainer.task.progress(trainer) == {"frames": 576, "actions": 576, "updates": STEPS * 2 * 2}


def test_bf16_is_taken_for_what_sees_alone_and_changes_the_probabilities_little() -> None:
    precise, coarse = (
        Trainer(experiment("breakout", trainer=TrainerConfig(steps=1, precision=precision)), World()).task.model.policy
        for precision in ("fp32", "bf16")
    )
    observations = torch.randint(0, 256, (30, 4, 36, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact, near = (policy.get_distribution(observations).distribution.logits for policy in (precise, coarse))
    assert near.dtype == torch.float32
    assert not torch.equal(exact, near)
    torch.testing.assert_close(exact, near, atol=2e-3, rtol=0)


def test_our_loop_trains_a_dqn_to_the_same_weights_as_learn_does() -> None:
    settings = experiment(algorithm="dqn")
    trainer = Trainer(settings, World())
    trainer.fit()
    config = {"buffer_size": 200, "learning_starts": 40, "batch_size": 8, "train_freq": 2, "target_update_interval": 28}
    exploring = {"exploration_fraction": 0.8, "exploration_final_eps": 0.01}
    model = plain(settings, DQN, replay_buffer_class=stable_baselines.FrameMemory, **config, **exploring)
    model.learn(STEPS * 64, callback=Seeds(8), log_interval=None)
    assert_same_weights(trainer.task.model.policy, model.policy)
    assert trainer.task.progress(trainer) == {"frames": 384, "actions": 384, "updates": (384 - 40) // 8}


def test_rows_hold_what_sb3_says_under_our_names(tmp_path: Path) -> None:
    learnt = {}
    for algorithm in ("ppo", "dqn"):
        run = new_run(settings := experiment(algorithm=algorithm), tmp_path / algorithm)
        trained(settings, run)
        learnt[algorithm] = run.last_values()
    shared = {"train/loss", "train/lr", "train/return", "train/length", "eval/return", "eval/length", "frames", "actions", "updates"}
    ppo = {"train/policy_loss", "train/value_loss", "train/entropy", "train/approx_kl", "train/clip_fraction", "train/explained_variance"}
    assert shared | ppo <= set(learnt["ppo"])
    assert shared | {"train/epsilon"} <= set(learnt["dqn"])
    assert 0 < learnt["ppo"]["train/entropy"] <= np.log(3)
    assert 0.01 <= learnt["dqn"]["train/epsilon"] < 0.5
    assert not [name for values in learnt.values() for name in values if "time" in name or "fps" in name]


# Memory


class Both(stable_baselines.FrameMemory):
    """Our memory, and beside it SB3's own with the same transitions."""

    def reset(self) -> None:
        super().reset()
        self.theirs = ReplayBuffer(self.buffer_size, self.observation_space, self.action_space, "cpu", self.n_envs)

    def add(self, *transitions) -> None:
        super().add(*transitions)
        self.theirs.add(*transitions)


def memories(environment, actions: int) -> Both:
    """Both memories of random play, as SB3 fills them."""
    torch.manual_seed(0)
    options = stable_baselines.policy_options("small", environment.observation_space.shape)
    model = DQN("CnnPolicy", environment, 1e-4, actions, 10**9, replay_buffer_class=Both, policy_kwargs=options, device="cpu")
    model.action_space.seed(0)
    model.learn(actions - environment.num_envs)
    environment.close()
    return model.replay_buffer


def assert_same_transitions(both: Both) -> dict[str, int]:
    """Compare each transition; says how many of each kind there were."""
    ours, theirs, count = both.frames, both.theirs, both.n_envs
    times, games = (grid.flatten() for grid in torch.meshgrid(torch.arange(ours.written - 1), torch.arange(count), indexing="ij"))
    playable = ours.read(0, ours.written - 1)["playable"].flatten()
    mine = ours.gather(times, games)
    cut = torch.from_numpy(theirs.timeouts[: ours.written - 1]).flatten() > 0
    done = torch.from_numpy(theirs.dones[: ours.written - 1]).flatten() > 0
    assert torch.equal(playable, ~cut)
    assert torch.equal((mine.discounts == 0)[playable], done[playable])
    for tensor, array in ((mine.observations, theirs.observations), (mine.actions, theirs.actions), (mine.returns, theirs.rewards)):
        assert np.array_equal(tensor.numpy().reshape(-1), array[: ours.written - 1].reshape(-1))
    alive = playable & ~done
    assert torch.equal(mine.next_observations[alive], torch.from_numpy(theirs.next_observations[: ours.written - 1]).flatten(0, 1)[alive])
    return {"alive": int(alive.sum()), "done": int((done & ~cut).sum()), "cut": int(cut.sum())}


def test_our_memory_holds_the_same_transitions_as_sb3s() -> None:
    game = make(GameConfig(name="bricks", stack=3, max_frames=60), 4, 3)
    seen = assert_same_transitions(memories(GamesVecEnv(game, life_loss=True, clip_rewards=True), 2400))
    assert seen["alive"] > 2000
    assert seen["done"] > 50
    assert seen["cut"] > 2


def test_our_memory_holds_what_sb3s_own_wrappers_show_too() -> None:
    environment = classic(GameConfig(name="breakout", max_frames=400), 1, 0, True, True)
    seen = assert_same_transitions(memories(environment, 500))
    assert seen["done"] > 5
    assert seen["cut"] > 1


def test_samples_have_the_shapes_and_kinds_of_sb3s_and_repeat_with_numpys_seed() -> None:
    both = memories(GamesVecEnv(make(GAMES["catch"], 4, 0)), 400)
    np.random.seed(3)
    mine, theirs = both.sample(16), both.theirs.sample(16)
    np.random.seed(3)
    again = both.sample(16)
    for name in ("observations", "next_observations", "dones", "rewards"):
        one, other = getattr(mine, name), getattr(theirs, name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, getattr(again, name))
    assert mine.actions.shape == theirs.actions.shape
    assert mine.discounts is None
    assert both.size() == both.frames.sampleable > 300
    both.reset()
    assert both.size() == 0
    assert both.started.all()


# Learning and agents


def test_ppo_learns_catch() -> None:
    faster = PPOConfig(games=8, n_steps=64, batch_size=128, lr=3e-3, clip=0.2, entropy=0.003, discount=0.95)
    settings = experiment(ppo=faster, trainer=TrainerConfig(steps=16), game=GameConfig(name="catch", stack=2))
    trainer = Trainer(settings, World())
    scores = []
    while trainer.step < settings.trainer.steps:
        torch.default_generator.manual_seed(trainer.step)
        scores.append(trainer.task.step(trainer).get("return"))
        trainer.step += 1
    scores = [score for score in scores if score is not None]
    assert scores[0] < -2  # where chance is
    assert np.mean(scores[-3:]) > 2


def test_agents_say_what_their_values_mean(tmp_path: Path) -> None:
    observations = torch.randint(0, 256, (5, 2, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for algorithm, meaning, policy in (("ppo", "probability", "sampled"), ("dqn", "Q-value", "epsilon")):
        run = new_run(settings := experiment(algorithm=algorithm), tmp_path / algorithm)
        trainer = trained(settings, run)
        loaded = agent.load(str(run.folder))
        values = loaded.agent.values(observations)
        assert loaded.agent.meaning == meaning
        assert loaded.experiment.usual_policy == policy
        assert (values.shape, values.dtype) == ((5, 3), torch.float32)
        torch.testing.assert_close(values, stable_baselines.agent_of(trainer.task.model.policy).values(observations))
        if algorithm == "ppo":
            torch.testing.assert_close(values.sum(1), torch.ones(5))
        assert torch.equal(loaded.agent.act(observations, "greedy", 0, torch.Generator()), values.argmax(1))


# Files


@pytest.mark.parametrize(("algorithm", "precision"), [("ppo", "fp32"), ("dqn", "bf16"), ("ppo", "bf16")])
def test_plain_sb3_reads_what_a_run_leaves_and_plays_the_same(algorithm: str, precision: str, tmp_path: Path) -> None:
    trainer = TrainerConfig(steps=STEPS, log_every=2, save_every=3, preview_every=6, precision=precision)
    run = new_run(settings := experiment("breakout", algorithm, trainer=trainer), tmp_path / "run")
    trained(settings, run)
    exported = run.folder / "export" / "model.zip"
    model = (PPO if algorithm == "ppo" else DQN).load(exported, device="cpu")
    observations = torch.randint(0, 256, (30, 4, 36, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs, _ = model.predict(observations.numpy(), deterministic=True)
    values = agent.load(str(run.folder)).agent.values(observations)
    assert np.array_equal(theirs, values.argmax(1).numpy())
    with zipfile.ZipFile(exported) as archive:
        data = archive.read("data")
    assert b"rl.stable_baselines" not in b"".join(pickled(data)) + data  # whoever reads it needs nothing of ours
    exported.unlink()
    assert stable_baselines.export(str(run.folder)) == exported
    again = type(model).load(exported, device="cpu")
    assert_same_weights(model.policy, again.policy)
    assert again.num_timesteps == model.num_timesteps > 0


def pickled(data: bytes) -> list[bytes]:
    """The pickles inside the settings of a zip file."""
    return [
        base64.b64decode(value[":serialized:"])
        for value in json.loads(data).values()
        if isinstance(value, dict) and ":serialized:" in value
    ]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO for Breakout that SB3 alone has made."""
    path = tmp_path_factory.mktemp("stranger") / "model.zip"
    environment = GamesVecEnv(make(GAMES["breakout"], 1, 0))
    PPO("CnnPolicy", environment, n_steps=8, batch_size=8, seed=1, device="cpu").save(path)
    return path


def rewritten(source: Path, target: Path, **members: bytes) -> Path:
    """A copy of a zip file with other members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.replace(".", "_"), old.read(name)))
    return target


def test_a_run_can_start_from_the_weights_of_a_stranger(stranger: Path) -> None:
    task = Trainer(experiment("breakout", initial_zip=str(stranger)), World()).task
    assert_same_weights(task.model.policy, PPO.load(stranger, device="cpu").policy)


def test_nothing_in_a_zip_file_is_run(stranger: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung), protocol=2)
    data = json.dumps({"policy_class": {":type:": "x", ":serialized:": base64.b64encode(trap).decode()}}).encode()
    baited = rewritten(stranger, tmp_path / "settings.zip", data=data)
    Trainer(experiment("breakout", initial_zip=str(baited)), World())
    assert not sprung.exists()
    torch.save(Trap(sprung), tmp_path / "trap.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for content in (trap, (tmp_path / "trap.pth").read_bytes(), (tmp_path / "list.pth").read_bytes()):
        with pytest.raises(UserError, match="something else than weights"):
            stable_baselines.read_zip(rewritten(stranger, tmp_path / "weights.zip", policy_pth=content))
    assert not sprung.exists()
    with contextlib.suppress(Exception):
        PPO.load(baited)
    assert sprung.exists()  # the trap does work


def test_files_that_do_not_fit_are_refused_in_a_sentence(stranger: Path, tmp_path: Path) -> None:
    def start(path: Path, **changes) -> None:
        Trainer(experiment("breakout", initial_zip=str(path), **changes), World())

    (tmp_path / "text.zip").write_text("no zip file")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme", "no model")
    with pytest.raises(UserError, match="cannot be read"):
        start(tmp_path / "missing.zip")
    for name in ("text.zip", "empty.zip"):
        with pytest.raises(UserError, match="no file that stable-baselines3 saved"):
            start(tmp_path / name)
    with pytest.raises(UserError, match=r"another network \(.*size mismatch"):
        start(stranger, game=GameConfig(name="pong", size=36))
    with pytest.raises(UserError, match="other weights do not match"):
        start(stranger, algorithm="dqn")


# Mistakes


def test_what_cannot_be_is_said_in_a_sentence() -> None:
    with pytest.raises(UserError, match="runs as one process"):
        Trainer(experiment(), World(rank=0, size=2))
    with pytest.raises(UserError, match="updates in its own way"):
        Trainer(experiment(trainer=TrainerConfig(compile=True)), World())
    with pytest.raises(UserError, match="draws uniformly"):
        Trainer(experiment(replay=ReplayConfig(prioritised=True)), World())
    with pytest.raises(UserError, match="catch is none; take native"):
        Trainer(experiment(environments="classic"), World())
    with pytest.raises(UserError, match="did you mean nature"):
        Trainer(experiment(backbone="natrue"), World())
    with pytest.raises(ValueError, match="batch_size must divide games x n_steps"):
        PPOConfig(batch_size=100)
    with pytest.raises(ValueError, match="train_every must be a multiple of games"):
        SB3DQNConfig(games=3)
    with pytest.raises(ValueError, match="actions_per_step must be a multiple of train_every"):
        SB3DQNConfig(actions_per_step=6)
    with pytest.raises(ValueError, match="learning_starts must be at least games"):
        SB3DQNConfig(learning_starts=3)


def test_a_run_in_classic_environments_says_that_it_cannot_be_resumed() -> None:
    settings = experiment("breakout", environments="classic", ppo=PPOConfig(games=1, n_steps=8, batch_size=8, epochs=1))
    trainer = Trainer(settings, World())
    trainer.task.iterate()
    parts = trainer.task.parts()
    assert trainer.task.facts == {"shape": [4, 36, 36], "actions": ["NOOP", "FIRE", "RIGHT", "LEFT"]}
    with pytest.raises(UserError, match="cannot be resumed"):
        checkpoint.restore(parts, {name: part.state_dict() for name, part in parts.items()})
    trainer.task.environment.close()


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_weights_that_are_not_finite_stop_the_run(algorithm: str) -> None:
    wild = experiment()
    wild = dataclasses.replace(
        wild, algorithm=algorithm, ppo=dataclasses.replace(wild.ppo, lr=1e30), dqn=dataclasses.replace(wild.dqn, lr=1e30)
    )
    with pytest.raises(TrainingStopped, match=rf"not finite any more; try a smaller --{algorithm}\.lr"):
        Trainer(wild, World()).fit()


def test_settings_are_read_without_anything_heavy() -> None:
    heavy = ("gymnasium", "stable_baselines3", "ale_py", "matplotlib", "wandb")
    code = f"import sys, rl.sb3; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
