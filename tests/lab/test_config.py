"""Settings: every value is read by its annotation, and every mistake is named with its place."""

import contextlib
import dataclasses
import importlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative.vae import EXPERIMENT, VAEConfig
from lab.config import (
    COMMAND_LINE,
    ConfigError,
    Count,
    Decay,
    Fraction,
    Given,
    Natural,
    Positive,
    Settings,
    dump,
    from_leaves,
    leaves,
    read,
    read_arguments,
    read_yaml,
    resolve,
)
from lab.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    rate: Positive = 0.1
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    note: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.note == "slow" and self.rate > 1:
            raise ValueError("a slow note needs a rate of at most 1")


@dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    count: Count = 3
    number: float = 0.0
    whole: int = 0
    part: Fraction = 0.5
    flag: bool = False
    text: str = "plain"
    kind: Literal["first", "second"] = "first"
    numbers: tuple[float, ...] = ()
    words: tuple[str, ...] = ()
    inner: Inner = Inner()


DEFAULT = Outer()


def written(folder: Path, text: str | bytes, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def from_file(folder: Path, text: str) -> Outer:
    return resolve(DEFAULT, read_yaml(written(folder, text))[0]).settings


def from_words(*words: str) -> Outer:
    return resolve(DEFAULT, read_arguments(words).options).settings


def problems(folder: Path, text: str | bytes, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(DEFAULT, read_yaml(written(folder, text))[0] | read_arguments(words).options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# One value


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "+.0001", "1.0e-04"])
def test_a_float_is_a_float_in_a_file_and_on_the_command_line(tmp_path, text):
    for found in (from_file(tmp_path, f"number: {text}\n"), from_words("--number", text)):
        assert found.number == 0.0001
        assert type(found.number) is float


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("1_000", 1000), ("-7", -7), ("2.0", 2), ("0", 0)])
def test_an_integer_may_be_written_as_people_write_it(tmp_path, text, value):
    for found in (from_file(tmp_path, f"whole: {text}\n"), from_words("--whole", text)):
        assert found.whole == value
        assert type(found.whole) is int


@pytest.mark.parametrize("text", ["1.5", "1e-1", "0x10", "", "one", "inf", "nan", "1e999", "true"])
def test_anything_else_is_not_an_integer(tmp_path, text):
    assert "'whole': expected an integer" in problems(tmp_path, f"whole: {text}\n")[0]
    assert "'whole': expected an integer" in problems(tmp_path, "", f"--whole={text}")[0]


def test_an_integer_too_large_for_a_float_is_still_an_integer():
    assert from_words("--whole", "1" + "0" * 400).whole == 10**400


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-inf", ".inf", "Infinity", "1e999", "1" + "0" * 400, "true", "1,5", "0.1 "])
def test_a_float_is_finite_and_nothing_else(tmp_path, text):
    if text == "0.1 ":  # blanks around a number are nobody's mistake
        assert from_words("--number", text).number == 0.1
    else:
        assert "'number': expected a float" in problems(tmp_path, f"number: {text}\n")[0]
        assert "'number': expected a float" in problems(tmp_path, "", f"--number={text}")[0]


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "Yes", "OFF", "1", "0", "y", "null", "~", ""])
def test_only_true_and_false_are_truth_values(tmp_path, word):
    assert "'flag': expected true or false" in problems(tmp_path, f"flag: {word}\n")[0]
    assert "'flag': expected true or false" in problems(tmp_path, "", f"--flag={word}")[0]


