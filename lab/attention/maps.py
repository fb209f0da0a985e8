"""Maps of where a model looks: what the attention of all its layers passes on, or what its answer hangs on.

    rollout     A = r I + (1 - r) mean of the heads, rows made to sum to 1        A_n ... A_2 A_1
    gradcam     relu(sum_c w_c map_c)        w_c = the mean of d logit / d map_c over all places
    saliency    |d logit / d pixel|

Rollout (Abnar & Zuidema 2020, arXiv:2005.00928) follows from place to place what is passed on, a share r of it past the attention;
it knows neither what was passed on nor for which class. The others are of one class: Grad-CAM (Selvaraju et al. 2017,
arXiv:1610.02391) shows which places of the last map speak for it, but not where a dense layer knows the places apart; saliency
(Simonyan et al. 2014, arXiv:1312.6034) fits any network, sharp but noisy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention import recorded
from lab.attention.windows import WindowAttention, cut
from lab.backbones import Backbone
from lab.backbones.backbone import Average, LastPlace
from lab.backbones.swin import GRID, Swin
from lab.backbones.transformer import PatchBackbone, Reader
from lab.classifier import Classifier
from lab.config import UserError

# The mathematics


def rollout(layers: Sequence[Tensor], residual: float = 0.5) -> Tensor:
    """How much of each place before the first layer is in each one after the last, (N, L, L); every row sums to 1.

    Args:
        layers: weights (N, heads, L, L), from the first layer to the last.
        residual: share that passes a layer by, more than 0 and up to 1.
    """
    seen = passed(layers[0], residual)
    for weights in layers[1:]:
        seen = passed(weights, residual) @ seen
    return seen


def passed(weights: Tensor, residual: float = 0.5) -> Tensor:
    """The same for one layer, whose weights are (N, heads, L, L)."""
    itself = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    mixed = residual * itself + (1 - residual) * weights.mean(1)
    return mixed / mixed.sum(-1, keepdim=True)  # a masked query that looks nowhere has a row without weights


def gradcam(model: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """How much each place of the map that the vector is a mean of speaks for a class, (N, h, w).

    Args:
        model: a classifier whose backbone ends in the mean over all places.
        images: numbers (N, C, H, W).
        classes: int64 (N,).
    """
    averaged: list[Tensor] = []
    with averages(model.body)[0].register_forward_pre_hook(lambda _, inputs: averaged.append(inputs[0])):
        logits = model(images.detach().requires_grad_())
    weights = of_class(logits, classes, averaged[0]).mean((2, 3), keepdim=True)
    return (weights * averaged[0]).sum(1).relu().detach()


def averages(body: Backbone) -> list[nn.Module]:
    """What in its head takes the mean over all places of a map; nothing, in a dense head."""
    return [module for module in body.head.modules() if isinstance(module, Average)]


def saliency(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """How much a class's logit hangs on each pixel, in the channel where that is most, (N, H, W); for any model that gives logits."""
    pixels = images.detach().requires_grad_()
    return of_class(model(pixels), classes, pixels).abs().amax(1)


def of_class(logits: Tensor, classes: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of each image's logit of its class with respect to its inputs, of their shape."""
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), inputs)
    return gradient


# What the attention of a backbone did


@dataclass(frozen=True, eq=False)
class Looks:
    """Where the layers of a backbone looked, and where its vector came from."""

    layers: list[Tensor]
    """How much each place looks at each, (N, heads, L, L), from the first layer to the last; later ones may have fewer places."""
    reading: Tensor
    """How much of the vector comes from each place after the last layer, (N, heads, L); a mean counts as one head."""

    def rollout(self) -> Tensor:
        """How much of the vector comes from each place before the first layer, (N, L)."""
        seen = self.reading.mean(1, keepdim=True)
        for weights in reversed(self.layers):
            seen = refined(seen, weights.shape[-1]) @ passed(weights)
        return seen[:, 0]

    def heads(self) -> list[Tensor]:
        """Where each head of each layer looks, (N, heads, L), on average over its queries by their share in the vector."""
        share = self.reading.mean(1, keepdim=True)
        return [(refined(share, weights.shape[-1])[:, None] @ weights)[:, :, 0] for weights in self.layers]


def refined(shares: Tensor, places: int) -> Tensor:
    """Shares (N, 1, L) of a square map's places as shares of a map of twice the side, if it has so many: a quarter to each of the four.

    Swin merges by a linear layer of all four, which may weigh them otherwise: this is as blind to values as rollout itself.
    """
    if shares.shape[-1] == places:
        return shares
    side = math.isqrt(shares.shape[-1])
    finer: Tensor = shares.unflatten(-1, (side, side)).repeat_interleave(2, -1).repeat_interleave(2, -2) / 4
    return finer.flatten(-2)


