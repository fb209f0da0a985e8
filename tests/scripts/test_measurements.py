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
    names = ("turns", "replay", "peers", "startup", "growth")
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