@pytest.mark.parametrize(("word", "value"), [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_true_and_false_may_be_written_large_or_small(tmp_path, word, value):
    assert from_file(tmp_path, f"flag: {word}\n").flag is value
    assert from_words("--flag", word).flag is value


def test_a_bare_option_of_a_truth_value_means_true_on_a_command_line_alone(tmp_path):
    for words in (["--flag"], ["--flag", "--count", "5"]):
        assert from_words(*words).flag is True
    assert from_words("--flag", "false").flag is False
    assert problems(tmp_path, "flag: []\n") == [f"{tmp_path / 'x.yaml'}:1: 'flag': expected true or false, found nothing"]
    for name, kind in (("count", "an integer"), ("number", "a float"), ("text", "a text"), ("kind", "one of first, second")):
        assert f"command line: '{name}': expected {kind}" in problems(tmp_path, "", f"--{name}")[0]


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true", "False", "null", "~"])
def test_a_word_that_yaml_would_turn_into_something_else_needs_quotes_to_be_a_text(tmp_path, word):
    assert "put it in quotes" in problems(tmp_path, f"text: {word}\n")[0]
    assert from_file(tmp_path, f"text: '{word}'\n").text == word


@pytest.mark.parametrize(
    "words",
    [
        ["--numbers", "0.9", "0.99"],
        ["--numbers", "0.9,0.99"],
        ["--numbers=0.9,0.99"],
        ["--numbers", "[0.9, 0.99]"],
        ["--numbers=(0.9, 0.99)"],
    ],
)
def test_a_list_is_taken_in_every_form_that_shells_and_sweeps_write(words):
    assert from_words(*words).numbers == (0.9, 0.99)


@pytest.mark.parametrize("text", ["[0.9, 0.99]", "0.9, 0.99", "[.9, 9.9e-1]", "\n  - 0.9\n  - 0.99"])
def test_a_list_in_a_file_may_have_any_of_yamls_forms(tmp_path, text):
    assert from_file(tmp_path, f"numbers: {text}\n").numbers == (0.9, 0.99)


def test_a_list_of_the_wrong_length_or_kind_is_refused(tmp_path):
    for words in (["0.9"], ["0.9", "0.99", "0.999"], ["0.9", "x"], ["0.9", "1"], []):
        assert "'inner.betas': expected 2 values" in problems(tmp_path, "", "--inner.betas", *words)[0]
    assert "'whole': expected an integer" in problems(tmp_path, "whole: [1]\n")[0]


def test_none_is_a_value_where_it_is_allowed(tmp_path):
    changed = dataclasses.replace(DEFAULT, inner=Inner(note="x"))
    for text in ("null", "~", ""):
        assert resolve(changed, read_yaml(written(tmp_path, f"inner:\n  note: {text}\n"))[0]).settings.inner.note is None


@given(value=st.floats(allow_nan=False, allow_infinity=False), whole=st.integers())
@settings(max_examples=100, deadline=None)
def test_any_number_that_python_prints_is_read_back_exactly(value, whole):
    assert read(Given(repr(value), "here"), float) == value
    assert read(Given(str(whole), "here"), int) == whole


# A command line


def test_options_take_their_values_with_a_blank_or_an_equals_sign_and_dashes_are_underscores():
    found = read_arguments(["c.yaml", "--a-b.c-d", "-1", "--e=--x", "--f", "1", "2", "--g", "--quiet", "more"], flags=["quiet"])
    assert found.positional == ("c.yaml", "more")
    texts = {key: value.text for key, value in found.options.items()}
    assert texts == {"a_b.c_d": "-1", "e": "--x", "f": ("1", "2"), "g": (), "quiet": ()}
    assert {value.where for value in found.options.values()} == {COMMAND_LINE}


def test_only_the_name_of_an_option_loses_its_dashes():
    assert read_arguments(["--text=a-b=c"]).options["text"].text == "a-b=c"


# Mistakes, all at once


def test_every_mistake_is_reported_at_once_with_its_line_and_the_nearest_key(tmp_path):
    text = (
        "experiment: x\n"
        "count: 0\n"  # 2
        "part: 1.5\n"
        "kind: third\n"
        "flag: yes\n"
        "inner:\n"
        "  rate: fast\n"  # 7
        "  noet: hello\n"
        "inner.betas: 0.9\n"
        "numbers:\n"  # 10
        "  - 1\n"
        "  - x\n"
        "number:\n"
        "  deep: 1\n"  # 14
    )
    found = problems(tmp_path, text, "--whole", "1.5", "--txet", "a", "--inner", "3")
    file = tmp_path / "x.yaml"
    expected = {
        f"{file}:2: 'count': expected an integer >= 1, found '0'",
        f"{file}:3: 'part': expected a float >= 0 and <= 1, found '1.5'",
        f"{file}:4: 'kind': expected one of first, second, found 'third'",
        f"{file}:5: 'flag': expected true or false, found 'yes'",
        f"{file}:7: 'inner.rate': expected a float > 0, found 'fast'",
        f"{file}:8: unknown key 'inner.noet'; did you mean 'inner.note'?",
        f"{file}:9: 'inner.betas': expected 2 values: a float >= 0 and < 1, a float >= 0 and < 1, found '0.9'",
        f"{file}:10: 'numbers': expected a list of a float, found '[1, x]'",
        f"{file}:14: unknown key 'number.deep'; did you mean 'number'?",
        "command line: 'whole': expected an integer, found '1.5'",
        "command line: unknown key 'txet'; did you mean 'text'?",
        "command line: 'inner' is a section; set one of inner.rate, inner.betas, inner.note",
    }
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_key_given_twice_names_both_lines(tmp_path):
    found = problems(tmp_path, "count: 1\ninner:\n  rate: 1\ncount: 2\ninner.rate: 3\n")
    file = tmp_path / "x.yaml"
    assert found == [
        f"{file}:4: 'count' is given twice, first at {file}:1",
        f"{file}:5: 'inner.rate' is given twice, first at {file}:3",
    ]


def test_a_check_across_fields_names_the_places_of_its_section(tmp_path):
    found = problems(tmp_path, "count: 5\ninner:\n  rate: 2\n", "--inner.note", "slow")
    assert found == [f"{tmp_path / 'x.yaml'}:3, command line: inner: a slow note needs a rate of at most 1"]
    assert resolve(DEFAULT, read_arguments(["--inner.note", "slow"]).options).settings.inner.note == "slow"


def edits(key: str) -> set[str]:
    """All deletions and transpositions of one character, and a substitution at every place."""
    found = {key[:i] + key[i + 1 :] for i in range(len(key))}
    found |= {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    found |= {key[:i] + "abcdefghijklmnopqrstuvwxyz"[(7 * i + len(key)) % 26] + key[i + 1 :] for i in range(len(key))}
    return found - {key}


def test_no_typo_of_a_real_key_survives_and_the_right_key_is_suggested():
    known = leaves(EXPERIMENT)
    meant: dict[str, set[str]] = {}
    for key in known:
        for wrong in edits(key) - set(known):
            meant.setdefault(wrong, set()).add(key)
    with pytest.raises(ConfigError) as caught:
        resolve(EXPERIMENT, {wrong: Given("1", wrong) for wrong in meant})
    told = {problem.partition(": ")[0]: problem for problem in caught.value.problems}
    assert set(told) == set(meant)
    wrong_advice = [problem for wrong, problem in told.items() if not any(f"mean '{key}'?" in problem for key in meant[wrong])]
    assert len(meant) > 2000
    assert len(wrong_advice) <= 0.01 * len(meant), wrong_advice[:20]


# Objects made in Python


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"lr": True}, "lr"),
        ({"lr": "0.1"}, "lr"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": [0.9, 0.99]}, "betas"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"warmup_steps": 1.0}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"kind": "adma"}, "kind"),
        ({"final_lr": 1.01}, "final_lr"),
    ],
)
def test_settings_made_in_python_are_checked_too(changes, field):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        OptimizerConfig(**changes)


