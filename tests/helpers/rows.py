"""Rows of a batch as they come: laid out in memory in several ways, padded, packed."""

import torch

LAYOUTS = ("contiguous", "transposed", "strided", "fused")


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides; gradients arrive at the contiguous leaf."""
    if layout == "transposed":  # as a projection leaves it: (batch, tokens, heads, dim)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if layout == "fused":  # a part of one projection of q, k and v
        around = torch.full_like(x[:, :1], torch.nan)
        return torch.cat([around, x, around], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 1:-1]
    return x


def mask_of(case) -> torch.Tensor | None:
    if case.padding is None:
        return None
    mask = torch.zeros(case.batch, case.n, dtype=torch.bool)
    for row, (left, right) in zip(mask, case.padding):
        row[left : case.n - right] = True
    return mask


def segments_of(case) -> torch.Tensor | None:
    if case.cuts is None:
        return None
    starts = torch.zeros(case.n, dtype=torch.long)
    starts[list(case.cuts)] = 1
    ids = starts.cumsum(0) * 7 % 11  # not in order, yet different (for up to 11 documents)
    return torch.stack([ids + row for row in range(case.batch)])
