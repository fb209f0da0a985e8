"""The benchmarks beside peers, of start-up and of growth: each command runs to its end and counts what it says it counts."""

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.scripts.test_scripts import ROOT


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, which find each other as they do when one is started."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("turns", "replay", "peers", "startup", "growth", "ablation")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def started(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A benchmark, as a user starts it."""
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *words], capture_output=True, text=True)


def test_replay(tmp_path: Path) -> None:
    out = tmp_path / "replay.json"
    words = ["--capacity", "20000", "--their-capacity", "2000", "--batches", "4", "--rounds", "1", "--seconds", "0.01", "--threads", "1"]
    done = started("replay.py", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "of stable-baselines3's time" in done.stdout
    report = json.loads(out.read_text())
    assert report["threads"] == 1
    rows = {name: turns[0] for name, turns in report["results"].items()}
    frame = 84 * 84
    # A process grows by a little more than the memory it holds; the smaller the memory, the more that is in proportion.
    assert frame < rows["ours"]["bytes"] < 2 * frame
    assert 4 * frame < rows["stable-baselines3, optimised"]["bytes"] < 7 * frame
    assert 8 * frame < rows["stable-baselines3"]["bytes"] < 11 * frame
    assert 0.99 * 20_000 < rows["ours"]["transitions"] < 20_000  # last frames of games are no transitions
    assert all(min(row["fetched"]["4"], row["ready"]["4"], row["stored"]) > 0 for row in rows.values())


def test_startup(tmp_path: Path) -> None:
    out = tmp_path / "startup.json"
    done = started("startup.py", "--presets", "dqn_catch", "--no-help", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (seconds,) = json.loads(out.read_text())["first_step"]["dqn_catch"]
    assert 0.5 < seconds < 300


def test_startup_of_a_preset_that_is_not_there(tmp_path: Path) -> None:
    done = started("startup.py", "--presets", "dqn_cacth", "--out", str(tmp_path / "startup.json"))
    assert (done.returncode, done.stderr) == (2, "error: --presets dqn_cacth: there is no such file below configs/\n")


def test_presets_that_need_a_run_get_one_of_the_same_set(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    startup = benchmarks["startup"]
    (tmp_path / "vqvae_digits").mkdir()  # as if it had been trained before
    words = startup.command("tokens_digits", tmp_path)
    assert words[1:3] == [str(ROOT / "scripts/train_tokens.py"), str(ROOT / "configs/generative/tokens_digits.yaml")]
    assert words[-2:] == ["--vqvae", str(tmp_path / "vqvae_digits")]


def test_every_default_preset_of_startup_is_there(benchmarks: dict[str, ModuleType]) -> None:
    startup = benchmarks["startup"]
    assert set(startup.PRESETS) <= set(startup.presets())


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    out, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    done = started("growth.py", "--parts", "batch", "--seconds", "0.01", "--threads", "1", "--out", str(out), "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    curves = json.loads(out.read_text())["results"]["batch"]
    assert set(curves) == {"fp32", "bf16"}
    assert all([size for size, _ in points] == [16, 32, 64, 128, 256, 512, 1024] for points in curves.values())
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 300


def test_growth_without_figures_is_told(tmp_path: Path) -> None:
    done = started("growth.py", "--parts", "--out", str(tmp_path / "growth.json"))
    assert done.returncode == 2
    assert done.stderr.endswith("growth.json holds no figures yet; name some --parts\n")


def test_the_clock_of_the_peers_counts_whole_steps(benchmarks: dict[str, ModuleType]) -> None:
    clock = benchmarks["peers"].Clock(seconds=0, steps=7)
    seen: list[int] = []
    clock.watch(lambda: seen.extend(clock.between(range(100))))
    assert clock.done == 7

    def forgiving() -> None:
        while True:
            with contextlib.suppress(Exception):
                clock.tick()

    clock = benchmarks["peers"].Clock(seconds=0.01, steps=0)
    clock.watch(forgiving)
    assert clock.done > benchmarks["peers"].WARM_UP
    assert clock.passed > 0.01
    assert clock.rate == pytest.approx((clock.done - benchmarks["peers"].WARM_UP) * 128 / clock.passed)


def test_torchvision_is_empty_for_a_moment_only(benchmarks: dict[str, ModuleType]) -> None:
    before = {name for name in sys.modules if name.startswith("torchvision")}
    with benchmarks["peers"].empty_torchvision():
        from torchvision import transforms, utils

        assert not hasattr(transforms, "Compose")
        assert not hasattr(utils, "save_image")
    assert {name for name in sys.modules if name.startswith("torchvision")} == before


def test_a_peer_that_cannot_be_installed_is_left_out(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = benchmarks["peers"]
    monkeypatch.setitem(peers.REQUIRED, "pythae", (str(tmp_path / "nowhere.whl"),))
    monkeypatch.setattr(peers.console, "_file", sys.stdout)  # the property's undo would leave a closed file behind
    assert not peers.installed("pythae", tmp_path / "home")
    assert "pythae cannot be installed" in capsys.readouterr().out
    assert not list((tmp_path / "home").iterdir())


def test_our_experiments_beside_the_peers(benchmarks: dict[str, ModuleType]) -> None:
    peers = benchmarks["peers"]
    vae = peers.our_experiment("vae", "ours, fp32", 10, "digits")
    assert (vae.model.network.layers, vae.model.network.hidden, vae.model.latent) == (1, 512, 32)  # pythae's
    assert (vae.trainer.precision, vae.trainer.steps, vae.data.name, vae.data.batch_size) == ("fp32", 10, "digits", 128)
    diffusion = peers.our_experiment("diffusion", "ours, unfolded", 10, "digits")
    assert (diffusion.model.network, diffusion.model.conditional) == (peers.UNFOLDED, False)
    assert diffusion.trainer.precision == "auto"


# What each part of Rainbow is worth


def test_the_agents_of_the_ablation_differ_from_their_like_in_one_part(benchmarks: dict[str, ModuleType]) -> None:
    ablation = benchmarks["ablation"]
    assert len(ablation.AGENTS) == len({frozenset(parts) for parts in ablation.AGENTS.values()}) == 16
    plain, whole = ablation.settings(()), ablation.settings(ablation.RAINBOW)
    assert set(plain) == set(whole)
    assert all(plain[name] != whole[name] for name in plain)
    for name, parts in ablation.AGENTS.items():
        given = ablation.settings(parts)
        other = whole if name.startswith("rainbow -") else plain
        assert sum(given[key] != other[key] for key in given) == 1 or name in ("plain", "rainbow", "rainbow, quantile")


def test_the_ablation_trains_what_is_missing_and_keeps_the_rest(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ablation, trained = benchmarks["ablation"], []
    monkeypatch.setattr(ablation, "score", lambda *what: trained.append(what) or float(len(trained)))
    out, table = tmp_path / "ablation.json", tmp_path / "ablation.md"
    words = ["ablation.py", "--only", "plain", "rainbow", "--actions", "640", "--out", str(out), "--table", str(table), "--seeds"]
    for seeds in (["1"], ["0", "1", "2"]):
        monkeypatch.setattr(sys, "argv", [*words, *seeds])
        assert ablation.main() == 0
    assert trained == [("catch", agent, seed, 640) for seed in (1, 0, 2) for agent in ("plain", "rainbow")]
    scores = json.loads(out.read_text())["catch, 640 actions"]["scores"]
    assert scores == {"plain": {"1": 1.0, "0": 3.0, "2": 5.0}, "rainbow": {"1": 2.0, "0": 4.0, "2": 6.0}}
    rows = [line for line in table.read_text().splitlines() if line.startswith(("| plain", "| rainbow"))]
    # Student's t: 4.303 standard errors of three seeds, each 2 / sqrt(3)
    assert rows == ["| rainbow | 4.00 (-0.97 to 8.97) | 4.00, 2.00, 6.00 |", "| plain | 3.00 (-1.97 to 7.97) | 3.00, 1.00, 5.00 |"]


def test_a_run_of_the_ablation_goes_on_where_it_was_stopped(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ablation, asked = benchmarks["ablation"], []
    monkeypatch.setattr(ablation, "HOME", tmp_path)
    folder = tmp_path / "catch/640/rainbow_-_noisy/seed_3"

    def said(words: list[str]) -> str:
        asked.append(words)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").touch()
        (folder / "metrics.jsonl").write_text('{"step": 20, "eval/return": 7.5}\n')
        return ""

    monkeypatch.setattr(ablation, "said", said)
    assert [ablation.score("catch", "rainbow - noisy", 3, 640) for _ in range(2)] == [7.5, 7.5]
    assert asked[0][1:4] == [str(ROOT / "configs/rl/rainbow_catch.yaml"), "--run-dir", str(folder)]
    given = dict(zip(asked[0][4::2], asked[0][5::2], strict=True))
    assert (given["--dqn.noisy"], given["--dqn.values"], given["--trainer.seed"], given["--trainer.steps"]) == (
        "false",
        "categorical",
        "3",
        "20",
    )
    assert asked[1][1:] == ["--resume", str(folder)]


@pytest.mark.parametrize(
    ("words", "sentence"), [(["--only", "rainbw"], "--only rainbw: there are plain"), (["--actions", "33"], "multiple of 32")]
)
def test_mistakes_of_an_ablation_are_told(words: list[str], sentence: str, tmp_path: Path) -> None:
    done = started("ablation.py", *words, "--out", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md"))
    assert done.returncode == 2
    assert sentence in done.stderr
