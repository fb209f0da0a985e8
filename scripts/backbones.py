"""What the backbones cost: weights, multiply-adds and time, in a table or in a picture.

    python scripts/backbones.py
    python scripts/backbones.py "*res*" --papers                  those whose names match
    python scripts/backbones.py --size 84 --channels 4            as an agent sees: four frames of 84x84 pixels
    python scripts/backbones.py --no-times --json                 nothing is timed: done in seconds
    python scripts/backbones.py --markdown docs/backbones.md
    python scripts/backbones.py --plot docs/backbones.png         accuracy against cost, as benchmarks/backbones.py measured

A MAC is a multiply-add of a convolution, a linear layer or a matrix product; they are counted for one image. Times are medians
for a batch on this machine: forward as for use, forward and backward as for training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.table import Table

from lab.backbones import REGISTRY, create, list_backbones
from lab.backbones.cost import Cost, cost, seconds
from lab.config import Count, Settings, UserError
from lab.launch import guarded
from lab.recorder import console, track

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

SIZES = (28, 84)
"""Pixels a side of MNIST's and of Atari's images."""
RESULTS = Path("benchmarks/results/backbones.json")
ALL = 1 - 0.5 / 10_000
"""What an accuracy of 1 counts as, since no scale of odds holds it: half a mistake in MNIST's test set."""
WIDE = 160
"""Columns of a terminal that has room for the papers."""


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Which backbones, and what of them."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PATTERN]")] = "*"
    """Names to show; * stands for any letters."""
    size: Count = 28
    """Pixels a side of the images that times are taken with, and parameters counted for."""
    channels: Count = 1
    """Channels of the images."""
    batch: Count = 64
    """Images at a time."""
    no_times: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out the times."""
    papers: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the papers in a narrow terminal, too."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""
    markdown: Path | None = None
    """Write the table, with what benchmarks/backbones.py measured, to this file and print nothing else."""
    plot: Path | None = None
    """Draw accuracy against cost in this file, .png or .svg, and print nothing else."""


@dataclass(frozen=True)
class Row:
    """A backbone in the table."""

    cost: Cost
    """At the size that was asked for."""
    multiplies: dict[int, int]
    """Multiply-adds by size of image."""
    times: tuple[float, float] | None
    """Seconds of a batch forward, and forward and backward."""


def main() -> int:
    """Show what the command line asks for."""
    options = tyro.cli(Options, description=__doc__)
    names = matching(options.pattern)
    if options.plot:
        draw(options.plot, measured(RESULTS, names, ("name", "accuracy", "parameters", "multiplies")))
        print(f"picture: {options.plot}")
    if options.markdown:
        written(options.markdown, markdown([row(name, options, timed=False) for name in names], options.size, learnt(RESULTS, names)))
        print(f"table: {options.markdown}")
    if options.plot or options.markdown:
        return 0
    rows = [row(name, options, not options.no_times) for name in track(names, len(names), "backbones")]
    if options.json:
        print(json.dumps(report(rows, options)))
    else:
        show(rows, options)
    return 0


def matching(pattern: str) -> list[str]:
    """The backbones whose names match.

    Raises:
        UserError: none does.
    """
    names = list_backbones(pattern)
    if not names:
        wider = f"*{pattern}*"
        hint = f'did you mean "{wider}"?' if list_backbones(wider) else f"there are {', '.join(sorted(REGISTRY))}"
        raise UserError(f"no backbone's name matches {pattern!r}; {hint}")
    return names


# The table


def row(name: str, options: Options, timed: bool) -> Row:
    """What there is to say of one backbone."""
    costs = {size: cost(name, options.channels, size) for size in sorted({*SIZES, options.size})}
    times = seconds(create(name, options.channels, options.size), options.channels, options.size, options.batch) if timed else None
    return Row(costs[options.size], {size: each.multiplies for size, each in costs.items()}, times)


def show(rows: Sequence[Row], options: Options) -> None:
    """Print the table."""
    wide = console.width >= WIDE
    title = f"images {options.channels} x {options.size} x {options.size}" + ("" if options.no_times else f", {options.batch} at a time")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("family", overflow="fold")
    numbers = ["year", "weights\n(k)", *(f"M MACs\nat {size}" for size in rows[0].multiplies)]
    for heading in numbers if options.no_times else [*numbers, "ms\nforward", "ms and\nback"]:
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column("paper")
    for each in rows:
        table.add_row(*cells(each), *([each.cost.paper] if wide else []))
    console.print(table)
    if options.papers and not wide:
        for each in rows:
            console.print(f"{each.cost.name}: {each.cost.paper}", highlight=False, soft_wrap=True)


def cells(row: Row) -> list[str]:
    """A line of the table but for the paper."""
    macs = [f"{count / 1e6:.1f}" for count in row.multiplies.values()]
    times = [f"{1000 * each:.1f}" for each in row.times or ()]
    return [row.cost.name, row.cost.family, str(row.cost.year), f"{row.cost.parameters / 1000:,.0f}", *macs, *times]


def report(rows: Sequence[Row], options: Options) -> dict[str, Any]:
    """The table as JSON; times in seconds."""
    return {"size": options.size, "channels": options.channels, "batch": options.batch, "rows": [entry(each) for each in rows]}


def entry(row: Row) -> dict[str, Any]:
    """One backbone as JSON."""
    found = {**asdict(row.cost), "multiplies": {str(size): count for size, count in row.multiplies.items()}}
    return found if row.times is None else {**found, "forward_seconds": row.times[0], "forward_backward_seconds": row.times[1]}


def learnt(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """What each backbone learnt in a minute, as the benchmark measured it: accuracy and images per second; nothing if it was not run."""
    if not path.exists():
        return {}
    found = measured(path, names, ("name", "accuracy", "images_per_second"))
    return {each["name"]: [f"{100 * each['accuracy']:.2f}", f"{each['images_per_second']:,.0f}"] for each in found}


def markdown(rows: Sequence[Row], size: int, accuracies: Mapping[str, Sequence[str]]) -> str:
    """The table as Markdown, with what the benchmark found, if it found it for each."""
    complete = all(each.cost.name in accuracies for each in rows)
    minute = ["MNIST, one minute (%)", "images/s"] if complete else []
    macs = [f"MACs at {each} (M)" for each in rows[0].multiplies]
    headings = ["name", "family", "year", f"parameters at {size}", *macs, *minute, "paper"]
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 3), "---"]]
    for each in rows:
        name, family, year, _, *counts = cells(each)
        found = accuracies[name] if complete else []
        lines.append([f"`{name}`", f"`{family}.py`", year, f"{each.cost.parameters:,}", *counts, *found, each.cost.paper])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written(path: Path, text: str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# The picture


def measured(path: Path, names: Sequence[str], keys: Sequence[str]) -> list[dict[str, Any]]:
    """What the benchmark found of these backbones, by the given keys; accuracy is from 0 to 1.

    Raises:
        UserError: it was not run, or not for any of them.
    """
    advice = "python benchmarks/backbones.py makes it"
    try:
        rows = [{key: row[key] for key in keys} for row in json.loads(path.read_text())["rows"] if row["name"] in names]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file yet; {advice}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version ({error!r}); {advice} anew") from None
    if not rows:
        raise UserError(f"{path}: knows nothing of {', '.join(names)}; {advice} anew")
    return rows


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy against multiply-adds, a dot for each backbone, the larger the more parameters it has."""
    from matplotlib.figure import Figure

    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: pictures are written as .png or .svg")
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots()
    points = [(each["multiplies"] / 1e6, min(each["accuracy"], ALL)) for each in rows]
    sizes = [area(each["parameters"]) for each in rows]
    axes.scatter(*zip(*points), sizes, alpha=0.5, linewidths=0)
    # Between 99 and 99.5 % there is as much to see as between 50 and 67 %.
    axes.set(xlabel="million multiply-adds per image", ylabel="accuracy (%)", xscale="log", yscale="logit")
    axes.margins(0.1)
    odds = [share / (1 - share) for _, share in points]
    low, high = 0.6 * min(odds), max(odds) / 0.6
    axes.set_ylim(low / (1 + low), high / (1 + high))
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    axes.yaxis.set_minor_formatter("")
    figure.legend(*key(axes), title="parameters", frameon=False, loc="outside right upper", labelspacing=1.2)
    figure.draw_without_rendering()  # which settles where on the paper the dots are
    label(axes, [each["name"] for each in rows], points, sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def area(parameters: int) -> float:
    """Of a dot, in square points; the smallest can still be seen."""
    return max(10.0, parameters / 4000)


def key(axes: Axes) -> tuple[list[PathCollection], list[str]]:
    """Dots of known sizes, and what they stand for."""
    known = {"100 k": 100_000, "300 k": 300_000, "1 M": 1_000_000}
    return [axes.scatter([], [], area(count), color="tab:blue", alpha=0.5, linewidths=0) for count in known.values()], [*known]


def label(axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]], sizes: Sequence[float]) -> None:
    """Write each name beside its dot, on the side where it hides the least."""
    from matplotlib.transforms import Bbox

    radii = [size**0.5 / 2 for size in sizes]
    pixel = axes.figure.dpi / 72
    centres = axes.transData.transform(points)
    taken = [Bbox([centre - pixel * radius, centre + pixel * radius]) for centre, radius in zip(centres, radii)]
    for name, point, radius in zip(names, points, radii):
        texts = beside(axes, name, point, radius + 2)
        best = min(texts, key=lambda text: hidden(axes, text, taken))
        taken.append(best.get_window_extent())
        for text in texts:
            if text is not best:
                text.remove()


def beside(axes: Axes, name: str, point: tuple[float, float], gap: float) -> list[Annotation]:
    """The name on each side of a point, `gap` points away."""
    sides = [(1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"), (0, -1, "center", "top")]
    sides += [(0.7 * x, 0.7 * y, "left" if x > 0 else "right", "bottom" if y > 0 else "top") for x in (1, -1) for y in (1, -1)]
    return [
        axes.annotate(name, point, (x * gap, y * gap), textcoords="offset points", ha=across, va=up, fontsize=8)
        for x, y, across, up in sides
    ]


def hidden(axes: Axes, text: Annotation, boxes: Sequence[Bbox]) -> float:
    """Square pixels of dots and names that a text covers; much more if it leaves the frame."""
    place = text.get_window_extent()
    covered = [place.intersection(place, box) for box in boxes]
    inside = all(axes.bbox.contains(*corner) for corner in place.corners())
    return sum(each.width * each.height for each in covered if each) + (0 if inside else 1e6)


if __name__ == "__main__":
    sys.exit(guarded(main))
