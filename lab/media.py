"""Pictures that people look at: image grids, animations, and plots of what was recorded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit values; anything outside is clipped."""
    return images.detach().clamp(0, 1).mul(255).round().to(torch.uint8)


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Lay images (N, C, H, W) in [0, 1] into one picture (C, H', W'), row by row, on a dark ground.

    Args:
        columns: images per row; a near-square picture if not given.
        padding: pixels between images and around them.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    picture = torch.full((channels, rows * (height + padding) + padding, columns * (width + padding) + padding), 0.2)
    for index, image in enumerate(images.detach().cpu().float()):
        top, left = (index // columns) * (height + padding) + padding, (index % columns) * (width + padding) + padding
        picture[:, top : top + height, left : left + width] = image
    return picture


def picture(image: Tensor, scale: int = 1) -> Image.Image:
    """A Pillow image of (C, H, W) in [0, 1] with 1 or 3 channels, every pixel drawn as `scale` x `scale`."""
    pixels = to_uint8(image).movedim(0, -1).cpu().numpy()
    drawn = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)


def save_png(path: Path, image: Tensor, scale: int = 2) -> None:
    """Write (C, H, W) in [0, 1] as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(image, scale).save(path)


def save_gif(path: Path, frames: Sequence[Tensor], seconds: float, scale: int = 2) -> None:
    """Write frames (C, H, W) in [0, 1] as an endless GIF that lasts `seconds` a round."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [picture(frame, scale) for frame in frames]
    ends = [round(100 * seconds * count / len(frames)) for count in range(len(frames) + 1)]  # a GIF counts hundredths of a second
    durations = [10 * max(2, end - start) for start, end in itertools.pairwise(ends)]  # and viewers take less than two for ten
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def plot_rows(path: Path, rows: Sequence[dict[str, Any]], keys: Sequence[str], title: str) -> None:
    """Draw recorded metrics over the steps, a panel for each group of keys that share the name after the slash."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(key.partition("/")[2] for key in keys))
    columns = min(3, len(names))
    figure = Figure(figsize=(4.6 * columns, 3 * math.ceil(len(names) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False).flat
    for axes in list(panels)[len(names) :]:
        axes.remove()
    for axes, name in zip(figure.axes, names, strict=True):
        for key in (key for key in keys if key.partition("/")[2] == name):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), label=key.partition("/")[0], marker="o" if len(points) < 40 else None, markersize=3)
            _fit(axes, [value for _, value in points])
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _fit(axes: Any, values: Sequence[float]) -> None:
    """Keep the first, steep part of a curve from flattening the rest."""
    late = sorted(value for value in values[len(values) // 20 :] if math.isfinite(value))
    if len(late) > 10:
        low, high = late[0], late[int(0.98 * len(late))]
        room = 0.08 * (high - low) or 1.0
        bottom, top = axes.get_ylim() if axes.get_autoscaley_on() is False else (low, high)
        axes.set_ylim(min(bottom, low - room), max(top, high + room))
