"""Feature pyramid: what the coarse maps know about things, brought to the fine maps that know where they are.

Lin et al. 2017, "Feature pyramid networks for object detection", arXiv:1612.03144, section 3, with the body's maps C from fine to coarse:

    M_last = lateral(C_last)        M_i = lateral(C_i) + upsampled(M_i+1)        P_i = smooth(M_i)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.backbones import create
from lab.backbones.backbone import Average, Backbone
from lab.backbones.layers import Norm


class FPN(Backbone):
    """A neck on any other backbone: as many maps, of the same sizes, all of them of one width and all with knowledge from above.

    There is no activation in it, as in the paper. A detector's heads look at each map of the pyramid; where one vector is wanted,
    all maps are averaged at the size of the coarsest (as in Pang et al. 2019, "Libra R-CNN", arXiv:1904.02701, section 3.2), and the
    head sees that: so every level takes part whatever head there is.
    """

    paper = "Lin et al. 2017, Feature pyramid networks for object detection, arXiv:1612.03144"
    year = 2017

    def __init__(self, body: Backbone, width: int = 32) -> None:
        """Args:
        body: gives the maps; its own head is taken off.
        width: channels of the pyramid (the paper's: 256).
        """
        super().__init__()
        body.head = nn.Identity()
        self.body = body
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in body.out_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in body.out_channels)
        self.head = Average()
        self.out_channels = (width,) * len(body.out_channels)
        self.out_features = width

    @property
    def sequence(self) -> list[nn.Module]:
        """The parts of the body without its head, then those of the neck."""
        return [part for part in self.body.sequence if part is not self.body.head] + super().sequence[1:]

    def features(self, images: Tensor) -> list[Tensor]:
        """The pyramid P, from fine to coarse."""
        merged = [lateral(maps) for lateral, maps in zip(self.laterals, self.body.features(images))]
        for level in reversed(range(len(merged) - 1)):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], merged[level].shape[2:])
        return [smooth(maps) for smooth, maps in zip(self.smooth, merged)]

    def forward(self, images: Tensor) -> Tensor:
        """The vector, (N, out_features): the head over the mean of all levels."""
        pyramid = self.features(images)
        size = pyramid[-1].shape[2:]
        vector: Tensor = self.head(torch.stack([area_means(maps, *size) for maps in pyramid]).mean(0))
        return vector


def area_means(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (N, C, H, W) as coarser ones (N, C, height, width), each place the mean over its share of the area.

    Unlike `F.adaptive_avg_pool2d` it gives every place the same weight where the sizes do not divide, and its gradient is repeatable
    on GPUs.
    """
    rows, columns = overlaps(maps.shape[2], height, maps), overlaps(maps.shape[3], width, maps)
    return rows @ maps @ columns.mT


def overlaps(fine: int, coarse: int, like: Tensor) -> Tensor:
    """Which part of each of `coarse` intervals each of `fine` ones is, (coarse, fine); rows sum to 1, columns to coarse / fine."""
    ends = torch.arange(1, fine + 1, device=like.device) * coarse / fine
    place = torch.arange(coarse, device=like.device)[:, None]
    inside = torch.minimum(ends, place + 1) - torch.maximum(ends - coarse / fine, place)
    return inside.clamp_min(0).to(like.dtype)


def resnet_fpn(in_channels: int, image_size: int, norm: Norm = "group", width: int = 32) -> FPN:
    """On the small ResNet.

    201 thousand weights and 27 M multiply-adds for 28x28 grey pixels, 204 thousand and 29 M for 84x84 with 4 frames.
    """
    return FPN(create("resnet_small", in_channels, image_size, norm=norm), width)
