"""Networks that turn images into features, by name: a torso for agents, an encoder for models, a classifier's body.

torso = create("resnet_small", in_channels=4, image_size=84)
torso(images)           # (N, torso.out_features)
torso.features(images)  # the maps on the way there, from fine to coarse
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from typing import Any

from lab.backbones.backbone import Backbone, dense, map_size
from lab.config import UserError

REGISTRY = {
    "lenet": "lenet:LeNet",
    "alexnet": "alexnet:AlexNet",
    "vgg_small": "vgg:vgg_small",
    "googlenet": "inception:GoogLeNet",
    "inception_v3": "inception:InceptionV3",
    "inception_resnet": "inception_resnet:InceptionResNet",
    "resnet_small": "resnet:resnet_small",
    "resnet_bottleneck": "resnet:resnet_bottleneck",
    "resnet_preact": "resnet:resnet_preact",
    "densenet": "densenet:DenseNet",
    "xception": "xception:Xception",
    "mobilenet_v2": "mobilenet:MobileNetV2",
    "efficientnet_v2": "efficientnet:EfficientNetV2",
    "convnext": "convnext:ConvNeXt",
    "nature": "nature:NatureCNN",
    "small": "small:SmallCNN",
    "impala": "impala:Impala",
    "unet": "unet:UNetBackbone",
    "fpn": "fpn:resnet_fpn",
    "vit": "vit:ViT",
    "swin": "swin:Swin",
    "dit": "dit:DiTBackbone",
    "transformer": "transformer:TransformerBackbone",
    "gpt": "gpt:GPTBackbone",
    "bert": "bert:BERTBackbone",
    "rnn": "recurrent:rnn",
    "lstm": "recurrent:lstm",
    "gru": "recurrent:gru",
}
"""Where each one is built: the file in this folder, and its class or function there."""

__all__ = ["REGISTRY", "Backbone", "create", "list_backbones"]


def create(name: str, in_channels: int, image_size: int, hidden: int | None = None, **options: Any) -> Backbone:
    """A fresh backbone for square images of `image_size` pixels with `in_channels` channels.

    Args:
        hidden: replaces the family's own way from the last map to the vector, which often is the mean over all places, by a
            dense layer of so many units over the whole map (0: the flattened map itself), as agents need who must know where
            things are.
        options: what else the family's class takes.

    Raises:
        UserError: no backbone has this name (tells the nearest), or it cannot take such images.
    """
    if name not in REGISTRY:
        nearest = difflib.get_close_matches(name, REGISTRY, n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(sorted(REGISTRY))}"
        raise UserError(f"no backbone is called {name!r}; {hint}")
    module, _, kind = REGISTRY[name].partition(":")
    backbone: Backbone = getattr(importlib.import_module(f"lab.backbones.{module}"), kind)(in_channels, image_size, **options)
    if hidden is not None:
        flat = map_size(backbone, in_channels, image_size)
        backbone.head, backbone.out_features = dense(flat, *([hidden] if hidden else [])), hidden or flat
    return backbone


def list_backbones(pattern: str = "*") -> list[str]:
    """The names that match a pattern such as `*cnn*`."""
    return sorted(fnmatch.filter(REGISTRY, pattern))
