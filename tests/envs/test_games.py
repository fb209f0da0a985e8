"""The names of games: every spelling in use means the right ROM, and a wrong name is answered with the right one."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ale_py.roms
import gymnasium
import pytest

from envs.games import SMALL, TWO_PLAYERS, GameConfig, resolve, roms
from lab.config import ConfigError, Natural, Settings, read_arguments, read_yaml
from lab.config import resolve as resolve_settings

ROOT = Path(__file__).resolve().parents[2]
SPELLINGS = ("{}", "ALE/{}-v5", "{}NoFrameskip-v4", "{}Deterministic-v0", "{}-v4", "{}-ram-v5", "ALE/{}-ram-v5", "{}-ramNoFrameskip-v4")


@dataclass(frozen=True, kw_only=True)
class Learner(Settings):
    """A learner's settings, as far as they are needed here."""

    steps: Natural = 10
    game: GameConfig = GameConfig()


def camel(rom):
    return "".join(part.capitalize() for part in rom.split("_"))


# The ROMs


def test_the_games_are_the_roms_of_ale_py_but_those_for_two_players():
    assert len(roms()) == 104
    assert sorted((*roms(), *TWO_PLAYERS)) == sorted(ale_py.roms.get_all_rom_ids())
    assert all(Path(ale_py.roms.get_rom_path(rom)).is_file() for rom in roms())
    assert not set(SMALL) & set(roms())


def test_games_are_found_without_importing_an_emulator():
    """`--help` must not wait for one."""
    code = (
        "import sys\n"
        "from envs.games import GameConfig, resolve, roms\n"
        "GameConfig(name='ALE/MsPacman-v5'), resolve('catch')\n"
        "print(len(roms()), [name for name in sys.modules if name.partition('.')[0] in ('ale_py', 'gymnasium', 'cv2', 'torch')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "104 []\n", done.stdout + done.stderr


# Names


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_rom_is_found_in_every_spelling_in_use(spelling):
    for rom in roms():
        for name in (rom, camel(rom), rom.replace("_", ""), rom.replace("_", "-"), rom.upper()):
            assert resolve(spelling.format(name)) == rom


def test_every_name_that_gymnasium_knows_means_the_same_rom_here():
    gymnasium.register_envs(ale_py)
    theirs = {name: spec.kwargs["game"] for name, spec in gymnasium.registry.items() if str(spec.entry_point).startswith("ale_py")}
    assert len(theirs) > 300
    assert {name: resolve(name) for name in theirs} == theirs


@pytest.mark.parametrize("name", ["ms_pacman", "MsPacman", "mspacman", "Ms Pacman", "ALE/MsPacman-v5", "MsPacmanNoFrameskip-v4"])
def test_ms_pacman_is_never_taken_for_pacman(name):
    assert resolve(name) == GameConfig(name=name).rom == "ms_pacman"
    assert resolve(name.replace("Ms", "").replace("ms", "").lstrip("_ ")) == "pacman"


def test_small_games_have_names_like_the_others():
    assert [resolve(name) for name in (*SMALL, "Catch", "Bricks-v0")] == [*SMALL, "catch", "bricks"]


def test_a_config_keeps_the_name_as_it_was_written():
    config = GameConfig(name="ALE/Pong-v5")
    assert (config.name, config.rom) == ("ALE/Pong-v5", "pong")


# Wrong names


def refusal(name):
    with pytest.raises(ValueError, match="name: ") as caught:
        resolve(name)
    with pytest.raises(ValueError, match="name: ") as again:
        GameConfig(name=name)
    assert str(again.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Pnog", "pong"),
        ("brekout", "breakout"),
        ("ALE/SpaceInvader-v5", "space_invaders"),
        ("pacmann", "pacman"),
        ("montezumas_revenge", "montezuma_revenge"),
        ("brick", "bricks"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_one_first(name, meant):
    assert refusal(name).startswith(f"name: no game is called {name!r}; did you mean {meant}")
    assert refusal(name).endswith("?")


@pytest.mark.parametrize("name", ["zzzzqq", "", "-v5", "ALE/", "é"])
def test_a_name_like_no_other_is_answered_with_all_games(name):
    text = refusal(name)
    assert text.startswith(f"name: no game is called {name!r}; the games are ")
    assert text.partition("the games are ")[2].split(", ") == [*SMALL, *roms()]


@pytest.mark.parametrize("rom", TWO_PLAYERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_games_for_two_players_are_refused_in_every_spelling(rom, spelling):
    """Their emulator would end the whole process, with no exception to catch."""
    for name in (rom, camel(rom), rom.replace("_", "")):
        assert spelling.format(name) in refusal(spelling.format(name))


@pytest.mark.parametrize("name", [*TWO_PLAYERS, "ALE/MazeCraze-v5"])
def test_a_game_for_two_players_is_refused_for_that_reason(name):
    """There is such a game, so nobody should look for a mistake in its spelling."""
    text = refusal(name)
    assert "two players" in text
    assert "did you mean" not in text


# In a config file


def problems(given):
    with pytest.raises(ConfigError) as caught:
        resolve_settings(Learner(), given)
    return caught.value.problems


def test_a_wrong_game_in_a_file_is_reported_with_its_line(tmp_path):
    path = tmp_path / "learner.yaml"
    path.write_text("steps: 3\n\ngame:\n  name: Pnog\n")
    (problem,) = problems(read_yaml(path)[0])
    assert problem.startswith(f"{path}:4: game: name: no game is called 'Pnog'; did you mean pong")


def test_a_wrong_game_on_the_command_line_is_reported_as_such():
    (problem,) = problems(read_arguments(["--game.name", "Pnog"]).options)
    assert problem.startswith("command line: game: name: no game is called 'Pnog'; did you mean pong")


def test_a_wrong_game_does_not_hide_another_mistake(tmp_path):
    path = tmp_path / "learner.yaml"
    path.write_text("steps: -3\ngame:\n  name: Pnog\n")
    found = problems(read_yaml(path)[0])
    assert [problem.partition(": ")[0] for problem in found] == [f"{path}:1", f"{path}:3"]


def test_the_right_game_in_a_file_is_taken(tmp_path):
    path = tmp_path / "learner.yaml"
    path.write_text(json.dumps({"game": {"name": "ALE/MsPacman-v5", "sticky": 0.25}}))
    settings = resolve_settings(Learner(), read_yaml(path)[0]).settings
    assert (settings.game.rom, settings.game.sticky) == ("ms_pacman", 0.25)


@pytest.mark.parametrize(
    "settings",
    [{"stack": 0}, {"size": 0}, {"frame_skip": 0}, {"noop_max": -1}, {"sticky": 1.5}, {"sticky": -0.1}, {"max_frames": 0}, {"threads": -1}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GameConfig(**settings)
