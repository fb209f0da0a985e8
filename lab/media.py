"""Pictures that people look at: image grids, animations, and plots of what was recorded."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lab.config import UserError

BT709 = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,setparams=color_primaries=bt709:color_trc=bt709"
"""Colours in the one layout that every browser plays, with tags that leave players nothing to guess."""
H264 = f"-vf {BT709} -c:v libx264 -crf 18 -movflags +faststart"
"""Hardly to be told from the original; a player can begin before it has the whole file."""
MOST_PIXELS = 50_000_000
"""Pixels of a picture that is read, but for JPEGs, which can be read at less than their size; a file of some KB may claim any number."""
LOSSLESS = "-c:v libx264rgb -qp 0 -preset ultrafast"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Anybody's picture, to be read in a `with` block.

    Raises:
        ValueError: it cannot be read, in the block too, or has more pixels than `MOST_PIXELS`.
    """
    try:
        with Image.open(path) as picture:
            if picture.format != "JPEG" and picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            yield picture
    except (OSError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as error:  # as each format has it
        raise ValueError(str(error)) from None


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


def above(upper: Tensor, lower: Tensor, columns: int = 8) -> Tensor:
    """One picture of images (N, C, H, W), each above its partner in `lower`."""
    columns = min(columns, len(upper))
    empty = torch.full((-len(upper) % columns, *upper.shape[1:]), 0.2)
    rows = zip(*(torch.cat([images.detach().cpu().float(), empty]).split(columns) for images in (upper, lower)))
    return grid(torch.cat([row for pair in rows for row in pair]), columns)


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


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str], columns: str, rows: str) -> Tensor:
    """A square table of counts as a picture (3, H, W), every row coloured by its shares; zeros are left empty."""
    from matplotlib.figure import Figure

    size = max(4.0, 0.36 * len(names) + 1.2)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                axes.text(x, y, str(count), ha="center", va="center", fontsize=7, color="white" if shares[y][x] > 0.5 else "black")
    axes.set(xlabel=columns, ylabel=rows)
    axes.set_xticks(range(len(names)), names, parse_math=False)  # a $ in a name is a $
    axes.set_yticks(range(len(names)), names, parse_math=False)
    return _drawn(figure)


