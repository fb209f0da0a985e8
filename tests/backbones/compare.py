"""What tests of convolutional networks share: the same function written twice, and counting."""

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def randomised(module, seed=0):
    """The module in float64, with every weight drawn anew, those that start at zero or one too."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.double().parameters():
        with torch.no_grad():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64) + (0.1 if weight.dim() == 1 else 0))
    return module


def assert_same_function(module, reference, *shape):
    """A module and a function of (maps, its weights in order) have the same values and gradients, and leave what they are given alone."""
    maps = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    weights = list(module.parameters())
    found, expected = module(maps), reference(maps, iter(weights))
    torch.testing.assert_close(found, expected)
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((output * probe).sum(), [maps, *weights]) for output in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
        assert other.abs().sum() > 0
    with torch.no_grad():
        before = maps.clone()
        module(maps)
        assert maps.equal(before)


def convolve(maps, norm, given, stride=1, groups=1):
    """Convolution and normalisation with the weights that come next."""
    kernel = next(given)
    maps = F.conv2d(maps, kernel, next(given) if norm == "none" else None, stride, kernel.shape[-1] // 2, groups=groups)
    return normalise(maps, norm, given)


def normalise(maps, norm, given):
    """Normalisation, in groups as large as 8, with the weights that come next."""
    if norm == "none":
        return maps
    if norm == "batch":
        return F.batch_norm(maps, None, None, next(given), next(given), training=True)
    size = max(size for size in (8, 4, 2, 1) if maps.shape[1] % size == 0)
    return F.group_norm(maps, maps.shape[1] // size, next(given), next(given))


def weights(module):
    return sum(weight.numel() for weight in module.parameters())


def multiplies(module, *shape):
    """Multiply-adds of one run."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(*shape))
    return counter.get_total_flops() // 2


def map_shapes(backbone, channels, size):
    return [tuple(each.shape[1:]) for each in backbone.features(torch.rand(2, channels, size, size))]


def normalised(inputs, outputs, kernel):
    """Weights of a convolution without bias, and of its normalisation."""
    return kernel**2 * inputs * outputs + 2 * outputs
