"""Networks that turn images into features, by name: a torso for agents, an encoder for models.

torso = create("nature", in_channels=4, image_size=84)
torso(images)           # (N, torso.out_features)
torso.features(images)  # the maps on the way there, from fine to coarse
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from typing import Any

from lab.backbones.backbone import Backbone
from lab.config import UserError

REGISTRY = {"nature": "lab.backbones.nature:NatureCNN", "small": "lab.backbones.small:SmallCNN"}

__all__ = ["REGISTRY", "Backbone", "create", "list_backbones"]


def create(name: str, in_channels: int, image_size: int, **options: Any) -> Backbone:
    """A fresh backbone for square images of `image_size` pixels with `in_channels` channels.

    Raises:
        UserError: no backbone has this name (tells the nearest), or it cannot take images so small.
    """
    if name not in REGISTRY:
        nearest = difflib.get_close_matches(name, REGISTRY, n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(sorted(REGISTRY))}"
        raise UserError(f"no backbone is called {name!r}; {hint}")
    module, _, kind = REGISTRY[name].partition(":")
    backbone: Backbone = getattr(importlib.import_module(module), kind)(in_channels, image_size, **options)
    return backbone


def list_backbones(pattern: str = "*") -> list[str]:
    """The names that match a pattern such as `*cnn*`."""
    return sorted(fnmatch.filter(REGISTRY, pattern))
