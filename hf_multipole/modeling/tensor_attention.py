"""Tensor attention: the function, its checks, and what it hands to the exact and to the near-linear path (arXiv 2310.04064)."""

from collections.abc import Sequence

import torch

from .hierarchy import check_rows
from .multipole_attention import _check_arguments as check_attention
from .summaries import compute_dtype
from .tensor_torch import tensor_tiles


def _document_numbers(attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None) -> torch.Tensor | None:
    """``(batch, n)``: different for the documents of a row that touch each other, -1 at padding."""
    if attention_mask is None and segment_ids is None:
        return None
    if not torch.compiler.is_compiling():
        check_rows(attention_mask, segment_ids)
    numbers = torch.zeros_like(attention_mask, dtype=torch.long) if segment_ids is None else segment_ids.long() - segment_ids.min()
    return numbers if attention_mask is None else numbers.masked_fill(~attention_mask.bool(), -1)


def tensor_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    method: str = "exact",
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    degree: int | None = None,
    entry_bound: float | None = None,
    tolerance: float = 1e-3,
    on_violation: str = "raise",
    return_certificate: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    document = _document_numbers(attention_mask, segment_ids)
    n = keys[0].shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    windows = [n if width is None else min(width, n) for width in window or [None] * len(keys)]
    order = sorted(range(len(keys)), key=windows.__getitem__)
    dtype = compute_dtype(q.dtype)
    stacked = (torch.stack([tensors[i].to(dtype) for i in order]) for tensors in (keys, values))
    seed = torch.randint(2**62, ()) if dropout_p else None
    out, _ = tensor_tiles(q.to(dtype), *stacked, document, causal, [windows[i] for i in order], scale, dropout_p, seed)
    return out.to(q.dtype)
