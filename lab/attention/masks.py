"""Masks: who may look at whom. Padding, sliding windows (Beltagy et al. 2020, arXiv:2004.05150), BigBird (Zaheer et al. 2020,
"Big Bird: transformers for longer sequences", arXiv:2007.14062).

A mask is bool, (queries, keys) or what broadcasts to that, True where a query may look. The causal one is in `multihead.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis, in float32 at least; exactly 0 where a query may not look, so all 0 if it may look nowhere."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return scores.softmax(-1)
    lowest = torch.finfo(scores.dtype).min  # minus infinity would make a row that may look nowhere 0 / 0
    return scores.masked_fill(~mask, lowest).softmax(-1) * mask


def padding(lengths: Tensor, length: int) -> Tensor:
    """Which of `length` tokens are real, (N, length), for sequences of so many (N,) that were filled up at the end.

    As a mask of keys it is `padding(...)[:, None]`, and `padding(...)[:, None, None]` where there are heads.
    """
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)


def windowed(length: int, window: int, dilation: int = 1, device: torch.device | None = None) -> Tensor:
    """Each token sees itself and (window - 1) / 2 tokens on either side, (length, length); fewer at both ends.

    Args:
        length: tokens.
        window: tokens that one sees; odd.
        dilation: of so many tokens one is seen: a wider window for the same price.

    Raises:
        ValueError: the window is even or less than one.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd, so that it has a middle, not {window}")
    positions = torch.arange(length, device=device)
    distance = (positions.unsqueeze(1) - positions).abs()
    return (distance <= window // 2 * dilation) & (distance % dilation == 0)


def bigbird(length: int, window: int, global_tokens: int, random: int, *, block: int = 1, generator: torch.Generator) -> Tensor:
    """Each token sees a window, the global tokens and some random ones; global tokens see all. (length, length), section 2.

    Pairs grow with the length, not with its square, and yet no token is far from another.

    Args:
        length: tokens.
        window: tokens around each one, itself among them; odd.
        global_tokens: the first so many see all and are seen by all.
        random: tokens that each one sees besides, drawn from those that it does not see yet, as the authors' code does.
        block: tokens that stand together; the three numbers above then count blocks.
        generator: draws the random tokens; the mask is on its device.

    Raises:
        ValueError: the window is even or less than one.
    """
    blocks = -(-length // block)
    mask = windowed(blocks, window, device=generator.device)
    mask[:global_tokens] = True
    mask[:, :global_tokens] = True
    lots = torch.rand(blocks, blocks, generator=generator, device=generator.device).masked_fill(mask, -1)
    mask.scatter_(1, lots.topk(min(random, blocks)).indices, True)
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)[:length, :length]