def captioned(images: Tensor, captions: Sequence[str], columns: int = 5) -> Tensor:
    """Images (N, C, H, W) in [0, 1] with a line of text above each, as a picture (3, H', W'); N may be 0."""
    from matplotlib.figure import Figure

    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(1.5 * columns, 1.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images.cpu(), captions):
        axes.imshow(image.movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(caption, fontsize=8, parse_math=False)
    return _drawn(figure)


def _drawn(figure: Any) -> Tensor:
    """A figure as a picture (3, H, W) in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(110)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).movedim(-1, 0) / 255


def _fit(axes: Any, values: Sequence[float]) -> None:
    """Keep the first, steep part of a curve from flattening the rest."""
    late = sorted(value for value in values[len(values) // 20 :] if math.isfinite(value))
    if len(late) > 10:
        low, high = late[0], late[int(0.98 * len(late))]
        room = 0.08 * (high - low) or 1.0
        bottom, top = axes.get_ylim() if axes.get_autoscaley_on() is False else (low, high)
        axes.set_ylim(min(bottom, low - room), max(top, high + room))


class Film:
    """Writes pictures as they come to an .mp4 (H.264) or an endless .gif; memory does not grow with the length.

        with Film(Path("game.mp4"), rate=30) as film:
            film.add(picture)

    Everything is made in a hidden folder beside the target and moved there at the close: under the real name there is a
    whole film or none. H.264 shares a colour among 2 x 2 pixels, so an odd height or width gets its last row or column
    twice. A GIF has 255 colours for the whole film, exact if there are no more; which ones is known only at the end, and
    until then the pictures wait on the disk.

    Args:
        path: where to, .mp4 or .gif; folders above it are made, a file that is there is replaced.
        rate: pictures per second; of a GIF at most 50, since viewers take a faster one for 10.

    Raises:
        UserError: another suffix.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self._gif = path.suffix.lower() == ".gif"
        if not self._gif and path.suffix.lower() != ".mp4":
            raise UserError(f"{path}: a film cannot be written as {path.suffix or 'a file without a suffix'}; use .mp4 or .gif")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rate = path, min(rate, 50) if self._gif else rate
        self._folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
        self._shape: tuple[int, ...] = ()
        self._ffmpeg: subprocess.Popen[bytes] | None = None
        self._closed = False

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append a picture, uint8 (H, W, 3), as large as the first one.

        Raises:
            ValueError: it is no such picture, or the film is closed.
            UserError: ffmpeg failed.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the film is closed")
        self._shape = self._shape or (*picture.shape[:2], 3)
        if picture.dtype != np.uint8 or picture.shape != self._shape:
            raise ValueError(f"{self.path}: expected a picture of uint8 {self._shape}, found {picture.dtype} {picture.shape}")
        odd_rows, odd_columns = (0, 0) if self._gif else (picture.shape[0] % 2, picture.shape[1] % 2)
        self._write(np.pad(picture, [(0, odd_rows), (0, odd_columns), (0, 0)], mode="edge"))

    def close(self) -> None:
        """Finish the film and give it its name; without a picture there is none. Closing twice does no harm.

        Raises:
            UserError: ffmpeg failed.
        """
        try:
            if self._ffmpeg and not self._closed:
                self._finish()
                os.replace(Path(self._folder.name, self._animate() if self._gif else "film.mp4"), self.path)
        finally:
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        if error:
            self._discard()
        else:
            self.close()

    def _write(self, picture: NDArray[np.uint8]) -> None:
        if self._ffmpeg is None:
            source = f"-f rawvideo -pix_fmt rgb24 -s {picture.shape[1]}x{picture.shape[0]} -framerate {self.rate} -i pipe:"
            self._ffmpeg = self._start(f"{source} {LOSSLESS if self._gif else H264} film.mp4")
        assert self._ffmpeg.stdin
        try:
            self._ffmpeg.stdin.write(np.ascontiguousarray(picture).data)
        except BrokenPipeError:
            self._finish()
            raise

    def _animate(self) -> str:
        """Make the GIF of the waiting pictures: first its colours, then itself."""
        self._ffmpeg = self._start("-i film.mp4 -vf palettegen -frames:v 1 -update 1 colours.png")
        self._finish()
        paint = "paletteuse=dither=none"
        self._ffmpeg = self._start(f"-i film.mp4 -i colours.png -lavfi {paint} -fps_mode passthrough -loop 0 film.gif")
        self._finish()
        return "film.gif"

    def _start(self, arguments: str) -> subprocess.Popen[bytes]:
        """Start ffmpeg inside the hidden folder; in a session of its own, so that Ctrl-C comes to us alone."""
        import imageio_ffmpeg

        place = self._folder.name  # whose files are named from inside: ffmpeg reads more than a name into a path with : or %
        with Path(place, "log").open("wb") as log:
            try:
                command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *arguments.split()]
                return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, cwd=place, start_new_session=True)
            except (RuntimeError, OSError) as error:
                raise UserError(f"{self.path}: cannot start ffmpeg ({error}); set IMAGEIO_FFMPEG_EXE to one that works") from None

    def _finish(self) -> None:
        """Let ffmpeg come to the end of what it was given."""
        assert self._ffmpeg
        assert self._ffmpeg.stdin
        with contextlib.suppress(BrokenPipeError):
            self._ffmpeg.stdin.close()
        if code := self._ffmpeg.wait():
            first, *_ = Path(self._folder.name, "log").read_text(errors="replace").splitlines() or [f"exit code {code}"]
            cause = re.sub(r"^(\[[^]]*\] )+", "", first).strip()  # the later lines only say that for this reason nothing else worked
            raise UserError(f"{self.path}: ffmpeg could not write the film ({cause})") from None

    def _discard(self) -> None:
        """Stop what still runs and remove what is not the film."""
        if self._ffmpeg and self._ffmpeg.poll() is None:
            self._ffmpeg.kill()
            with contextlib.suppress(UserError):
                self._finish()
        self._folder.cleanup()
        self._closed = True
