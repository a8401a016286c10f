"""What an attention layer learns about the far field: summaries of groups, and a bias of their logits."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .hierarchy import level_count
from .options import MultipoleOptions
from .private import LearnedPart
from .summaries import DirectSummary, HierarchicalSummary, MeanSummary


def trained_length(attention: nn.Module) -> int | None:
    """Tokens of the longest rows that an attention module was trained on, as its far field has it, or else its configuration; None where
    that is not known.
    """
    part = getattr(attention, "far_field", None)
    return getattr(attention.config, "max_position_embeddings", None) if part is None else part.max_length


def trained_levels(max_length: int | None, block_size: int) -> int | None:
    """Levels of groups that rows of ``max_length`` tokens have, those of training; None where that is not known. Longer rows are to do
    with them: farther distances are new to queries and keys, and what answers to them would drown the rest.
    """
    return None if max_length is None else level_count(max_length, block_size)


# Logarithms of masses lie between its negative and itself: no token has all the weight, whatever is learned.
_BOUND = 8.0


def log_masses(values: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
    """Logarithms of what tokens weigh in summaries, ``(batch, kv_heads, n)`` in the compute dtype, between -8 and 8.

    values: ``(batch, kv_heads, n, head_dim)``. Not keys, which are rotated by their positions: masses learned from these go astray in rows
    longer than those of training. saliency: ``(kv_heads, head_dim)``, learned; zeros make all masses 1.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    scores = (values @ saliency.to(values.dtype)[:, :, None]).squeeze(-1)
    return _BOUND * torch.tanh(scores.to(wide) / _BOUND)


class FarField(LearnedPart):
    """The learned parts of a layer, the attribute ``far_field`` of its attention module.

    max_length: tokens of the rows that it is trained on, which direct summaries cannot
    exceed; None where that is not known. queries: whether queries are summarised, too (bidirectional O(n)).

    Longer rows have no more levels than those of training: attention reaches as far. :func:`extend_context` adds levels, to be trained.
    """

    def __init__(self, options: MultipoleOptions, heads: int, kv_heads: int, head_dim: int, max_length: int | None, queries: bool = False):
        super().__init__()
        self.far_bias_init = options.far_bias_init
        block_size, rank = options.block_size, options.rank
        self.heads, self.max_length, self.block_size = heads, max_length, block_size

        def summary(heads: int) -> MeanSummary | DirectSummary | HierarchicalSummary:
            if options.summary == "mean":
                return MeanSummary(block_size, rank)
            if options.summary == "direct":
                return DirectSummary(block_size, rank, heads, head_dim, max_length)
            return HierarchicalSummary(block_size, rank, heads, head_dim)

        self.key_summary, self.value_summary = summary(kv_heads), summary(kv_heads)
        self.query_summary = summary(heads) if queries else None
        self.far_bias = None
        if self.far_bias_init is not None:
            self.far_bias = nn.Parameter(torch.empty(heads, max(1, level_count(max_length or 1, block_size))))
        self.saliency = nn.Parameter(torch.empty(kv_heads, head_dim)) if options.saliency else None
        self.reset_parameters()

    @property
    def summaries(self) -> list[Any]:
        return [x for x in (self.key_summary, self.value_summary, self.query_summary) if x is not None]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Means, and ``far_bias_init``; parameters that were loaded from a checkpoint stay."""
        for summary in self.summaries:
            for weight in summary.parameters():
                init.copy_(weight, summary.start(weight))
        if self.far_bias is not None:
            init.constant_(self.far_bias, self.far_bias_init)
        if self.saliency is not None:
            init.zeros_(self.saliency)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The bias of the far logits ``(heads, levels)``, and logarithms of the masses of tokens ``(batch, kv_heads, n)``, of their values
        ``(batch, kv_heads, n, head_dim)``; or None. By a call, for that is when offloaded parameters are fetched.
        """
        return self.far_bias, None if self.saliency is None else log_masses(values, self.saliency)

    @property
    def max_levels(self) -> int | None:
        """See :func:`trained_levels`. None for direct summaries, too, which refuse longer rows themselves."""
        direct = isinstance(self.key_summary, DirectSummary)
        return None if direct else trained_levels(self.max_length, self.block_size)

    @torch.no_grad()
    def extend(self, max_length: int) -> None:
        """For longer rows of training: the far bias of the last level is that of new ones. Direct summaries raise ValueError."""
        for summary in self.summaries:
            summary.extend(max_length)
        self.max_length = max_length
        if self.far_bias is not None and (missing := level_count(max_length, self.block_size) - self.far_bias.shape[1]) > 0:
            last = self.far_bias[:, -1:].expand(-1, missing)
            self.far_bias = nn.Parameter(torch.cat([self.far_bias, last], 1), self.far_bias.requires_grad)

    def keep_in_graph(self, out: torch.Tensor, length: int) -> torch.Tensor:
        """The output, with zero times the parameters that rows of so few tokens, ``length``, do not use: all processes of a parallel
        training then have gradients for all parameters, whatever the lengths of their rows.
        """
        levels = level_count(length, self.block_size, self.max_levels)
        used = [self.far_bias, self.saliency] if levels else []
        for summary in self.summaries:
            if isinstance(summary, DirectSummary):
                used += summary.levels[:levels]
            elif isinstance(summary, HierarchicalSummary):
                used += [summary.tokens, summary.merge][:levels]
        unused = [
            x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
            for x in self.parameters()
            if x.requires_grad and not any(x is y for y in used)
        ]
        return out + (0 * torch.stack(unused).sum()).to(out.dtype) if unused else out
