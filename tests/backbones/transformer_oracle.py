"""Torch's own layers with the weights of ours, and scrambled weights, so that no ones and zeros hide a mistake."""

import torch
from torch import nn

from lab.backbones.transformer import DecoderLayer

NAMES = {
    "attention.inputs.weight": "self_attn.in_proj_weight",
    "attention.inputs.bias": "self_attn.in_proj_bias",
    "attention.output": "self_attn.out_proj",
    "cross.inputs.weight": "multihead_attn.in_proj_weight",
    "cross.inputs.bias": "multihead_attn.in_proj_bias",
    "cross.output": "multihead_attn.out_proj",
    "feed.first": "linear1",
    "feed.last": "linear2",
    "look.norm": "norm1",
}


def scrambled(module, seed=0):
    """The module with all weights near where they begin, but none of them special; in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.double().parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return module


def names(layer):
    """Ours to torch's, for the parameters of a layer."""
    last = {"read.norm": "norm2", "think.norm": "norm3"} if isinstance(layer, DecoderLayer) else {"think.norm": "norm2"}
    table = NAMES | last
    prefixes = {name: next(prefix for prefix in table if name.startswith(prefix)) for name, _ in layer.named_parameters()}
    return {name: name.replace(prefix, table[prefix]) for name, prefix in prefixes.items()}


def torch_layer(layer, activation):
    """A layer of torch that is the same function."""
    kind = nn.TransformerDecoderLayer if isinstance(layer, DecoderLayer) else nn.TransformerEncoderLayer
    width, hidden = layer.attention.width, layer.feed.first.out_features
    theirs = kind(width, layer.attention.heads, hidden, 0.0, activation, batch_first=True, norm_first=layer.norm_first).double()
    ours = dict(layer.named_parameters())
    theirs.load_state_dict({other: ours[name].detach().clone() for name, other in names(layer).items()})
    return theirs


def assert_same_gradients(layer, theirs):
    """Every weight of the two layers has the same gradient, and one that is not zero."""
    other = dict(theirs.named_parameters())
    for name, weight in layer.named_parameters():
        torch.testing.assert_close(weight.grad, other[names(layer)[name]].grad, msg=lambda text, name=name: f"{name}: {text}")
        assert weight.grad.abs().sum() > 0, name
