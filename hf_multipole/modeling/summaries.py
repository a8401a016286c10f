"""Group summaries: what a query sees of a far group in place of its tokens (arXiv 2310.11960, section 3).

A summary module maps tokens ``(batch, heads, n, dim)`` in the grid of hierarchy.py (``n`` a multiple of ``block_size``),
of which ``validity`` ``(batch or 1, n)`` bool, or None for all, marks the real ones, to one tensor of summaries
``(batch, heads, groups, rank, dim)`` for each of ``levels`` levels. The learned kinds have weights for each head, rank and channel, and start
exactly at the mean: summary r of a group is the mean of the r-th of ``rank`` equal contiguous segments.

Groups that are not full are divided by their mass, the share of their absolute weight that lies on valid tokens;
``counts`` says for how many tokens each summary stands: the mean mass times the width of a segment.
"""

import math

import torch
from torch import nn

from .hierarchy import level_count


def _phases(width: int) -> int:
    # Tokens handled in one vectorised step; eight keep the accumulator within the cache and the inner loop long.
    return math.gcd(width, 8)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over tokens are computed in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("hf_multipole::depthwise_map", mutates_args=())
def depthwise_map(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out[b, h, g, r, c] = sum_t weight[h, r, t, c] * x[b, h, g, t, c]``, reading x once.

    x: ``(batch, heads, groups, width, dim)``; weight: ``(heads, rank, width, dim)``; out, in the compute dtype:
    ``(batch, heads, groups, rank, dim)``.
    """
    batch, heads, groups, width, dim = x.shape
    rank, u = weight.shape[1], _phases(width)
    total = x.new_zeros(batch, heads, groups, rank, u * dim, dtype=compute_dtype(x.dtype))
    x = x.reshape(batch, heads, groups, width // u, 1, u * dim)
    weight = weight.to(total.dtype).reshape(heads, 1, rank, width // u, u * dim)
    for step in range(width // u):
        total.addcmul_(x[:, :, :, step], weight[:, :, :, step])
    return total.view(batch, heads, groups, rank, u, dim).sum(4)


@torch.library.custom_op("hf_multipole::depthwise_map_backward", mutates_args=())
def depthwise_map_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, groups, width, dim = x.shape
    rank = weight.shape[1]
    cast = weight.to(grad.dtype)
    grad_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device)
    # A few groups at a time, so that tokens and sums stay in the cache.
    together = max(1, min(groups, 2**18 // (width * dim)))
    total = grad.new_zeros(heads, min(groups, max(1, 2**20 // weight.numel())), rank, width, dim)
    for b in range(batch):
        for start in range(0, groups, together):
            part = slice(start, start + together)
            torch.mul(grad[b, :, part, 0, None], cast[:, None, 0], out=grad_x[b, :, part])
            for r in range(1, rank):
                grad_x[b, :, part].addcmul_(grad[b, :, part, r, None], cast[:, None, r])
        for start in range(0, groups, total.shape[1]):
            upper = grad[b, :, start : start + total.shape[1], :, None]
            total[:, : upper.shape[1]].addcmul_(x[b, :, start : start + total.shape[1], None], upper)
    return grad_x.to(x.dtype), total.sum(1).to(weight.dtype)


@depthwise_map.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:3], weight.shape[1], x.shape[-1], dtype=compute_dtype(x.dtype))


@depthwise_map_backward.register_fake
def _(grad, x, weight):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight, memory_format=torch.contiguous_format)


depthwise_map.register_autograd(
    lambda ctx, grad: depthwise_map_backward(grad.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _groups(x: torch.Tensor, width: int) -> torch.Tensor:
    """``(batch, heads, n, dim)`` to ``(batch, heads, groups, width, dim)``, zeros after the end."""
    missing = -x.shape[2] % width
    if missing:
        x = nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, width))


def _share(weight: torch.Tensor) -> torch.Tensor:
    """Absolute weights as shares of their sum over the tokens (uniform where all are 0)."""
    size = weight.abs()
    total = size.sum(2, keepdim=True)
    return torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), 1 / weight.shape[2])


def _mean_weight(rank: int, width: int, **like) -> torch.Tensor:
    """``(rank, width)``: row r takes the mean of the r-th of ``rank`` equal segments."""
    segment = torch.arange(width, device=like.get("device")) // (width // rank)
    return (segment == torch.arange(rank, device=like.get("device"))[:, None]).to(**like) * (rank / width)


class MeanSummary(nn.Module):
    """Segment means: no parameters, any length."""

    def __init__(self, block_size: int, rank: int):
        super().__init__()
        self.block_size, self.rank = block_size, rank

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, rank={self.rank}"

    def _maps(self, x: torch.Tensor, levels: int, absolute: bool) -> list[torch.Tensor]:
        """The linear maps of all levels, not yet divided by the mass; of ``absolute`` shares: the masses."""
        segment = self.block_size // self.rank
        out = []
        for _ in range(levels):
            x = _groups(x, segment).mean(3, dtype=compute_dtype(x.dtype))
            out.append(_groups(x, self.rank))
            segment = 2
        return out

    def masses(self, validity: torch.Tensor, levels: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Mass of every summary, ``(batch, heads or 1, groups, rank, dim or 1)`` a level, from 0 (no valid token) to 1."""
        heads, channels = self._mass_shape(dim)
        valid = validity[:, None, :, None].to(dtype).expand(-1, heads, -1, channels)
        return self._maps(valid, levels, True)

    def _mass_shape(self, dim: int) -> tuple[int, int]:
        return 1, 1

    def counts(self, validity: torch.Tensor, levels: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Tokens that each summary stands for, ``(batch, heads or 1, groups, rank)`` a level."""
        segment = self.block_size // self.rank
        return [mass.mean(-1) * (segment << level) for level, mass in enumerate(self.masses(validity, levels, dim, dtype))]

    def forward(self, tokens: torch.Tensor, validity: torch.Tensor | None, levels: int) -> list[torch.Tensor]:
        if validity is None:
            return self._maps(tokens, levels, False)
        summaries = self._maps(tokens.masked_fill(~validity[:, None, :, None], 0), levels, False)
        masses = self.masses(validity, levels, tokens.shape[-1], compute_dtype(tokens.dtype))
        return [
            torch.where(mass > 0, summary / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0) for summary, mass in zip(summaries, masses)
        ]


class _LearnedSummary(MeanSummary):
    def __init__(self, block_size: int, rank: int, heads: int, dim: int):
        super().__init__(block_size, rank)
        self.heads, self.dim = heads, dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}, dim={self.dim}"

    def _mass_shape(self, dim: int) -> tuple[int, int]:
        return self.heads, self.dim

    @staticmethod
    def start(weight: torch.Tensor) -> torch.Tensor:
        """The mean, as weights shaped like ``weight`` ``(heads, rank, width, dim)``."""
        _, rank, width, _ = weight.shape
        return _mean_weight(rank, width, dtype=weight.dtype, device=weight.device)[None, :, :, None].expand_as(weight)


class HierarchicalSummary(_LearnedSummary):
    """Level 1 maps ``block_size`` tokens to ``rank`` summaries; every further level merges the ``2 * rank`` summaries of two
    children with one map shared by all levels (the multipole-to-multipole step). Any length, O(n) in all.
    """

    def __init__(self, block_size: int, rank: int, heads: int, dim: int):
        super().__init__(block_size, rank, heads, dim)
        self.tokens = nn.Parameter(torch.empty(heads, rank, block_size, dim))
        self.merge = nn.Parameter(torch.empty(heads, rank, 2 * rank, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.tokens.copy_(self.start(self.tokens))
        self.merge.copy_(self.start(self.merge))

    def _maps(self, x, levels, absolute):
        tokens, merge = (_share(self.tokens), _share(self.merge)) if absolute else (self.tokens, self.merge)
        out = []
        for level in range(levels):
            if level == 0:
                out.append(depthwise_map(_groups(x, self.block_size), tokens))
            else:
                children = _groups(out[-1].flatten(2, 3), 2 * self.rank)
                out.append((children[:, :, :, None] * merge[:, None]).sum(4))
        return out


class DirectSummary(_LearnedSummary):
    """Each level maps its own ``w_l`` tokens to ``rank`` summaries, as in the paper: parameters in proportion to the length,
    which is at most ``max_length`` tokens.
    """

    def __init__(self, block_size: int, rank: int, heads: int, dim: int, max_length: int):
        super().__init__(block_size, rank, heads, dim)
        self.max_length = max_length
        self.levels = nn.ParameterList(
            torch.empty(heads, rank, block_size << level, dim) for level in range(level_count(max_length, block_size))
        )
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_length={self.max_length}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight in self.levels:
            weight.copy_(self.start(weight))

    def _maps(self, x, levels, absolute):
        if levels > len(self.levels):
            raise ValueError(
                f"direct summaries were built for at most {self.max_length} tokens and have {len(self.levels)} levels, "
                f"but this row needs {levels}; use summary='hierarchical', which has no such limit"
            )
        weights = [_share(weight) if absolute else weight for weight in self.levels[:levels]]
        return [depthwise_map(_groups(x, weight.shape[2]), weight) for weight in weights]
