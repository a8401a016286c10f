"""The O(n) form of multipole attention: at the far levels the queries are summarised, too (arXiv 2310.11960, section 3).

At each level a group of queries is cut into ``rank`` segments, and all tokens of a segment take the far result of one query. That
result, the weighted mean of the summaries that the segment sees and the log-sum-exp of their logits, is merged from the coarsest
level to the finest, each segment being half of one of the next level. What arrives at the segments of level 1 enters the softmax of
their tokens as one column more beside the near field: its logit is the log-sum-exp, its value the mean.
"""

from typing import NamedTuple

import torch
from torch import nn

from .calls import Call
from .hierarchy import Alignment
from .multipole_torch import Blocks, BlockWork
from .operators import define
from .private import softmax_backward
from .summaries import Field

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")

# Logit of what is not seen: its exponential is 0, and yet the difference of two of them is a number.
HIDDEN = -1e30


class _FirstTokens(torch.autograd.Function):
    """Every ``width``-th token; also returns the tokens, whose gradient is completed in place (see summaries.py)."""

    @staticmethod
    def forward(ctx, tokens, width):
        ctx.width = width
        return tokens.view_as(tokens), tokens[:, :, ::width].clone()

    @staticmethod
    def backward(ctx, grad, first):
        grad[:, :, :: ctx.width].add_(first)
        return grad, None


