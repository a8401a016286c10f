"""Approximations of softmax attention at a given cost, and what each costs: what scripts/studies/approximation.py compares.

The cost of an attention is counted in columns: the multiply-adds of a query, over the 2 * head_dim that one token costs it in exact
attention (its logit, and its share of the output). The mean over the queries of a row is taken; columns that a mask hides are not
counted, and neither is the exponential. So exact attention costs (n + 1) / 2 in causal rows and n in bidirectional ones.

All take ``q, k, v`` ``(batch, heads, n, dim)``, the direction and the scale, and give the outputs for several costs at once. They are
written for what they compute, not for speed: all but multipole attention take O(n ** 2) time here.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_multipole import multipole_attention
from hf_multipole.modeling.hierarchy import far_columns, group_count, level_count
from hf_multipole.modeling.learned import FarField

# Subspace iterations of the low-rank approximation, and columns beyond the rank: its error is then within 2 % of the least one.
ITERATIONS, SPARE = 2, 32


def exact(q, k, v, causal: bool, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def weights(q, k, causal: bool, scale: float) -> torch.Tensor:
    """The attention matrix ``(..., n, n)``."""
    logits = q @ k.mT * scale
    if causal:
        logits.masked_fill_(torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return logits.softmax(-1)


# Multipole attention


def multipole(q, k, v, causal: bool, scale: float, block_size: int, rank: int, linear: bool, far_field: FarField | None = None):
    """With means, or with what a far field has learned."""
    learned = {}
    if far_field is not None:
        learned = {"key_summary": far_field.key_summary, "value_summary": far_field.value_summary, "far_bias": far_field.far_bias}
        learned |= {"query_summary": far_field.query_summary} if linear else {}
    options = {"block_size": block_size, "rank": rank, "downsample_queries": linear}
    return multipole_attention(q, k, v, causal=causal, scale=scale, **options, **learned)


def weighed_segments(q, k, v, causal: bool, scale: float, block_size: int, rank: int) -> torch.Tensor:
    """Multipole attention with means, but with the exact weights of the segments: what is lost by the values of the summaries alone."""
    n, levels = q.shape[2], level_count(q.shape[2], block_size)
    columns = far_columns(n, block_size, levels, causal)
    token = torch.arange(n)
    level_of = torch.zeros(-(-n // block_size), n, dtype=torch.long)  # by block of queries and token; 0 where near or not seen
    for block, column in (~columns.hidden).nonzero().tolist():
        first = columns.first[block, column]
        level_of[block, first : first + columns.width[column]] = columns.level[column]
    level_of, token = level_of[token // block_size].to(q.device), token.to(q.device)
    means = [v]
    for level in range(levels):
        segment = token // ((block_size << level) // rank)
        total, count = (v.new_zeros(*v.shape[:2], n, x.shape[-1]).index_add_(2, segment, x) for x in (v, torch.ones_like(v)))
        means.append((total / count)[:, :, segment])
    out = torch.zeros_like(v)
    for row in range(len(q)):
        for head in range(q.shape[1]):
            matrix = weights(q[row, head], k[row, head], causal, scale)
            for level, values in enumerate(means):
                out[row, head] += matrix.masked_fill(level_of != level, 0) @ values[row, head]
    return out


def multipole_cost(n: int, causal: bool, block_size: int, rank: int, linear: bool, learned: bool) -> float:
    """Columns a query of multipole attention, its share of the summaries included.

    Means are sums: a token is added to one summary, and each summary to one of the next level. Learned summaries multiply each token by
    ``rank`` weights, and each summary by ``rank``. The queries of the O(n) form, of which a segment has one for each level, are
    counted by the summaries that they see, and summarised like keys where attention is bidirectional.
    """
    token = torch.arange(n)
    levels = level_count(n, block_size)
    if not levels:
        return (n + 1) / 2 if causal else n
    block = token // block_size
    first, last = (block - 1).clamp(min=0) * block_size, token if causal else ((block + 2) * block_size).clamp(max=n) - 1
    total = (last - first + 1).sum().item()
    columns = far_columns(n, block_size, levels, causal)
    # A summary of no tokens, at the end of a ragged group, is left out.
    segment = columns.width // rank
    seen = (n - columns.first + segment - 1).div(segment, rounding_mode="floor").clamp(max=rank).masked_fill(columns.hidden, 0)
    if linear:
        for level in range(1, levels + 1):
            # Each group once, as its first block sees it, and each of its segments that has tokens.
            groups = seen[:: 1 << (level - 1), columns.level == level].sum(1)
            width = block_size << (level - 1)
            queries = (n - torch.arange(len(groups)) * width).mul(rank).add(width - 1).div(width, rounding_mode="floor").clamp(max=rank)
            total += (queries * groups).sum().item()
        total += n  # what arrives, as one column
    else:
        total += seen.sum(1)[block].sum().item()
    summaries = sum(rank * group_count(n, block_size, level) for level in range(1, levels))
    of_tokens = (rank if learned else 1) * (n + summaries)
    # Keys and values are two vectors of dim numbers, queries one.
    return (total + of_tokens * (1.5 if linear and not causal else 1)) / n


# Others, at the same cost


def tokens_at(n: int, causal: bool, cost: float) -> int:
    """How many tokens each query sees, the earlier ones fewer, so that the mean is nearest to the cost."""
    if not causal or cost >= (n + 1) / 2:
        return max(1, min(n, round(cost)))
    # The mean of min(i, w) over i = 1..n is w - w (w - 1) / 2 n.
    b = n + 0.5
    return max(1, round(b - math.sqrt(b * b - 2 * n * cost)))


def window(q, k, v, causal: bool, scale: float, costs: list[float]) -> list[torch.Tensor]:
    """The nearest tokens: those before in causal attention, those on both sides in bidirectional; at the ends as many, to one side."""
    n, token = q.shape[2], torch.arange(q.shape[2], device=q.device)
    out = []
    for cost in costs:
        count = tokens_at(n, causal, cost)
        first = token - count + 1 if causal else (token - count // 2).clamp(0, n - count)
        parts = []
        for rows in token.split(512):
            low, high = first[rows[0]].clamp(min=0), first[rows[-1]] + count
            near = token[low:high]
            seen = (near >= first[rows, None]) & (near < first[rows, None] + count)
            parts.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, near], v[:, :, near], attn_mask=seen, scale=scale))
        out.append(torch.cat(parts, 2))
    return out


def by_head(function: Callable) -> Callable:
    """One head at a time, for the memory."""

    def attend(q, k, v, causal, scale, costs):
        rows = [[function(*head, causal, scale, costs) for head in zip(*row)] for row in zip(q, k, v)]
        return [torch.stack([torch.stack([head[i] for head in row]) for row in rows]) for i in range(len(costs))]

    return attend


@by_head
def largest(q, k, v, causal: bool, scale: float, costs: list[float]) -> list[torch.Tensor]:
    """The tokens with the largest weights, found for nothing: what the best choice of tokens could reach."""
    counts = [tokens_at(len(q), causal, cost) for cost in costs]
    value, index = weights(q, k, causal, scale).topk(max(counts), -1)
    done, total, by_count = 0, torch.zeros_like(v), {}
    for count in sorted(set(counts)):
        more = slice(done, count)
        total = total + torch.einsum("nk,nkd->nd", value[:, more], v[index[:, more]])
        done, by_count[count] = count, total / value[:, :count].sum(1, keepdim=True)
    return [by_count[count] for count in counts]


@by_head
def low_rank(q, k, v, causal: bool, scale: float, costs: list[float]) -> list[torch.Tensor]:
    """The attention matrix's best approximation of a rank in the Frobenius norm, its factors found for nothing: a singular value
    decomposition, by subspace iteration. A rank costs a column: the product of the one factor with the values, and that with the other.
    """
    ranks = [max(1, min(len(q), round(cost))) for cost in costs]
    matrix = weights(q, k, causal, scale)
    if not matrix.isfinite().all():
        raise ValueError("attention weights are not finite: there is no singular value decomposition of them")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left, size, right = torch.svd_lowrank(matrix, min(len(q), max(ranks) + SPARE), ITERATIONS)
    return [left[:, :rank] * size[:rank] @ (right[:, :rank].mT @ v) for rank in ranks]


@by_head
def nystrom(q, k, v, causal: bool, scale: float, costs: list[float]) -> list[torch.Tensor]:
    """Nystroem attention (arXiv 2102.03902): landmarks are the means of segments of queries and of keys. Each landmark costs two columns,
    besides the means of queries and keys, which cost one; the pseudo-inverse, O(landmarks ** 3) a row, is given for nothing.

    The pseudo-inverse is the paper's, by six iterations. An exact one makes far larger errors: the matrix is ill-conditioned.
    """
    if causal:
        raise ValueError("Nystroem attention is bidirectional: its landmarks are means over the whole row, the future included")
    q, k, v = (x.double() for x in (q, k, v))
    out = []
    for cost in costs:
        count = landmarks_at(len(q), cost)
        few_q, few_k = (torch.stack([part.mean(0) for part in x.tensor_split(count)]) for x in (q, k))
        inverse = pseudo_inverse(weights(few_q, few_k, False, scale))
        out.append((weights(q, few_k, False, scale) @ (inverse @ (weights(few_q, k, False, scale) @ v))).float())
    return out


def pseudo_inverse(matrix: torch.Tensor, iterations: int = 6) -> torch.Tensor:
    """Equation 11 of arXiv 2102.03902."""
    inverse = matrix.mT / (matrix.abs().sum(0).max() * matrix.abs().sum(1).max())
    one = torch.eye(len(matrix)).to(matrix)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product))) / 4
    return inverse


def landmarks_at(n: int, cost: float) -> int:
    return max(1, min(n, round((cost - 1) / 2)))


def uniform(q, k, v, causal: bool, scale: float, costs: list[float]) -> list[torch.Tensor]:
    """The mean of all values that a query sees: the scale of the errors."""
    if causal:
        mean = v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    else:
        mean = v.mean(2, keepdim=True).expand_as(v)
    return [mean for _ in costs]


BASELINES = {"window": window, "largest weights": largest, "low rank": low_rank, "Nystroem": nystrom}


def baselines(causal: bool) -> dict[str, Callable]:
    """Those that there are for this direction, by name."""
    return {name: function for name, function in BASELINES.items() if not (causal and name == "Nystroem")}
