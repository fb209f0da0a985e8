"""scripts/backbones.py as a user calls it: the table in all its forms, and the picture of what a benchmark found."""

import contextlib
import json
import re
from pathlib import Path

import numpy
import pytest
from PIL import Image

from lab.backbones import create, list_backbones
from lab.backbones.cost import multiplies, parameters

from . import test_scripts

pytestmark = pytest.mark.usefixtures("one_thread")
MEASURED = ["nature", "small", "resnet_small", "lenet"]
RESULTS = Path("benchmarks/results/backbones.json")


@pytest.fixture(autouse=True)
def _in_a_narrow_terminal_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lab.recorder.console._width", 80)
    with contextlib.chdir(tmp_path):
        yield


def call(*words: str, expect: int = 0) -> str:
    printed = test_scripts.call("backbones.py", *words, expect=expect)
    assert "Traceback" not in printed
    return printed


def line(printed: str, name: str) -> list[str]:
    """The cells of a backbone in a printed table."""
    found = [each.split() for each in printed.splitlines() if each.split()[:1] == [name]]
    assert len(found) == 1, printed
    return found[0]


def found(**changes: float) -> None:
    """Write what the benchmark would."""
    rows = [
        {"name": name, "accuracy": 0.9 + 0.02 * place, "parameters": 40_000 * 5**place, "multiplies": 10 ** (6 + place)}
        for place, name in enumerate(MEASURED)
    ]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": [{**row, "images_per_second": 1e3, **changes} for row in rows]}))


# The table


def test_the_table_holds_every_backbone_within_80_columns() -> None:
    printed = call("--no-times")
    assert [each for each in list_backbones() if each not in printed] == []
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert line(printed, "resnet_bottleneck")[:3] == ["resnet_bottleneck", "resnet", "2015"]


def test_a_line_of_the_table_tells_weights_multiplies_and_times() -> None:
    *said, forward, both = line(call("nature", "--channels", "4", "--size", "84", "--batch", "2"), "nature")
    assert said == ["nature", "nature", "2015", "1,684", "0.9", "9.3"]
    assert float(forward) > 0
    assert float(both) > 0


def test_another_size_has_a_column_of_its_own() -> None:
    printed = call("small", "--size", "10", "--no-times")
    assert "images 1 x 10 x 10" in printed
    assert re.search(r"at 10 +at 28 +at 84", printed)
    assert line(printed, "small") == ["small", "small", "2019", "107", "0.2", "1.8", "16.4"]


def test_only_what_matches_is_shown() -> None:
    printed = call("*res*", "--no-times")
    first = {each.split()[0] for each in printed.splitlines() if each.split()}
    assert sorted(first & {*list_backbones()}) == list_backbones("*res*")


