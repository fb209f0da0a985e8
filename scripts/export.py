"""Write a trained diffusion model as a folder that diffusers loads, with no code of ours.

    python scripts/export.py RUN                          to export/ of the run
    python scripts/export.py RUN --label 3 --out three    of a model that knows classes, one that always draws a 3

It takes models that diffusers can hold: trained with --model.process ddpm --model.network.kind diffusers, as
configs/generative/ddpm_mnist.yaml is. Its weights are the averaged ones. Then, in any program:

    from diffusers import DDPMPipeline
    pictures = DDPMPipeline.from_pretrained("export")(batch_size=16).images

The README.md in the folder shows faster samplers too. RUN is a run folder, a checkpoint folder or `latest`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from generative.export import export, load
from lab.launch import guarded


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    out: Path | None = None
    """Folder to write; default: export/ of the run."""
    label: str = ""
    """Class to draw always, where the model knows classes; default: any."""


def main() -> int:
    """Export the run that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    print(f"pipeline: {export(load(options.run), options.out, options.label)}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
