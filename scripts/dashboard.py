"""Make the dashboard of a W&B project: a view of learning curves, pictures and settings for every kind of experiment.

    python scripts/dashboard.py
    python scripts/dashboard.py teaching --entity my-team --kinds dqn vae

The panels are those of the metrics that the runs below runs/ have recorded, each over the axis that its experiment names; where there
is no run of a kind yet, there is one panel for each group of metrics. Without an API key (`wandb login`, or WANDB_API_KEY) the same
views are built and checked, and shown instead of being saved. Every call makes new views; remove old ones on the project's page.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.tree import Tree

from generative import model as generative
from lab import classifier, runs
from lab.config import UserError
from lab.launch import guarded
from lab.recorder import console
from lab.tracking import MEDIA_PREFIX, SPEED, TrackingConfig, resolved_mode
from rl import agent as rl

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.workspaces import Section, Workspace

FAMILIES = generative.FAMILIES | rl.FAMILIES | classifier.FAMILIES
LATEST = 20
"""Runs of a kind whose metrics are looked at, the newest ones."""


@dataclass(frozen=True)
class Options:
    """Which project, and what to show of it."""

    project: Annotated[str, tyro.conf.Positional] = TrackingConfig.project
    """W&B project."""
    entity: str = ""
    """W&B user or team; default: that of the API key."""
    kinds: tuple[str, ...] = ()
    """Kinds of experiment; default: those that have runs below runs/, or all."""


def main() -> int:
    """Save the views, or show what they would be."""
    options = tyro.cli(Options, description=__doc__)
    found = {kind: keys for kind in FAMILIES if (keys := recorded(kind))}
    if wrong := [kind for kind in options.kinds if kind not in FAMILIES]:
        raise UserError(f"--kinds {wrong[0]}: expected some of {', '.join(FAMILIES)}")
    kinds = options.kinds or tuple(found) or tuple(FAMILIES)
    os.environ["WANDB_SILENT"] = "true"
    account = resolved_mode(TrackingConfig()) == "online"
    entity = options.entity or (owner() if account else "")
    views = [view(options.project, entity, kind, found.get(kind, [])) for kind in kinds]
    if account:
        save(views)
        return 0
    console.print(tree(options.project, views))
    print("nothing was sent: there is no API key, or WANDB_MODE forbids it; these are the views that would be made")
    return 0


def recorded(kind: str) -> list[str]:
    """The names of all metrics and media of the newest runs of a kind."""
    newest = runs.listing(experiments=[kind])[:LATEST]
    keys: set[str] = set()
    for run in newest:
        with contextlib.suppress(UserError, OSError):  # a damaged run shows nothing
            keys |= {key for row in run.rows() for key in row if "/" in key}
    return sorted(keys)


def owner() -> str:
    """The user or team that the API key speaks for.

    Raises:
        UserError: the server does not answer, or knows no such key.
    """
    import wandb

    try:
        return str(wandb.Api().default_entity or "")
    except Exception as error:  # of many kinds, from the network, the server and wandb itself
        raise UserError(f"W&B does not answer ({' '.join(str(error).split())[:200]}); WANDB_MODE=offline shows the views") from None


def save(views: Sequence[Workspace]) -> None:
    """Send the views.

    Raises:
        UserError: one was refused; says which.
    """
    for each in views:
        try:
            print(f"view: {each.save().url}")
        except Exception as error:
            raise UserError(f"W&B did not take the view '{each.name}': {' '.join(str(error).split())[:200]}") from None


# What it is made of


def view(project: str, entity: str, kind: str, keys: Sequence[str]) -> Workspace:
    """A view of the runs of one kind, the seeds of an experiment drawn as one line with a band.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        from wandb_workspaces import expr
        from wandb_workspaces import workspaces as ws
    except ImportError:
        raise UserError('the dashboard needs wandb-workspaces: pip install -e ".[sweep]"') from None
    only = ws.RunsetSettings(filters=[expr.Config("experiment") == kind], groupby=[expr.Metric("Group")])
    sections = [*curves(kind, keys), pictures(keys), comparison()]
    return ws.Workspace(entity=entity, project=project, name=kind, sections=[s for s in sections if s.panels], runset_settings=only)


def curves(kind: str, keys: Sequence[str]) -> list[Section]:
    """A section for each group of metrics: what is judged first, then what is trained, then how fast."""
    from wandb_workspaces import workspaces as ws

    axes = importlib.import_module(FAMILIES[kind]).EXPERIMENT.axes
    plain = [*(key for key in keys if not key.startswith(MEDIA_PREFIX)), SPEED] if keys else ["eval/", "train/"]
    groups = sorted({key.partition("/")[0] for key in plain}, key=lambda group: (group != "eval", group != "train", group))
    panels = {group: [panel(axes, key) for key in plain if key.startswith(f"{group}/")] for group in groups}
    return [ws.Section(name=group, panels=panels[group], is_open=group != SPEED.partition("/")[0]) for group in groups]


def panel(axes: Mapping[str, str], key: str) -> LinePlot:
    """The curve of a metric; of a name that ends in a slash, of all metrics that begin so."""
    from wandb_workspaces.reports import v2 as wr

    if key.endswith("/"):
        return wr.LinePlot(title=f"{key}*", x=axis(axes, key), metric_regex=f"^{key}.*")
    return wr.LinePlot(title=key.partition("/")[2], x=axis(axes, key), y=[key], groupby_aggfunc="mean", groupby_rangefunc="minmax")


def axis(axes: Mapping[str, str], key: str) -> str:
    """The metric over which another one is drawn: by its own name, or else by the longest pattern that fits it."""
    fitting = [pattern for pattern in axes if fnmatch.fnmatchcase(key, pattern)]
    return axes[max(fitting, key=lambda pattern: (pattern == key, len(pattern)))]


def pictures(keys: Sequence[str]) -> Section:
    """A panel for every kind of picture and film."""
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

    shown = [key for key in keys if key.startswith(MEDIA_PREFIX)]
    browsers = [wr.MediaBrowser(title=key.removeprefix(MEDIA_PREFIX), media_keys=[key], gallery_axis="step") for key in shown]
    return ws.Section(name="media", panels=browsers, is_open=True)


def comparison() -> Section:
    """The settings in which runs differ."""
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

    return ws.Section(name="settings", panels=[wr.RunComparer(diff_only="split")])


# Showing


def tree(project: str, views: Sequence[Workspace]) -> Tree:
    """The views with their sections and panels, to read."""
    root = Tree(f"project {project}")
    for each in views:
        branch = root.add(f"view {each.name}: {each.runset_settings.filters}, grouped by group")
        for section in each.sections:
            leaf = branch.add(f"{section.name}{'' if section.is_open else ' (closed)'}")
            for shown in section.panels:
                leaf.add(describe(shown), highlight=False)
    return root


def describe(shown: object) -> str:
    """A panel in words."""
    from wandb_workspaces.reports import v2 as wr

    if isinstance(shown, wr.LinePlot):
        return f"curve of {', '.join(map(str, shown.y)) or shown.title} over {shown.x}"
    return f"pictures of {shown.media_keys[0]}" if isinstance(shown, wr.MediaBrowser) else "run comparer: what differs"


if __name__ == "__main__":
    sys.exit(guarded(main))