@pytest.mark.parametrize(("columns", "papers"), [(80, False), (200, True)])
def test_papers_are_shown_where_there_is_room_or_on_demand(columns: int, papers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.recorder.console._width", columns)
    paper = create("nature", 1, 28).paper
    assert (paper in call("nature", "--no-times")) == papers
    assert paper in call("nature", "--no-times", "--papers")


def test_json_has_exact_numbers_and_nothing_else_is_printed() -> None:
    printed = json.loads(call("resnet_*", "--json", "--channels", "3", "--batch", "1"))
    assert {name: printed[name] for name in ("size", "channels", "batch")} == {"size": 28, "channels": 3, "batch": 1}
    assert [row["name"] for row in printed["rows"]] == list_backbones("resnet_*")
    for row in printed["rows"]:
        small, large = create(row["name"], 3, 28), create(row["name"], 3, 84)
        assert row["family"] == "resnet"
        assert row["year"] == small.year
        assert row["paper"] == small.paper
        assert row["parameters"] == parameters(small)
        assert row["multiplies"] == {"28": multiplies(small, 3, 28), "84": multiplies(large, 3, 84)}
        assert row["forward_seconds"] > 0
        assert row["forward_backward_seconds"] > 0


def test_without_times_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.backbones.cost.seconds", lambda *_: pytest.fail("timed"))
    (row,) = json.loads(call("small", "--json", "--no-times"))["rows"]
    assert not [name for name in row if "seconds" in name]
    call("small", "--markdown", "table.md")


def test_markdown_is_a_table_for_the_docs() -> None:
    assert "table: docs/table.md" in call("[ns]*", "--markdown", "docs/table.md")
    head, rule, *rows = [[cell.strip() for cell in each.strip("|").split("|")] for each in Path("docs/table.md").read_text().splitlines()]
    assert head == ["name", "family", "year", "parameters at 28", "MACs at 28 (M)", "MACs at 84 (M)", "paper"]
    assert rule == ["---", "---", "---:", "---:", "---:", "---:", "---"]
    assert [row[0] for row in rows] == [f"`{name}`" for name in list_backbones("[ns]*")]
    assert rows[0] == ["`nature`", "`nature.py`", "2015", "105,120", "0.5", "6.9", create("nature", 1, 28).paper]


def test_markdown_tells_what_was_learnt_in_a_minute_where_that_was_measured_for_each() -> None:
    found()
    call("[ns]mall", "--markdown", "table.md")
    head, _, row = [[cell.strip() for cell in each.strip("|").split("|")] for each in Path("table.md").read_text().splitlines()]
    assert head[-3:-1] == ["MNIST, one minute (%)", "images/s"]
    assert row[-3:-1] == ["92.00", "1,000"]
    call("*net*", "--markdown", "table.md")
    assert "minute" not in Path("table.md").read_text()


def test_help_teaches_by_examples() -> None:
    printed = call("--help")
    assert 'python scripts/backbones.py "*res*"' in printed
    assert "--plot" in printed


# The picture


def names_in(svg: str) -> list[str]:
    """The names written in a picture."""
    return [name for name in re.findall(r"<!-- (\w+) -->", Path(svg).read_text()) if name in list_backbones()]


def dots_in(svg: str) -> list[tuple[float, float, float]]:
    """Across, up and area of each dot, in the units of the paper."""
    dots = re.search(r'<g id="PathCollection_1">(.*?)</g>', Path(svg).read_text(), re.S)[1]
    outlines = [numpy.array(re.findall(r"[\d.]+", path), float).reshape(-1, 2) for path in re.findall(r'<path d="([^"]*)"', dots)]
    ends = [(outline.min(0), outline.max(0)) for outline in outlines]
    return [((low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, (high[0] - low[0]) ** 2) for low, high in ends]


def test_the_picture_has_a_dot_and_a_name_for_each() -> None:
    found()
    assert "picture: cost.svg" in call("--plot", "cost.svg")
    assert names_in("cost.svg") == MEASURED
    across, up, areas = numpy.array(dots_in("cost.svg")).T
    assert numpy.diff(across) == pytest.approx(numpy.diff(across)[0] * numpy.ones(3), abs=0.01)  # ten times the cost each, on a log axis
    odds = numpy.log([share / (1 - share) for share in (0.9, 0.92, 0.94, 0.96)])
    assert numpy.diff(up) / numpy.diff(odds) == pytest.approx(numpy.diff(up)[0] / numpy.diff(odds)[0] * numpy.ones(3), rel=1e-3)
    assert numpy.diff(across)[0] > 0
    assert numpy.diff(up)[0] > 0
    assert areas[1:] / areas[:-1] == pytest.approx(5 * numpy.ones(3), rel=1e-3)  # five times the parameters each


def test_a_pattern_chooses_the_dots() -> None:
    found()
    call("*small", "--plot", "cost.svg")
    assert names_in("cost.svg") == ["small", "resnet_small"]
    assert len(dots_in("cost.svg")) == 2


def test_names_at_one_place_are_written_beside_each_other() -> None:
    found(multiplies=5_000_000, accuracy=0.95, parameters=100_000)
    call("--plot", "cost.svg")
    places = re.findall(rf"<!-- (?:{'|'.join(MEASURED)}) -->\s*<g transform=\"translate\(([\d.]+ [\d.]+)\)", Path("cost.svg").read_text())
    assert len(set(places)) == 4


def test_a_png_is_drawn_too() -> None:
    found()
    call("--plot", "deep/cost.png")
    assert numpy.asarray(Image.open("deep/cost.png")).std() > 5


def test_table_and_picture_go_together() -> None:
    found()
    printed = call("nature", "--plot", "cost.png", "--markdown", "table.md")
    assert printed.splitlines() == ["picture: cost.png", "table: table.md"]


# Mistakes

MAKES = "python benchmarks/backbones.py makes it"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["xyzzy"], r"^error: no backbone's name matches 'xyzzy'; there are alexnet, .*, xception$"),
        (["resnet"], r"""^error: no backbone's name matches 'resnet'; did you mean "\*resnet\*"\?$"""),
        (["--plot", "cost.png"], rf"^error: benchmarks/results/backbones.json: there is no such file yet; {MAKES}$"),
    ],
)
def test_a_mistake_ends_in_one_clear_sentence(words: list[str], told: str) -> None:
    printed = call(*words, expect=2)
    assert len(printed.splitlines()) == 1
    assert re.search(told, printed, re.M)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"name": "small"}]}', '{"rows": 3}', '{"lines": []}'])
def test_damaged_results_are_told(text: str) -> None:
    found()
    RESULTS.write_text(text)
    assert re.search(rf"^error: {RESULTS}: damaged, or of another version .*{MAKES} anew$", call("--plot", "x.png", expect=2), re.M)
    assert not Path("x.png").exists()


def test_results_without_these_backbones_are_told() -> None:
    found()
    assert f"knows nothing of vit; {MAKES} anew" in call("vit", "--plot", "x.png", expect=2)


def test_pictures_of_other_kinds_are_refused() -> None:
    found()
    assert "--plot cost.bmp: pictures are written as .png or .svg" in call("--plot", "cost.bmp", expect=2)


@pytest.mark.parametrize("option", ["--size", "--channels", "--batch"])
def test_counts_must_be_positive(option: str) -> None:
    assert "expected an integer >= 1, found 0" in call(option, "0", expect=2)
