"""What an attention layer learns about the far field: summaries of groups, and a bias of their logits."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .hierarchy import level_count
from .summaries import DirectSummary, HierarchicalSummary, MeanSummary, compute_dtype


class LearnedPart(nn.Module):
    """What a converted model has more than the stock one. Its ``reset_parameters`` fills what a checkpoint lacks."""

    # Transformers asks every module for this flag, runs the initialisation of the model on it, which in a stock model knows nothing
    # of this class, and sets the flag: the moment to fill parameters that the checkpoint lacked.
    @property
    def _is_hf_initialized(self) -> bool:
        return self.__dict__.get("_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        if value and not self._is_hf_initialized:
            self.reset_parameters()
        self.__dict__["_initialized"] = value


class FarField(LearnedPart):
    """The learned parts of a layer, the attribute ``far_field`` of its attention module.

    options: as from :func:`attention_options`. max_length: tokens of the rows that it is trained on, which direct summaries cannot
    exceed; None where that is not known. queries: whether queries are summarised, too (bidirectional O(n)).

    On longer rows, the levels that training never had must not drown what it had: the merge of hierarchical summaries enlarges nothing
    there, and where there is a far bias, they take over the last one and count for no more tokens than its level.
    """

    def __init__(self, options: dict, heads: int, kv_heads: int, head_dim: int, max_length: int | None, queries: bool = False):
        super().__init__()
        self.far_bias_init = options["far_bias_init"]
        self.bias_falls = options["size_weighting"] and max_length is not None
        block_size, rank = options["block_size"], options["rank"]

        def summary(heads: int) -> nn.Module:
            if options["summary"] == "mean":
                return MeanSummary(block_size, rank)
            if options["summary"] == "direct":
                return DirectSummary(block_size, rank, heads, head_dim, max_length)
            return HierarchicalSummary(block_size, rank, heads, head_dim, max_length)

        self.key_summary, self.value_summary = summary(kv_heads), summary(kv_heads)
        self.query_summary = summary(heads) if queries else None
        self.far_bias = None
        if self.far_bias_init is not None:
            self.far_bias = nn.Parameter(torch.empty(heads, max(1, level_count(max_length or 1, block_size))))
        self.reset_parameters()

    @property
    def summaries(self) -> list[nn.Module]:
        return [x for x in (self.key_summary, self.value_summary, self.query_summary) if x is not None]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Means, and ``far_bias_init``; parameters that were loaded from a checkpoint stay."""
        for summary in self.summaries:
            for weight in summary.parameters():
                init.copy_(weight, summary.start(weight))
        if self.far_bias is not None:
            init.constant_(self.far_bias, self.far_bias_init)

    def forward(self, levels: int) -> torch.Tensor | None:
        """The bias of the far logits of rows with so many levels, or None: ``(heads, levels)``, or fewer, the last one then being that
        of all further levels. By a call, for that is when offloaded parameters are fetched.
        """
        if self.far_bias is None or not self.bias_falls or levels <= self.far_bias.shape[1]:
            return self.far_bias
        bias = self.far_bias.to(compute_dtype(self.far_bias.dtype))
        # Takes back what the weighting by size adds: a summary of each further level stands for twice as many tokens.
        doublings = torch.arange(1, levels + 1 - bias.shape[1], device=bias.device, dtype=bias.dtype)
        return torch.cat([bias, bias[:, -1:] - math.log(2) * doublings], 1)

    def keep_in_graph(self, out: torch.Tensor, levels: int) -> torch.Tensor:
        """The output, with zero times the parameters that rows of so few ``levels`` do not use: all processes of a parallel training
        then have gradients for all parameters, whatever the lengths of their rows.
        """
        used = [self.far_bias] if levels else []
        for summary in self.summaries:
            if isinstance(summary, DirectSummary):
                used += summary.levels[:levels]
            elif isinstance(summary, HierarchicalSummary):
                used += [summary.tokens, summary.merge][:levels]
        unused = [x.sum() for x in self.parameters() if x.requires_grad and not any(x is y for y in used)]
        return out + (0 * torch.stack(unused).sum()).to(out.dtype) if unused else out