def looks(body: Backbone, images: Tensor) -> Looks:
    """Where a backbone looks whose attention is all that carries something from place to place: Swin, or one over patches."""
    with torch.no_grad(), recorded(body) as notes:
        body(images)
    if isinstance(body, Swin):
        layers = [whole(calls[0], len(images), cast(WindowAttention, body.get_submodule(name))) for name, calls in notes.items()]
    else:
        layers = [calls[0] for name, calls in notes.items() if name.startswith("encoder.")]
    if isinstance(body.head, Reader):  # what it adds to, its query, is the same for all images
        return Looks(layers, notes["head.decoder.layers.0.cross"][0][:, :, 0])
    reading = torch.zeros_like(layers[-1][:, :1, 0])
    reading[..., slice(-1, None) if isinstance(body.head, LastPlace) else slice(None)] = 1
    return Looks(layers, reading / reading.sum(-1, keepdim=True))


def whole(weights: Tensor, count: int, attention: WindowAttention) -> Tensor:
    """Weights within windows (N * windows, heads, pixels, pixels) as weights within a square map, (N, heads, L, L); zero elsewhere."""
    windows = weights.unflatten(0, (count, -1)).transpose(0, 1)
    side = math.isqrt(len(windows)) * attention.window
    places = torch.arange(side * side, device=weights.device).view(1, side, side, 1)
    cuts = cut(places.roll((-attention.shift, -attention.shift), (1, 2)), attention.window)[0, :, :, 0]
    maps = weights.new_zeros(count, weights.shape[1], side * side, side * side)
    for window, own in zip(windows, cuts):
        maps[:, :, own[:, None], own] = window
    return maps


# Pictures


def methods(body: Backbone) -> tuple[str, ...]:
    """Ways to map where a backbone looks, the best one first."""
    attention = ("rollout", "heads") if isinstance(body, Swin | PatchBackbone) else ()
    return (*attention, *(("gradcam",) if averages(body) else ()), "saliency")


def where(model: Classifier, images: Tensor, method: str = "auto") -> tuple[Tensor, str]:
    """Where a classifier looks, and the name of the method that tells: maps (N, H, W) in [0, 1], 1 where it looks most.

    Args:
        images: numbers (N, C, H, W).
        method: rollout, gradcam or saliency (of the class that it takes an image for), or auto for the best that there is.

    Raises:
        UserError: its backbone has no such method.
    """
    method = methods(model.body)[0] if method == "auto" else allowed(model, method)
    if method == "rollout":
        return strongest(on_pixels(model.body, looks(model.body, images).rollout(), images.shape[-1])), method
    classes = model.probabilities(images).argmax(1)
    if method == "saliency":
        return strongest(saliency(model, images, classes)), method
    places = gradcam(model, images, classes)[:, None]
    return strongest(F.interpolate(places, images.shape[2:], mode="bilinear")[:, 0]), method


def heads(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """Where each head of each layer looks, by the layer's name, maps (N, heads, H, W) in [0, 1]; the decoder's last, if there is one.

    Raises:
        UserError: its backbone has no attention over the whole image.
    """
    allowed(model, "heads")
    seen = looks(model.body, images)
    shares = {f"layer {number}": each for number, each in enumerate(seen.heads(), 1)}
    if isinstance(model.body.head, Reader):
        shares["decoder"] = seen.reading
    return {name: strongest(on_pixels(model.body, each, images.shape[-1])) for name, each in shares.items()}


def allowed(model: Classifier, method: str) -> str:
    """The method, if a classifier's backbone has it.

    Raises:
        UserError: it has not.
    """
    if method not in (own := methods(model.body)):
        raise UserError(f"a {type(model.body).__name__} has no map by {method}; it has {', '.join(own)}")
    return method


def on_pixels(body: Backbone, shares: Tensor, size: int) -> Tensor:
    """Shares of the places of a square map, (N, ..., L), for the pixels of the image, (N, ..., size, size): bilinear in between."""
    covered = body.patches.grid[0] * body.patches.patch if isinstance(body, PatchBackbone) else -(-size // GRID) * GRID
    side = math.isqrt(shares.shape[-1])
    maps = F.interpolate(shares.reshape(-1, 1, side, side), (covered, covered), mode="bilinear")
    return maps[..., :size, :size].reshape(*shares.shape[:-1], size, size)


def strongest(maps: Tensor) -> Tensor:
    """Maps (..., H, W) divided by their largest number."""
    return maps / maps.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