def test_settings_made_in_python_report_every_wrong_field():
    with pytest.raises(ValueError, match=r"^kind: .*; lr: .*; eps: "):
        OptimizerConfig(lr=-1, eps=0, kind="x")
    with pytest.raises(ValueError, match="importance_samples above 1"):
        VAEConfig(importance_samples=5, beta=2.0)


def test_the_ends_of_a_range_are_in_it_exactly_when_they_should_be():
    assert OptimizerConfig(final_lr=1, weight_decay=0, betas=(0, 0.0)).final_lr == 1
    assert Outer(count=1).count == 1
    for wrong in ({"count": 0}, {"part": -1e-300}, {"part": 1 + 1e-15}):
        with pytest.raises(ValueError, match="expected"):
            Outer(**wrong)


# Files


def test_origins_say_where_each_value_came_from(tmp_path):
    written(tmp_path, "count: 7\ninner:\n  rate: 2\n", "base.yaml")
    path = written(tmp_path, "base: base.yaml\nexperiment: vae\n\ninner:\n  rate: 3\n")
    values, experiment = read_yaml(path)
    resolved = resolve(DEFAULT, values | read_arguments(["--text=x"]).options)
    assert experiment == "vae"
    assert (resolved.settings.count, resolved.settings.inner.rate, resolved.settings.text) == (7, 3.0, "x")
    given = {"count": f"{tmp_path / 'base.yaml'}:1", "inner.rate": f"{path}:5", "text": "command line"}
    assert resolved.origins == {key: given.get(key, "default") for key in leaves(DEFAULT)}


