"""Settings: frozen dataclasses are the truth; YAML files and the command line hold only differences.

A class of settings derives from `Settings`; every field has a type, a default and a docstring. `resolve` lays a YAML
file and command-line options over the defaults and reports *every* mistake at once, each with its place and the nearest
right key. Values are read by the annotation of their field, the same way in a file and on the command line, so `1e-4`
is a float wherever a float is wanted; nothing is ever evaluated.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

import tyro
import yaml


class UserError(Exception):
    """A mistake the user can mend: shown as its text alone, without a traceback, with exit code 2."""


class ConfigError(UserError):
    """All that is wrong with the given settings, one problem a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# Ranges


@dataclass(frozen=True)
class Range:
    """The values a number may take; `above` and `below` are exclusive, `least` and `most` inclusive."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and (self.above == -math.inf or value > self.above) and value < self.below

    def __str__(self) -> str:
        bounds = ((">=", self.least), (">", self.above), ("<=", self.most), ("<", self.below))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))


def _hint(text: str) -> Any:
    return tyro.conf.arg(metavar=text)


Count = Annotated[int, Range(least=1), _hint("INT >= 1")]
Natural = Annotated[int, Range(least=0), _hint("INT >= 0")]
Positive = Annotated[float, Range(above=0), _hint("FLOAT > 0")]
NonNegative = Annotated[float, Range(least=0), _hint("FLOAT >= 0")]
Fraction = Annotated[float, Range(least=0, most=1), _hint("0..1")]
Decay = Annotated[float, Range(least=0, below=1), _hint("0 <= FLOAT < 1")]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every class of settings: checks types and ranges however the object is made."""

    def __post_init__(self) -> None:
        problems = []
        for name, kind in _kinds(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind):
                problems.append(f"{name}: expected {describe(kind)}, found {value!r}")
        if problems:
            raise ValueError("; ".join(problems))


S = TypeVar("S", bound=Settings)

LONGEST_FILE = 1 << 20
"""Bytes of a settings file at most."""


# Reading one value by its annotation

COMMAND_LINE = "command line"


def _kinds(cls: type) -> dict[str, Any]:
    """The annotated type of every field of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _split(kind: Any) -> tuple[Any, tuple[Range, ...]]:
    """An annotation without its metadata, and the ranges found in the metadata."""
    if get_origin(kind) is Annotated:
        bare, *extras = get_args(kind)
        return bare, tuple(extra for extra in extras if isinstance(extra, Range))
    return kind, ()


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of any other annotation, itself."""
    return get_args(kind) if get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _members(kind: Any, count: int) -> tuple[Any, ...] | None:
    """The kinds of `count` members of a tuple annotation, or None where that many do not fit."""
    args = get_args(kind)
    if len(args) == 2 and args[1] is Ellipsis:
        return (args[0],) * count
    return args if len(args) == count else None


def describe(kind: Any) -> str:
    """An annotation in words: `a float > 0`, `one of adam, sgd`, `true or false`."""
    bare, ranges = _split(kind)
    if len(_options(bare)) > 1:
        return " or ".join(describe(option) for option in _options(bare))
    if get_origin(bare) is Literal:
        return "one of " + ", ".join(map(str, get_args(bare)))
    if get_origin(bare) is tuple:
        args = get_args(bare)
        return f"a list of {describe(args[0])}" if args[-1] is Ellipsis else f"{len(args)} values: " + ", ".join(map(describe, args))
    plain = {bool: "true or false", int: "an integer", float: "a float", str: "a text", type(None): "none"}
    return " ".join([plain.get(bare, getattr(bare, "__name__", str(bare))), *map(str, ranges)])


def _fits(value: Any, kind: Any) -> bool:
    """Whether a Python value is one that the annotation allows."""
    bare, ranges = _split(kind)
    if len(_options(bare)) > 1:
        return any(_fits(value, option) for option in _options(bare))
    if get_origin(bare) is Literal:
        return value in get_args(bare)
    if get_origin(bare) is tuple:
        kinds = _members(bare, len(value)) if isinstance(value, tuple) else None
        return kinds is not None and all(map(_fits, value, kinds))
    if bare in (int, float):
        number = isinstance(value, int | float if bare is float else int) and not isinstance(value, bool)
        return number and -math.inf < value < math.inf and all(value in bounds for bounds in ranges)
    return isinstance(value, bare)


@dataclass(frozen=True)
class Given:
    """A value as somebody wrote it: its text (or texts, for a list) and where it stands."""

    text: str | tuple[str, ...]
    where: str
    bare_word: str = ""
    """YAML's reading of an unquoted word (`bool`, `null`), empty for any other value."""


def read(given: Given, kind: Any) -> Any:
    """The value that a text means where `kind` is wanted.

    Raises:
        ValueError: saying what was expected.
    """
    # None first: on a command line, which has no quotes, the word none means it.
    for option in sorted(_options(_split(kind)[0]), key=lambda option: option is not type(None)):
        try:
            value = _read_one(given, option)
        except ValueError:
            continue
        if _fits(value, kind):
            return value
    found = repr(given.text if isinstance(given.text, str) else "[" + ", ".join(given.text) + "]") if given.text else "nothing"
    quotes = " (put it in quotes to mean a text)" if given.bare_word and _split(kind)[0] is str else ""
    raise ValueError(f"expected {describe(kind)}, found {found}{quotes}")