def first_queries(q: torch.Tensor, block_size: int, rank: int, levels: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The queries for further use, and those of the first tokens of the segments, ``(batch, heads, segments, dim)`` a level.

    The first token is known to all tokens of its segment, so that nothing of the future reaches them.
    """
    q, first = _FirstTokens.apply(q, block_size // rank)
    return q, [first[:, :, :: 1 << level].to(torch.promote_types(q.dtype, torch.float32)) for level in range(levels)]


def partial_softmax(q, k, v, bias, scale: float, softcap: float | None, dropout_p: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention ``(..., queries, value_dim)`` of q ``(..., queries, dim)`` to k and v ``(..., keys, dim)``, and the log-sum-exp
    ``(..., queries)`` of the logits, to which ``bias`` is added; HIDDEN there hides a key.
    """
    logits = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = torch.where(bias > HIDDEN, logits + bias, HIDDEN)
    total = logits.logsumexp(-1)
    return nn.functional.dropout((logits - total[..., None]).exp(), dropout_p) @ v, total


def merge(fine: tuple, coarse: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Two results of :func:`partial_softmax` as the one over the keys of both."""
    total = torch.logaddexp(fine[1], coarse[1])
    return torch.lerp(coarse[0], fine[0], (fine[1] - total).exp()[..., None]), total


class _Parents:
    """Pairs of groups, those of all levels one after another: whatever a group sees of its level belongs to the pairs beside its own."""

    def __init__(self, groups: list[int], block_size: int, alignment: Alignment | None, causal: bool, device: torch.device):
        self.counts = [-(-count // 2) for count in groups]
        self.level = torch.cat([torch.full((count,), level, device=device) for level, count in enumerate(self.counts)])
        number = torch.cat([torch.arange(count, device=device) for count in self.counts])
        last = torch.tensor(self.counts, device=device)[self.level] - 1
        # Whether the pair before, or behind, is there and of the same document; (batch or 1, pairs).
        before, behind = (number > 0)[None], (number < last)[None]
        if alignment is not None:
            width = (2 * block_size) << self.level
            block = (2 * number << self.level).clamp(max=alignment.first.shape[1] - 1)
            before = before & (alignment.first[:, block] <= (number - 1) * width)
            behind = behind & (alignment.last[:, block] > (number + 1) * width)
        self.beside = [(1, before)] if causal else [(1, before), (-1, behind)]

    def pairs(self, levels: list[torch.Tensor], rank: int) -> torch.Tensor:
        """``(batch, heads, groups * rank, ...)`` a level to ``(batch, heads, pairs, 2 * rank, ...)``, filled up with zeros."""
        even = []
        for x, count in zip(levels, self.counts):
            missing = 2 * rank * count - x.shape[2]
            even.append(nn.functional.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)) if missing else x)
        return torch.cat(even, 2).unflatten(2, (-1, 2 * rank))

    def windows(self, pairs: torch.Tensor) -> torch.Tensor:
        """What the pairs see, ``(batch, heads, pairs, 2 or 4 * rank, ...)``: those beside them, zeros where there is none."""
        found = []
        for shift, there in self.beside:
            hidden = ~there[:, None, :, None]
            found.append(pairs.roll(shift, 2).masked_fill_(hidden[..., None] if pairs.dim() == 5 else hidden, 0))
        return found[0] if len(found) == 1 else torch.cat(found, 3)

    def covered(self, rank: int) -> torch.Tensor:
        """``(2 * rank, 2 or 4 * rank)`` bool: groups next to the query's own, which a finer level covers."""
        child = torch.arange(2 * rank, device=self.level.device) // rank
        own = child[:, None]
        return torch.cat([(own == 0) & (child == 1) if shift > 0 else (own == 1) & (child == 0) for shift, _ in self.beside], 1)


def far_results(queries: list[torch.Tensor], field: Field, alignment: Alignment | None, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The far field of the segments of level 1: means ``(batch, heads, segments, value_dim)`` and log-sum-exps, ``(batch, heads,
    segments)``. queries: ``(batch, heads, segments, dim)`` a level.
    """
    keys, block_size, rank, far_bias = field.keys, call.options.block_size, call.options.rank, call.far_bias
    (batch, kv_heads), heads = keys[0].shape[:2], queries[0].shape[1]
    repeats = heads // kv_heads
    parents = _Parents([x.shape[2] for x in keys], block_size, alignment, call.causal, keys[0].device)
    of_levels = field.counts
    if of_levels is None:
        of_levels = [x.new_full((batch, 1, *x.shape[2:4]), (block_size << level) / rank) for level, x in enumerate(keys)]
    k, v, counts = (parents.windows(parents.pairs([level.flatten(2, 3) for level in x], rank)) for x in (keys, field.values, of_levels))

    # (batch or 1, kv_heads or 1, pairs, repeats or 1, 2 * rank or 1, columns)
    bias = torch.where(counts > 0, counts, 1).log() if call.options.size_weighting else torch.zeros_like(counts)
    bias = torch.where(counts > 0, bias, HIDDEN)[:, :, :, None, None]
    if far_bias is not None:
        learned = far_bias.to(bias.dtype)[:, parents.level.clamp(max=far_bias.shape[1] - 1)]
        bias = bias + learned.unflatten(0, (kv_heads, repeats)).transpose(1, 2)[None, ..., None, None]
    bias = bias.masked_fill(parents.covered(rank), HIDDEN).clamp(min=HIDDEN)
    bias = bias.expand(*bias.shape[:3], repeats, *bias.shape[4:]).flatten(3, 4)

    # The query heads of one key head are its queries.
    q = parents.pairs(queries, rank).unflatten(1, (kv_heads, repeats)).transpose(2, 3).flatten(3, 4)
    with torch.autocast(q.device.type, enabled=False):
        mean, total = partial_softmax(q, k, v, bias, call.scale, call.softcap, call.dropout_p)
        mean, total = (x.unflatten(3, (repeats, -1)).transpose(2, 3).flatten(1, 2) for x in (mean, total))
        *finer, merged = zip(*(x.flatten(2, 3).split([2 * rank * count for count in parents.counts], 2) for x in (mean, total)))
        for fine in reversed(finer):
            size = fine[1].shape[2]
            merged = merge(fine, tuple(x.repeat_interleave(2, 2)[:, :, :size] for x in merged))
    return tuple(x[:, :, : keys[0].shape[2] * rank] for x in merged)


# Columns behind the near ones, of which the first are used: with whole vectors of them, the softmax is a third faster than with one.
_MORE = 16


class Segments(NamedTuple):
    """Arguments of the operator :func:`segment_attention`: those of the near field as in Blocks, and the far field of the segments that
    the rows of a block are cut into.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    far_mean: torch.Tensor  # (blocks, segments of a block's rows, value_dim), in the compute dtype
    far_total: torch.Tensor  # (blocks, segments): log-sum-exp of the far logits
    sink_k: torch.Tensor  # (blocks, sinks, dim): tokens that a block sees besides
    sink_v: torch.Tensor  # (blocks, sinks, value_dim)
    sink_bias: torch.Tensor  # (blocks, sinks): added to their logits, -inf where they are hidden; without a gradient
    document: torch.Tensor | None
    causal: bool
    row_blocks: int
    scale: float
    softcap: float | None
    dropout_p: float
    seed: torch.Tensor | None


class _SegmentWork(BlockWork):
    """As its base, with the far field of each segment as one column more behind the near ones, and the sinks behind that."""

    def __init__(self, given: Segments):
        none, no_columns = given.far_mean.new_zeros(0, 1), given.far_total.new_zeros(len(given.far_total), 0)
        own = given._asdict() | {"k": given.k.contiguous(), "v": given.v.contiguous()}
        self.far_mean, self.far_total = own.pop("far_mean"), own.pop("far_total")
        self.sink_k, self.sink_v, self.sink_bias = (own.pop(name) for name in ("sink_k", "sink_v", "sink_bias"))
        super().__init__(Blocks(far_k=none, far_v=none, far_index=no_columns.long(), far_bias=no_columns, **own))
        self.sinks = slice(self.near + 1, self.near + 1 + self.sink_k.shape[1])
        self.more = -(-(1 + self.sink_k.shape[1]) // _MORE) * _MORE
        self.all = self.near + self.more
        self.drawn = self.near + self.sink_k.shape[1]
        self.finite = self.finite and bool(torch.isfinite(self.sink_k.sum() + self.sink_v.sum()))

    def window(self, x, start, stop) -> torch.Tensor:
        """The near tokens of each block, and some more: ``(blocks, all, dim)``; where x allows it, a view."""
        low, high, size = start + self.offsets[0], stop + self.offsets[-1], self.block_size
        if x.dtype == self.dtype and low >= 0 and high * size + self.more <= self.blocks * size:
            tokens = x[low:].flatten(0, 1)
        else:
            tokens = x.new_zeros((high - low) * size + self.more, x.shape[-1], dtype=self.dtype)
            there = x[max(low, 0) : min(high, self.blocks)].flatten(0, 1)
            tokens[(max(low, 0) - low) * size :][: len(there)] = there
        return tokens.as_strided((stop - start, self.all, x.shape[-1]), (size * x.shape[-1], x.shape[-1], 1))

    def by_segment(self, x) -> torch.Tensor:
        """``(blocks, rows, ...)`` to ``(blocks, segments, tokens of a segment, ...)``."""
        return x.unflatten(1, (self.far_total.shape[1], -1))

    def weights(self, q, keys, start, stop, out, capped=None) -> torch.Tensor:
        """Attention weights ``(blocks, rows, all)``."""
        logits = self.products(q, keys, out, capped)
        self.mask(logits[..., : self.near].unflatten(1, (-1, self.block_size)), start, stop)
        # In place of the products with the tokens behind.
        logits[..., self.sinks.stop :] = -torch.inf
        if self.sink_k.shape[1]:
            part, bias = logits[..., self.sinks], self.sink_bias[start:stop, None]
            part.copy_(torch.bmm(q, self.of_sinks(self.sink_k, start, stop).transpose(1, 2)).mul_(self.scale))
            if self.softcap is not None:
                part.div_(self.softcap).tanh_()
                if capped is not None:
                    capped[: len(q), :, self.sinks].copy_(part)
                part.mul_(self.softcap)
            part.add_(bias)
        self.by_segment(logits)[..., self.near] = self.far_total[start:stop, :, None]
        return torch.softmax(logits, -1, out=logits)

    def of_sinks(self, x, start, stop) -> torch.Tensor:
        """Their keys, or values, in the compute dtype; zeros in place of what is hidden, which may be anything."""
        return x[start:stop].to(self.dtype).masked_fill(self.sink_bias[start:stop, :, None] == -torch.inf, 0)


# What gradients are for.
_DIFFERENTIABLE = ("q", "k", "v", "far_mean", "far_total", "sink_k", "sink_v")


def _forward(given: Segments) -> torch.Tensor:
    work, q, v, far_mean = _SegmentWork(given), given.q, given.v, given.far_mean
    out = q.new_empty(work.blocks, work.rows, v.shape[-1])
    logits, result = work.buffers((work.rows, work.all), out.shape[1:])
    with torch.autocast(q.device.type, enabled=False):
        for start, stop in work.parts():
            weights = work.weights(q[start:stop].to(work.dtype), work.window(work.k, start, stop), start, stop, logits)
            near, far = weights[..., : work.near], work.by_segment(weights[..., work.near, None])
            factors = work.dropout(start, stop)
            dropped = weights[..., work.sinks]
            if factors is not None:
                near = near.mul_(factors[..., : work.near])
                dropped = dropped * factors[..., work.near :]
            part = out[start:stop] if out.dtype == work.dtype else result[: stop - start]
            part = work.product(near, work.window(work.v, start, stop)[:, : work.near], start, stop, part)
            work.by_segment(part).addcmul_(far, far_mean[start:stop, :, None])
            if work.sink_k.shape[1]:
                part.baddbmm_(dropped, work.of_sinks(given.sink_v, start, stop))
            if out.dtype != work.dtype:
                out[start:stop] = part
    return out


def _backward(given: Segments, grads, _) -> tuple[torch.Tensor, ...]:
    work, (grad,) = _SegmentWork(given), grads
    q, k, v, far_mean, far_total, sink_k, sink_v = (getattr(given, name) for name in _DIFFERENTIABLE)
    grad_q, grad_mean, grad_total, grad_sink_k, grad_sink_v = (torch.empty_like(x) for x in (q, far_mean, far_total, sink_k, sink_v))
    # Contributions of neighbouring blocks meet in one token: accumulate them in the compute dtype.
    grad_k, grad_v = (torch.zeros_like(x, dtype=work.dtype, memory_format=torch.contiguous_format) for x in (k, v))
    weighting = (work.rows, work.all)
    logits, inner, capped, result, of_values = work.buffers(
        weighting, weighting, weighting if work.softcap else (0,), q.shape[1:], grad.shape[1:]
    )
    with torch.autocast(q.device.type, enabled=False):
        for start, stop in work.parts():
            size = stop - start
            queries, upper = q[start:stop].to(work.dtype), grad[start:stop].to(work.dtype)
            keys, values = work.window(work.k, start, stop), work.window(work.v, start, stop)
            weights = work.weights(queries, keys, start, stop, logits, capped if work.softcap else None)
            far, by_segment = work.by_segment(weights[..., work.near, None]), work.by_segment(upper)
            slope = torch.bmm(upper, values.transpose(1, 2), out=inner[:size])
            slope[..., work.near + 1 :] = 0
            sinks, of_sinks = slope[..., work.sinks], weights[..., work.sinks]
            sinks.copy_(torch.bmm(upper, work.of_sinks(sink_v, start, stop).transpose(1, 2)))
            # Sums of products: a batch of products of vectors takes several times as long.
            product = work.by_segment(of_values[:size])
            torch.mul(by_segment, far_mean[start:stop, :, None], out=product)
            torch.sum(product, -1, out=work.by_segment(slope)[..., work.near])
            torch.mul(by_segment, far, out=product)
            torch.sum(product, 2, out=grad_mean[start:stop])
            dropped = weights[..., : work.near]
            factors = work.dropout(start, stop)
            if factors is not None:
                slope[..., : work.near].mul_(factors[..., : work.near])
                sinks.mul_(factors[..., work.near :])
                dropped, of_sinks = dropped * factors[..., : work.near], of_sinks * factors[..., work.near :]
            grad_sink_v[start:stop] = torch.bmm(of_sinks.transpose(1, 2), upper)
            for columns, own, others in work.neighbours(start, stop):
                grad_v[others].baddbmm_(dropped[own, :, columns].transpose(1, 2), upper[own])
            # The softmax's gradient: weights * (slope - sum(weights * slope)).
            softmax_backward(slope, weights, work.dtype)
            grad_total[start:stop] = work.by_segment(slope[..., work.near]).sum(-1)
            if work.softcap is not None:
                slope.mul_(1 - capped[:size].square())
            slope, out = slope[..., : work.near], result[:size]
            torch.baddbmm(out, slope, keys[:, : work.near], beta=0, alpha=work.scale, out=out)
            grad_q[start:stop] = out.baddbmm_(sinks, work.of_sinks(sink_k, start, stop), alpha=work.scale)
            grad_sink_k[start:stop] = torch.bmm(sinks.transpose(1, 2), queries).mul_(work.scale)
            for columns, own, others in work.neighbours(start, stop):
                grad_k[others].baddbmm_(slope[own, :, columns].transpose(1, 2), queries[own], alpha=work.scale)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_mean, grad_total, grad_sink_k, grad_sink_v


def _empty(given: Segments) -> torch.Tensor:
    return given.q.new_empty(*given.q.shape[:2], given.v.shape[-1])


# ``(Segments) -> (blocks, repeats * block_size, value_dim)``: attention of each block of queries to its neighbouring blocks and to the far
# field of its segments, in one softmax.
segment_attention = define(_NAMESPACE + "::segment_attention", Segments, _forward, _empty, _backward, _DIFFERENTIABLE)