def test_a_base_names_the_experiment_where_the_file_does_not(tmp_path):
    (tmp_path / "below").mkdir()
    written(tmp_path, "experiment: vae\nbase: below/deep.yaml\n", "base.yaml")
    written(tmp_path, "experiment: other\ncount: 9\n", "below/deep.yaml")
    values, experiment = read_yaml(written(tmp_path, "base: base.yaml\n"))
    assert experiment == "vae"
    assert values["count"].text == "9"


def test_a_missing_file_or_base_is_a_clear_error(tmp_path):
    for path in (tmp_path / "nothing.yaml", written(tmp_path, "base: nothing.yaml\n"), tmp_path, written(tmp_path, "base:\n", "y.yaml")):
        with pytest.raises(ConfigError, match="cannot read this file"):
            read_yaml(path)


def test_a_base_that_leads_back_to_itself_is_a_clear_error(tmp_path):
    written(tmp_path, "count: 1\nbase: b.yaml\n", "a.yaml")
    written(tmp_path, "base: ./../" + tmp_path.name + "/a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="its own base"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="its own base"):
        read_yaml(written(tmp_path, "base: x.yaml\n"))


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\x01\x02\xff\xfe",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"count:\n\tnumber: 1\n",
        b"count: 1\n---\ncount: 2\n",
        b"- 1\n- 2\n",
        b"just a sentence\n",
        b"numbers: [[1, 2], [3]]\n",
        b"numbers: [{a: 1}]\n",
        b"text: 'no end\n",
        b"text: *nobody\n",
        b"inner: &a {note: x, more: *a}\n",
        b"[" * 5000,
        b"{a: " * 3000,
        b"? [a, b]\n: 1\n",
        b"a: &a {x: 1}\ninner:\n  <<: *a\n",
        b"count: !!python/object/apply:os.mkdir [made]\n",
        b"inner: !!python/object/new:os.mkdir {args: [made]}\n",
        b"number: !!python/object/apply:eval ['1']\n",
    ],
)
def test_what_is_not_a_settings_file_ends_in_a_config_error_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    for problem in problems(tmp_path, content):
        assert "x.yaml" in problem
        assert "Node(" not in problem or content.startswith((b"-", b"?"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@given(content=st.binary(max_size=60) | st.text(alphabet="{}[]:-,&*!#|>'\"% \n\tab1?<", max_size=60).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_no_bytes_at_all_end_in_anything_but_settings_or_a_config_error(tmp_path_factory, content):
    path = written(tmp_path_factory.getbasetemp(), content, "fuzz.yaml")
    with contextlib.suppress(ConfigError):
        assert isinstance(resolve(DEFAULT, read_yaml(path)[0]).settings, Outer)


def test_an_empty_file_gives_the_defaults(tmp_path):
    for text in ("", "\n\n", "# only a remark\n", "{}", "inner: {}\n"):
        assert from_file(tmp_path, text) == DEFAULT


# Writing


nasty = st.sampled_from(
    [
        "",
        " ",
        "yes",
        "null",
        "~",
        "1e-4",
        "a,b",
        "c]d",
        "[x]",
        "x: y",
        "# no",
        "a #b",
        "'",
        '"',
        "\\n",
        "-",
        "- a",
        "!x",
        "&a",
        "*a",
        "a\nb",
        "\n",
        "a\n\nb\n",
        "\r",
        "\t",
        "\x85",
        "\u2028",
        "é",
        "日本",
        "😀",
        "\x00",
        "\x7f",
        "%a",
        "@",
        "`",
        "{a: b}",
        "---",
        "...",
        "?",
    ]
)
texts = nasty | st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(
    Inner,
    rate=finite.filter(lambda x: 0 < x <= 1),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    note=st.none() | texts,
)
outers = st.builds(
    Outer,
    count=st.integers(min_value=1),
    number=finite | st.integers(-(2**53), 2**53),
    whole=st.integers(),
    part=st.floats(0, 1),
    flag=st.booleans(),
    text=texts,
    kind=st.sampled_from(["first", "second"]),
    numbers=st.lists(finite, max_size=3).map(tuple),
    words=st.lists(texts, max_size=3).map(tuple),
    inner=inners,
)


@given(value=outers, origins=st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back_as_it_was(tmp_path_factory, value, origins):
    places = dict.fromkeys(leaves(value), "command line") if origins else None
    path = written(tmp_path_factory.getbasetemp(), dump(value, "outer", places), "round.yaml")
    values, experiment = read_yaml(path)
    assert resolve(DEFAULT, values).settings == value
    assert experiment == "outer"


def test_a_float_of_numpy_is_written_as_a_number(tmp_path):
    value = Outer(number=np.float64(0.1), numbers=(np.float64(1e-7),))
    assert from_file(tmp_path, dump(value, "outer")) == value


def test_origins_stand_as_remarks_in_one_column():
    lines = dump(DEFAULT, "outer", dict.fromkeys(leaves(DEFAULT), "default")).splitlines()
    marked = [line for line in lines if "#" in line]
    assert len(marked) == len(leaves(DEFAULT))
    assert len({line.index("#") for line in marked}) == 1


@pytest.mark.parametrize("preset", sorted((ROOT / "configs" / "generative").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_resolves_for_its_experiment_and_says_more_than_the_defaults(preset):
    values, experiment = read_yaml(preset)
    default = importlib.import_module(f"generative.{experiment}").EXPERIMENT
    resolved = resolve(default, values)
    assert default.experiment == experiment
    assert resolved.settings.name == preset.stem
    assert re.match("# .", preset.read_text())


def test_natural_starts_at_zero():
    assert read(Given("0", "here"), Natural) == 0
    with pytest.raises(ValueError, match="an integer >= 0, found '-1'"):
        read(Given("-1", "here"), Natural)


def test_none_is_none_where_it_is_bare_and_a_text_where_it_is_quoted(tmp_path):
    for text, expected in (("none", None), ("null", None), ("~", None), ("'none'", "none"), ('"null"', "null"), ("mine", "mine")):
        values, _ = read_yaml(written(tmp_path, f"inner:\n  note: {text}\n", "none.yaml"))
        assert resolve(DEFAULT, values).settings.inner.note == expected
    assert resolve(DEFAULT, read_arguments(["--inner.note", "none"]).options).settings.inner.note is None


@pytest.mark.parametrize("text", ["none", "None", "null", "~", "true", "yes", "1e-4", "", " x ", "a: b", "# c", "[d"])
def test_texts_that_look_like_something_else_come_back_as_texts(tmp_path, text):
    value = dataclasses.replace(DEFAULT, text=text, words=(text, "x"), inner=dataclasses.replace(DEFAULT.inner, note=text))
    assert resolve(DEFAULT, read_yaml(written(tmp_path, dump(value, "outer"), "text.yaml"))[0]).settings == value


def test_an_option_without_its_value_is_told_so():
    with pytest.raises(ConfigError, match=r"'count': expected an integer .*, found nothing"):
        resolve(DEFAULT, read_arguments(["--count"]).options)


def test_settings_come_back_from_their_leaves_through_json():
    settings = dataclasses.replace(DEFAULT, count=7, words=("a", "b"), inner=Inner(betas=(0.1, 0.2), note="fast"))
    assert from_leaves(DEFAULT, json.loads(json.dumps(leaves(settings)))) == settings
    assert from_leaves(DEFAULT, {"inner.rate": 0.5}) == dataclasses.replace(DEFAULT, inner=Inner(rate=0.5))