def _read_one(given: Given, kind: Any) -> Any:
    bare, _ = _split(kind)
    text = given.text
    if get_origin(bare) is tuple:
        texts = _as_list(text)
        kinds = _members(bare, len(texts))
        if kinds is None:
            raise ValueError
        return tuple(read(Given(item, given.where), member) for item, member in zip(texts, kinds, strict=True))
    if bare is bool and text == () and given.where == COMMAND_LINE:
        return True  # --freeze means --freeze true
    if not isinstance(text, str):
        raise ValueError
    if get_origin(bare) is Literal:
        return next((choice for choice in get_args(bare) if str(choice) == text), None)
    return _read_scalar(text, bare, given)


def _as_list(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """A list as the shell passes it: `0.9 0.99`, `0.9,0.99` or `[0.9, 0.99]` (as W&B's sweep agent writes it)."""
    if isinstance(text, str):
        return tuple(part.strip() for part in text.strip("[]() ").split(",") if part.strip())
    return text


def _read_scalar(text: str, kind: Any, given: Given) -> Any:
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int:
        return _integer(text)
    if kind is float:
        return float(text)
    if kind is type(None) and (given.bare_word == "null" or (given.where == COMMAND_LINE and text.lower() in ("none", "null"))):
        return None
    if kind is str and not given.bare_word:
        return text
    raise ValueError


def _integer(text: str) -> int:
    """`1000`, `1_000` and `1e3`; a fraction is refused, never rounded."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


# Reading a file and a command line


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Given], str | None]:
    """The dotted keys of a YAML file and the experiment it names; a `base:` file is read first and laid under it.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something that is not a setting.
    """
    problems: list[str] = []
    given: dict[str, Given] = {}
    try:
        entries = list(_entries(_compose(path), "", path, problems))
    except RecursionError:
        raise ConfigError([f"{path}: nested too deeply, or into itself"]) from None
    for key, entry in entries:
        if key in given:
            problems.append(f"{entry.where}: '{key}' is given twice, first at {given[key].where}")
        given[key] = entry
    if problems:
        raise ConfigError(problems)
    experiment, base = given.pop("experiment", None), given.pop("base", None)
    below: dict[str, Given] = {}
    named = str(experiment.text) if experiment else None
    if base:
        if path.resolve() in above:
            raise ConfigError([f"{base.where}: this file is its own base, by way of {', '.join(map(str, above))}"])
        below, named_below = read_yaml(path.parent / str(base.text), (*above, path.resolve()))
        named = named or named_below
    return below | given, named


class Plain(yaml.SafeLoader):
    """YAML in which an alias stands for a single value: a few lines of sections made of aliases could mean billions of settings."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; one that an alias repeats must be a single value."""
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and isinstance(node, yaml.CollectionNode):
            raise yaml.composer.ComposerError(None, None, "an alias repeats this section or list; write it out", node.start_mark)
        return node


def yaml_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        OSError, UnicodeDecodeError, yaml.YAMLError: it cannot be read, is no text, is longer than any such file.
    """
    with path.open("rb") as file:
        content = file.read(LONGEST_FILE + 1)
    if len(content) > LONGEST_FILE:
        raise yaml.YAMLError(f"longer than {LONGEST_FILE:,} bytes")
    return content.decode()


def _compose(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(yaml_text(path), Loader=Plain)
    except OSError as error:
        presets = ", ".join(str(file) for file in sorted(Path("configs").glob("*/*.yaml"))) or "none below configs/"
        raise ConfigError([f"{path}: cannot read this file ({error.strerror}); the presets at hand are: {presets}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not a YAML file: {' '.join(str(error).split())}"]) from None


def _entries(node: yaml.Node | None, prefix: str, path: Path, problems: list[str]) -> Iterator[tuple[str, Given]]:
    """Every leaf below a mapping, as (dotted key, value with file and line)."""
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{path}:{node.start_mark.line + 1}: expected 'key: value' lines, found {node.value!r}")
        return
    for key_node, value in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = f"{prefix}{str(key_node.value).replace('-', '_')}"
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, f"{key}.", path, problems)
        elif isinstance(value, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in value.value):
            yield key, Given(tuple(item.value for item in value.value), where)
        elif isinstance(value, yaml.ScalarNode):
            yield key, Given(value.value, where, _bare_word(value))
        else:
            problems.append(f"{where}: '{key}': a list of lists or of sections is not a setting")


def _bare_word(node: yaml.ScalarNode) -> str:
    """`bool` or `null` for an unquoted word that YAML, or a reader of Python, takes for one; quotes make any word a text."""
    tag = node.tag.rpartition(":")[2]
    if node.style is None and node.value.lower() == "none":
        return "null"
    return tag if tag in ("bool", "null") else ""


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart: positional words, and the texts after every `--option`."""

    positional: tuple[str, ...]
    options: dict[str, Given]


def read_arguments(argv: Sequence[str], flags: Iterable[str] = ()) -> Arguments:
    """Split `CONFIG --dotted.key VALUE --dotted.key=VALUE`; `flags` are the options that take no value."""
    positional: list[str] = []
    options: dict[str, Given] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        values = [value] if equals else []
        while not equals and key not in flags and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        options[key] = Given(values[0] if len(values) == 1 else tuple(values), COMMAND_LINE)
    return Arguments(tuple(positional), options)


# Laying what was given over the defaults


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Settings, and where each value came from: `default`, a file and line, or the command line."""

    settings: S
    origins: Mapping[str, str]


def resolve(default: S, given: Mapping[str, Given], problems: Sequence[str] = ()) -> Resolved[S]:
    """Lay given values over the default settings.

    Raises:
        ConfigError: every unknown key, wrong type and value out of range, all at once, after `problems` found before.
    """
    found = [*problems, *_unknown(default, given)]
    settings = _lay(default, "", given, found)
    if found:
        raise ConfigError(found)
    return Resolved(settings, {key: given[key].where if key in given else "default" for key in leaves(default)})


def leaves(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Every value of nested settings by its dotted key."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value, key = getattr(settings, field.name), prefix + field.name
        values |= leaves(value, f"{key}.") if isinstance(value, Settings) else {key: value}
    return values


def from_leaves(default: S, values: Mapping[str, Any], prefix: str = "") -> S:
    """Nested settings again from `leaves`, which may have been JSON in between; what is missing stays as it is in `default`."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        value, key = getattr(default, field.name), prefix + field.name
        if isinstance(value, Settings):
            changes[field.name] = from_leaves(value, values, f"{key}.")
        elif key in values:
            changes[field.name] = tuple(values[key]) if isinstance(values[key], list) else values[key]
    return dataclasses.replace(default, **changes)


def _unknown(default: Settings, given: Mapping[str, Given]) -> list[str]:
    known = list(leaves(default))
    sections = {key.rpartition(".")[0] for key in known} - {""}
    problems = []
    for key, value in given.items():
        if key in sections:
            problems.append(f"{value.where}: '{key}' is a section; set one of " + ", ".join(k for k in known if k.startswith(f"{key}.")))
        elif key not in known:
            problems.append(f"{value.where}: unknown key '{key}'{_nearest(key, known)}")
    return problems


def _nearest(key: str, known: Sequence[str]) -> str:
    """The right key that was probably meant: by its whole name, or by its last part where the section is wrong."""
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaf = key.rpartition(".")[2]
    tails = [k for k in known if difflib.SequenceMatcher(None, k.rpartition(".")[2], leaf).ratio() > 0.8]
    best = whole or tails[:1]
    return f"; did you mean '{best[0]}'?" if best else "; --help lists all keys"


def _lay(default: S, prefix: str, given: Mapping[str, Given], problems: list[str]) -> S:
    changes: dict[str, Any] = {}
    for name, kind in _kinds(type(default)).items():
        key, value = prefix + name, getattr(default, name)
        if isinstance(value, Settings):
            changes[name] = _lay(value, f"{key}.", given, problems)
        elif key in given:
            try:
                changes[name] = read(given[key], kind)
            except ValueError as error:
                problems.append(f"{given[key].where}: '{key}': {error}")
    try:
        return dataclasses.replace(default, **changes)
    except ValueError as error:  # a check across fields, from the class's own __post_init__
        places = sorted({given[key].where for key in given if key.startswith(prefix)})
        problems.append(f"{', '.join(places)}: {prefix.rstrip('.') or 'settings'}: {error}")
        return default


# Writing


def dump(settings: Settings, experiment: str, origins: Mapping[str, str] | None = None) -> str:
    """The settings as YAML that `read_yaml` takes back; with origins, each line ends in where its value came from."""
    lines = [(f"experiment: {experiment}", ""), *_lines(settings, "", origins or {})]
    width = max(len(line) for line, _ in lines)
    return "".join(f"{line:{width}}  # {origin}\n" if origin else f"{line}\n" for line, origin in lines)


def _lines(settings: Settings, prefix: str, origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every line of the YAML text, with the origin of its value."""
    indent = "  " * prefix.count(".")
    for field in dataclasses.fields(settings):
        value, key = getattr(settings, field.name), prefix + field.name
        if isinstance(value, Settings):
            yield f"{indent}{field.name}:", ""
            yield from _lines(value, f"{key}.", origins)
        else:
            yield f"{indent}{field.name}: {_scalar(value)}", origins.get(key, "")


def _scalar(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if isinstance(value, float):
        return float.__repr__(value)  # of NumPy's floats too
    # As a list of one, since inside a list commas and brackets need quotes that they do not need elsewhere.
    # Quotes write every kind of line break as an escape, and keep the word none a text.
    quoted = isinstance(value, str) and (not value.isprintable() or value.lower() == "none")
    style = '"' if quoted else None
    return yaml.safe_dump([value], default_flow_style=True, default_style=style, width=10**9, allow_unicode=True).rstrip("\n")[1:-1]
