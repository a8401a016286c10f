"""Fast multipole attention: the function, its checks, and the PyTorch path (arXiv 2310.11960).

The whole computation is one operator on blocks. A query block's columns are the keys of two or three neighbouring blocks and
the summaries that the hierarchy lists for it, copied side by side; one softmax runs over them all. Blocks are handled a few
at a time, so that logits stay in the cache and memory is linear in n; the backward pass computes them again.
"""

import math
import threading

import torch
from torch import nn

from .hierarchy import Alignment, align_rows, block_of, check_rows, far_columns, level_count, near_offsets
from .summaries import MeanSummary, compute_dtype

# Logits computed at once: 1 MiB of float32 a CPU thread, which stays in its cache; on other devices, enough to fill them.
_LOGITS_PER_THREAD = 2**18
_LOGITS_ON_DEVICE = 2**26


def _blocks_at_once(rows: int, columns: int, device: torch.device) -> int:
    logits = _LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _LOGITS_ON_DEVICE
    return max(1, logits // max(1, rows * columns))


_arena = threading.local()


def _buffers(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Uninitialised work space. On the CPU it is kept from call to call: fresh pages cost more than the copies into them."""
    sizes = [math.prod(shape) for shape in shapes]
    if device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    kept = getattr(_arena, str(dtype), None)
    if kept is None or kept.numel() < sum(sizes):
        kept = torch.empty(sum(sizes), dtype=dtype)
        setattr(_arena, str(dtype), kept)
    return [part.view(shape) for part, shape in zip(kept[: sum(sizes)].split(sizes), shapes)]


def dropout_factors(shape: tuple[int, ...], p: float, generator: torch.Generator, first: int) -> torch.Tensor:
    """Factors of the attention weights of the blocks from ``first`` on: 0 with probability ``p``, else ``1 / (1 - p)``.

    shape: ``(blocks, rows, columns)``. Tests put their own factors here.
    """
    keep = torch.rand(shape, generator=generator, device=generator.device) >= p
    return keep / (1 - p)


class _Work:
    """The buffers and the pieces of one pass over the blocks; see ``block_attention`` for the arguments."""

    def __init__(self, q, k, v, far_k, far_v, far_index, far_bias, document, causal, row_blocks, scale, softcap, dropout_p, seed):
        self.q, self.k, self.v, self.far_k, self.far_v = q, k, v, far_k, far_v
        self.far_index, self.far_bias, self.document = far_index, far_bias, document
        self.causal, self.row_blocks, self.scale, self.softcap = causal, row_blocks, scale, softcap
        self.dropout_p, self.seed = dropout_p, seed
        self.blocks, self.rows, self.dim = q.shape
        self.block_size = k.shape[1]
        self.offsets = near_offsets(row_blocks, causal)
        self.near = len(self.offsets) * self.block_size
        self.columns = self.near + far_index.shape[1]
        self.dtype = compute_dtype(q.dtype)
        self.step = min(self.blocks, _blocks_at_once(self.rows, self.columns, q.device))
        if causal:
            own = torch.ones(self.block_size, self.block_size, dtype=torch.bool, device=q.device).triu(1)
            self.future = torch.cat([torch.zeros_like(own)] * (len(self.offsets) - 1) + [own], 1)
            self.future_bias = torch.zeros(self.future.shape, dtype=self.dtype, device=q.device).masked_fill_(self.future, -torch.inf)
        # A masked product of 0 and infinity is NaN: where keys or values are not finite, masking takes a careful form.
        self.finite = bool(torch.isfinite(k.sum(dtype=self.dtype) + v.sum(dtype=self.dtype)))

    def buffers(self, *sizes) -> list[torch.Tensor]:
        return _buffers(self.q.device, self.dtype, *((self.step, *size) for size in sizes))

    def parts(self):
        for start in range(0, self.blocks, self.step):
            yield start, min(self.blocks, start + self.step)

    def neighbours(self, start, stop):
        """For each near offset: the slice of columns, the blocks of the part that have a neighbour, and those neighbours."""
        for i, offset in enumerate(self.offsets):
            low = min(max(start + offset, 0), self.blocks)
            high = max(low, min(stop + offset, self.blocks))
            own = slice(low - offset - start, high - offset - start)
            yield slice(i * self.block_size, (i + 1) * self.block_size), own, slice(low, high)

    def gather(self, near, far, start, stop, out) -> torch.Tensor:
        """Near tokens and far summaries of each block, side by side: ``(blocks, columns, dim)``."""
        out = out[: stop - start]
        for columns, own, others in self.neighbours(start, stop):
            out[own, columns].copy_(near[others])
            if own.start > 0:
                out[: own.start, columns].zero_()
            if own.stop < stop - start:
                out[own.stop :, columns].zero_()
        if self.columns > self.near:
            rows = far.index_select(0, self.far_index[start:stop].reshape(-1))
            out[:, self.near :].copy_(rows.view(stop - start, -1, far.shape[-1]))
        return out

    def scatter(self, grad, start, stop, near, far) -> None:
        """The transpose of ``gather``, added to ``near`` and ``far``."""
        for columns, own, others in self.neighbours(start, stop):
            near[others].add_(grad[own, columns])
        if self.columns > self.near:
            far.index_add_(0, self.far_index[start:stop].reshape(-1), grad[:, self.near :].reshape(-1, far.shape[-1]))

    def hidden(self, start, stop) -> torch.Tensor:
        """The documents' part of the near mask: ``(blocks, block_size, near)`` bool."""
        document = self.document[start:stop]
        seen = document.new_full((stop - start, self.near), -2)
        for columns, own, others in self.neighbours(start, stop):
            seen[own, columns] = self.document[others]
        return document[:, :, None] != seen[:, None]

    def mask(self, logits, start, stop) -> None:
        """Hides columns of ``logits`` ``(blocks, repeats, block_size, columns)`` and adds the far bias, in place."""
        near, far = logits[..., : self.near], logits[..., self.near :]
        if self.document is not None:
            near.masked_fill_(self.hidden(start, stop)[:, None], -torch.inf)
        if self.causal:
            near.masked_fill_(self.future, -torch.inf) if not self.finite else near.add_(self.future_bias)
        # The first and last block of a row have no left and no right neighbour.
        for edge, offset in ((0, -1), (self.row_blocks - 1, 1)):
            of_part = (edge - start) % self.row_blocks
            if offset in self.offsets and of_part < stop - start:
                columns = near.unflatten(-1, (-1, self.block_size))[..., self.offsets.index(offset), :]
                columns[of_part :: self.row_blocks].fill_(-torch.inf)
        if self.columns > self.near:
            bias = self.far_bias[start:stop, :, None]
            far.add_(bias)
            if not self.finite:
                far.masked_fill_(bias == -torch.inf, -torch.inf)

    def weights(self, q, keys, start, stop, out, capped=None) -> torch.Tensor:
        """Attention weights ``(blocks, rows, columns)``; ``capped`` keeps tanh of the soft-capped logits."""
        logits = torch.baddbmm(out[: stop - start], q, keys.transpose(1, 2), beta=0, alpha=self.scale, out=out[: stop - start])
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            if capped is not None:
                capped[: stop - start].copy_(logits)
            logits.mul_(self.softcap)
        self.mask(logits.unflatten(1, (-1, self.block_size)), start, stop)
        return torch.softmax(logits, -1, out=logits)

    def dropout(self, start, stop) -> torch.Tensor | None:
        if self.dropout_p == 0:
            return None
        generator = torch.Generator(self.q.device).manual_seed(int(self.seed) + start)
        return dropout_factors((stop - start, self.rows, self.columns), self.dropout_p, generator, start).to(self.dtype)

    def product(self, weights, values, start, stop, out) -> torch.Tensor:
        if self.finite:
            return torch.bmm(weights, values, out=out)
        # A value that is not finite reaches exactly the queries that see its column.
        wild = ~torch.isfinite(values)
        torch.bmm(weights, values.masked_fill(wild, 0), out=out)
        seen = torch.zeros_like(weights)
        self.mask(seen.unflatten(1, (-1, self.block_size)), start, stop)
        reached = torch.bmm((seen > -torch.inf).to(self.dtype), wild.to(self.dtype)) > 0
        return out.masked_fill_(reached, torch.nan)


@torch.library.custom_op("hf_multipole::block_attention", mutates_args=())
def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    far_k: torch.Tensor,
    far_v: torch.Tensor,
    far_index: torch.Tensor,
    far_bias: torch.Tensor,
    document: torch.Tensor | None,
    causal: bool,
    row_blocks: int,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of each block of queries to its neighbouring blocks and to listed summaries, in one softmax.

    q: ``(blocks, repeats * block_size, dim)``, the query heads of one key head stacked; k, v: ``(blocks, block_size, dim)``;
    ``row_blocks`` consecutive blocks form a row. far_k, far_v: ``(summaries, dim)``; far_index: ``(blocks, columns)`` rows of
    them; far_bias: ``(blocks, repeats or 1, columns)``, added to their logits, -inf where hidden. document:
    ``(blocks, block_size)`` or None: tokens of different numbers do not see each other. Returns q's shape with v's dim.
    """
    work = _Work(q, k, v, far_k, far_v, far_index, far_bias, document, causal, row_blocks, scale, softcap, dropout_p, seed)
    out = q.new_empty(work.blocks, work.rows, v.shape[-1])
    keys, values, logits, result = work.buffers(
        (work.columns, work.dim), (work.columns, v.shape[-1]), (work.rows, work.columns), out.shape[1:]
    )
    with torch.autocast(q.device.type, enabled=False):
        for start, stop in work.parts():
            gathered = work.gather(k, far_k, start, stop, keys)
            weights = work.weights(q[start:stop].to(work.dtype), gathered, start, stop, logits)
            factors = work.dropout(start, stop)
            if factors is not None:
                weights = weights.mul_(factors)
            gathered = work.gather(v, far_v, start, stop, values)
            out[start:stop] = work.product(weights, gathered, start, stop, result[: stop - start])
    return out


@torch.library.custom_op("hf_multipole::block_attention_backward", mutates_args=())
def block_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    far_k: torch.Tensor,
    far_v: torch.Tensor,
    far_index: torch.Tensor,
    far_bias: torch.Tensor,
    document: torch.Tensor | None,
    causal: bool,
    row_blocks: int,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    work = _Work(q, k, v, far_k, far_v, far_index, far_bias, document, causal, row_blocks, scale, softcap, dropout_p, seed)
    # Contributions of neighbouring blocks meet in one token: accumulate them in the compute dtype.
    grad_q = torch.empty_like(q)
    grad_k, grad_v, grad_far_k, grad_far_v = (torch.zeros_like(x, dtype=work.dtype) for x in (k, v, far_k, far_v))
    grad_bias = torch.zeros_like(far_bias)
    weighting = (work.rows, work.columns)
    keys, values, logits, inner, capped, result = work.buffers(
        (work.columns, work.dim), (work.columns, v.shape[-1]), weighting, weighting, weighting if softcap else (0,), q.shape[1:]
    )
    with torch.autocast(q.device.type, enabled=False):
        for start, stop in work.parts():
            size = stop - start
            queries, upper = q[start:stop].to(work.dtype), grad[start:stop].to(work.dtype)
            gathered_k = work.gather(k, far_k, start, stop, keys)
            gathered_v = work.gather(v, far_v, start, stop, values)
            weights = work.weights(queries, gathered_k, start, stop, logits, capped if softcap else None)
            slope = torch.bmm(upper, gathered_v.transpose(1, 2), out=inner[:size])
            factors = work.dropout(start, stop)
            if factors is not None:
                slope.mul_(factors)
                torch.bmm((weights * factors).transpose(1, 2), upper, out=gathered_v)
            else:
                torch.bmm(weights.transpose(1, 2), upper, out=gathered_v)
            work.scatter(gathered_v, start, stop, grad_v, grad_far_v)
            # The softmax's gradient: weights * (slope - sum(weights * slope)).
            torch.ops.aten._softmax_backward_data.out(slope, weights, -1, work.dtype, grad_input=slope)
            if work.columns > work.near:
                by_head = slope[..., work.near :].unflatten(1, (-1, work.block_size)).sum(2)
                grad_bias[start:stop] = by_head if far_bias.shape[1] > 1 else by_head.sum(1, keepdim=True)
            if softcap is not None:
                slope.mul_(1 - capped[:size].square())
            out = result[:size]
            grad_q[start:stop] = torch.baddbmm(out, slope, gathered_k, beta=0, alpha=scale, out=out)
            torch.baddbmm(gathered_k, slope.transpose(1, 2), queries, beta=0, alpha=scale, out=gathered_k)
            work.scatter(gathered_k, start, stop, grad_k, grad_far_k)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_far_k.to(far_k.dtype), grad_far_v.to(far_v.dtype), grad_bias


def block_weights(*arguments) -> torch.Tensor:
    """Attention weights ``(blocks, rows, columns)`` of ``block_attention``'s arguments, without dropout."""
    work = _Work(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))
    out = work.q.new_empty(work.blocks, work.rows, work.columns, dtype=work.dtype)
    (keys,) = work.buffers((work.columns, work.dim))
    for start, stop in work.parts():
        gathered = work.gather(work.k, work.far_k, start, stop, keys)
        work.weights(work.q[start:stop].to(work.dtype), gathered, start, stop, out[start:stop])
    return out


@block_attention.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:2], v.shape[-1])


@block_attention_backward.register_fake
def _(grad, q, k, v, far_k, far_v, far_index, far_bias, *_):
    return tuple(torch.empty_like(x) for x in (q, k, v, far_k, far_v, far_bias))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
    ctx.plain = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]


def _backward(ctx, grad):
    tensors = iter(ctx.saved_tensors)
    inputs = [next(tensors) if x is None else x[0] for x in ctx.plain]
    *grads, grad_bias = block_attention_backward(grad.contiguous(), *inputs)
    # far_index, between them, and everything after the bias have no gradient.
    return *grads, None, grad_bias, *[None] * (len(inputs) - 7)


block_attention.register_autograd(_backward, setup_context=_save)


def _to_grid(x: torch.Tensor, alignment: Alignment | None, block_size: int) -> torch.Tensor:
    """Tokens ``(batch, heads, n, dim)`` in their slots ``(batch, heads, slots, dim)``, zeros in empty ones."""
    if alignment is None:
        missing = -x.shape[2] % block_size
        return nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    batch, heads, n, dim = x.shape
    row = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
    grid = x.reshape(-1, dim).index_select(0, (row + alignment.index[:, None]).flatten()).view(batch, heads, -1, dim)
    return grid.masked_fill(alignment.document[:, None, :, None] < 0, 0)


def _from_grid(grid: torch.Tensor, alignment: Alignment, n: int) -> torch.Tensor:
    """The last ``n`` tokens of each row of ``(batch, heads, slots, dim)``, zeros where padding."""
    batch, heads, slots, dim = grid.shape
    row = torch.arange(batch * heads, device=grid.device).view(batch, heads, 1) * slots
    out = grid.reshape(-1, dim).index_select(0, (row + alignment.slot[:, None, -n:]).flatten()).view(batch, heads, n, dim)
    return out.masked_fill(~alignment.valid[:, None, -n:, None], 0)


def _far_field(columns, alignment, counts, rank, size_weighting, far_bias, kv_heads, dtype):
    """Row of every listed summary ``(blocks, columns)`` and what is added to its logit, -inf where it is not seen
    ``(batch or 1, kv_heads or 1, blocks, repeats or 1, columns)``.
    """
    row = (columns.row[..., None] * rank + torch.arange(rank, device=columns.row.device)).flatten(1)
    hidden = columns.hidden[None]
    if alignment is not None:
        last = columns.first + columns.width
        hidden = hidden | (columns.first < alignment.first[..., None]) | (last > alignment.last[..., None])
    hidden = hidden.repeat_interleave(rank, -1)[:, None]
    if counts is None:
        counts = (columns.width.to(dtype) / rank).repeat_interleave(rank).expand(1, 1, *row.shape)
    else:
        counts = counts[:, :, row]
        hidden = hidden | (counts <= 0)
    bias = torch.where(hidden, 1, counts).log() if size_weighting else torch.zeros_like(counts)
    bias = torch.where(hidden, -torch.inf, bias)[:, :, :, None]
    if far_bias is not None:
        level = (columns.level.clamp(max=far_bias.shape[1]) - 1).repeat_interleave(rank)
        bias = bias + far_bias.to(dtype)[:, level].unflatten(0, (kv_heads, -1))[None, :, None]
    return row, bias


def _with_tokens(summary, tokens, validity, levels):
    """The tokens for further use, and their summaries ``(batch, heads, summaries, dim)``, all levels side by side."""
    shared = getattr(summary, "with_tokens", None)
    tokens, summaries = (tokens, summary(tokens, validity, levels)) if shared is None else shared(tokens, validity, levels)
    return tokens, torch.cat([level.flatten(2, 3) for level in summaries], 2)


def aligned_attention(
    q,
    k,
    v,
    alignment: Alignment | None,
    *,
    block_size: int,
    rank: int,
    key_summary=None,
    value_summary=None,
    far_keys=None,
    causal: bool = True,
    size_weighting: bool = True,
    far_bias=None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`multipole_attention` for arguments that have been checked, padding and segments given as their alignment.

    A model aligns its rows once a forward and calls this in every layer. Also returns, when asked, the attention weights
    ``(batch, heads, queries, n + summaries)``: those of the tokens, then those of the summaries, level after level, groups
    counted from the start of the grid. They are for looking at: O(n ** 2) memory, without dropout, no gradient.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, n = k.shape[1:3]
    repeats = heads // kv_heads
    if block_of(n, block_size) != block_size:
        # One block that holds the row: exact attention.
        block_size, rank, key_summary, value_summary = n, 1, None, None
    dtype = compute_dtype(q.dtype)
    means = MeanSummary(block_size, rank)

    # Queries are the last tokens. Without an alignment only their blocks, and one before for the near field, are run.
    first = 0 if alignment is not None else max(0, (n - queries) // block_size - 1)
    before = n - queries - first * block_size
    if before:
        q = nn.functional.pad(q, (0, 0, before, 0))
    q, k, v = (_to_grid(x, alignment, block_size) for x in (q, k, v))
    slots = k.shape[2]
    blocks = slots // block_size - first

    # A document has no more levels than a row of n tokens, though a packed grid is longer.
    levels = min(level_count(n, block_size), level_count(slots, block_size))
    columns = far_columns(slots, block_size, levels, causal, first, q.device)
    counts = None
    if levels == 0:
        far_k, far_v = (x.new_zeros(batch, kv_heads, 0, x.shape[-1], dtype=dtype) for x in (k, v))
    else:
        # In the causal case every visible group is full: no masses, and the counts are known.
        validity = None
        if not causal and alignment is not None:
            validity = alignment.document >= 0
        elif not causal and n % (block_size << (levels - 1)):
            validity = (torch.arange(slots, device=q.device) < n)[None]
        if far_keys is None:
            k, far_k = _with_tokens(key_summary or means, k, validity, levels)
        else:
            far_k = _with_tokens(key_summary or means, _to_grid(far_keys, alignment, block_size), validity, levels)[1]
        v, far_v = _with_tokens(value_summary or means, v, validity, levels)
        if validity is not None:
            counts = getattr(key_summary, "counts", means.counts)(validity, levels, dim, dtype)
            counts = torch.cat([level.flatten(2, 3) for level in counts], 2)
    row, bias = _far_field(columns, alignment, counts, rank, size_weighting, far_bias, kv_heads, dtype)

    grid = (batch, kv_heads, blocks)
    document = None
    if alignment is not None:
        document = alignment.document.view(batch, 1, blocks, block_size)
    elif not causal and slots != n:
        document = -(torch.arange(slots, device=q.device) >= n).long().view(1, 1, -1, block_size)[:, :, first:]
    start = torch.arange(batch * kv_heads, device=q.device).view(batch, kv_heads, 1, 1) * far_k.shape[2]
    if repeats > 1:
        # The query heads of one key head are stacked in a block, so that keys are not repeated.
        q = q.reshape(batch, kv_heads, repeats, blocks, block_size, dim).transpose(2, 3)
    arguments = (
        q.reshape(-1, repeats * block_size, dim),
        k[:, :, first * block_size :].reshape(-1, block_size, dim),
        v[:, :, first * block_size :].reshape(-1, block_size, v.shape[-1]),
        far_k.reshape(-1, dim),
        far_v.reshape(-1, v.shape[-1]),
        (row + start).flatten(0, 2),
        bias.expand(*grid, *bias.shape[3:]).flatten(0, 2),
        None if document is None else document.expand(*grid, -1).flatten(0, 2),
        causal,
        blocks,
        dim**-0.5 if scale is None else scale,
        softcap,
        dropout_p,
        torch.randint(2**62, ()) if dropout_p else None,
    )
    out = block_attention(*arguments)

    def to_tokens(x):
        x = x.reshape(*grid, repeats, block_size, -1).transpose(2, 3).reshape(batch, heads, blocks * block_size, -1)
        return x[:, :, before : before + queries] if alignment is None else _from_grid(x, alignment, queries)

    if not return_weights:
        return to_tokens(out), None
    near, far = _dense_weights(block_weights(*arguments), row, blocks, first, slots, far_k.shape[2], block_size, causal)
    near, far = to_tokens(near), to_tokens(far)
    if alignment is not None:
        near = near.gather(3, alignment.slot[:, None, None].expand(*near.shape[:3], n)) * alignment.valid[:, None, None]
    return to_tokens(out), torch.cat([near[..., :n], far], -1)


def _dense_weights(weights, row, blocks, first, slots, summaries, block_size, causal):
    """Block weights ``(blocks of all rows, rows, columns)`` spread over the slots and over the summaries of their row."""
    offsets = near_offsets(blocks, causal)
    own = torch.arange(len(weights), device=weights.device)[:, None] % blocks + first
    shape = weights.shape[:2]
    # One more block on either side takes the (zero) weights of neighbours that do not exist.
    near = weights.new_zeros(*shape, slots + 2 * block_size)
    for i, offset in enumerate(offsets):
        columns = (own + offset + 1) * block_size + torch.arange(block_size, device=weights.device)
        part = weights[..., i * block_size : (i + 1) * block_size]
        near.scatter_(2, columns[:, None].expand(*shape, -1), part)
    far = weights.new_zeros(*shape, summaries)
    row = row.repeat(len(weights) // blocks, 1)[:, None].expand(*shape, -1)
    return near[..., block_size:-block_size], far.scatter_add_(2, row, weights[..., len(offsets) * block_size :])


def multipole_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int = 64,
    rank: int = 4,
    key_summary=None,
    value_summary=None,
    query_summary=None,
    far_keys: torch.Tensor | None = None,
    causal: bool = True,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    size_weighting: bool = True,
    far_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    downsample_queries: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Fast multipole attention, O(n log n) (arXiv 2310.11960).

    Each query attends to the tokens of its own and the neighbouring blocks, and to ``rank`` learned summaries of each farther
    group of tokens, groups growing with distance; one softmax runs over all of them. With ``n <= 2 * block_size`` this is
    exact attention.

    Args:
        q: ``(batch, heads, queries, head_dim)``, floating point. Fewer queries than keys are the last tokens.
        k: ``(batch, kv_heads, n, head_dim)``; kv_heads divides heads (grouped-query attention).
        v: ``(batch, kv_heads, n, value_dim)``.
        block_size: tokens in a block of the near field, and in a group of level 1.
        rank: summaries of each group; divides block_size.
        key_summary, value_summary: modules of summaries.py, ``(tokens, validity, levels) -> one tensor of summaries a
            level``; None for means.
        query_summary: summaries of the queries, for ``downsample_queries``.
        far_keys: ``(batch, kv_heads, n, head_dim)``, summarised in place of k (keys before the rotary embedding, say).
        causal: a query sees no later token. Otherwise attention is bidirectional.
        attention_mask: ``(batch, n)``, bool or 0/1: the real tokens; padding on either side of a row. The groups are aligned
            to the first real token, so that padding changes nothing.
        segment_ids: ``(batch, n)`` integers: rows packed with documents that do not see each other.
        size_weighting: adds log(c) to the logit of a summary that stands for c tokens.
        far_bias: ``(heads, levels)``, added to the logits of the summaries; the last column serves all further levels.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before size weighting and bias.
        scale: of the logits; ``head_dim ** -0.5`` by default.
        dropout_p: dropout of the attention weights.
        backend: "auto" or "torch".

    Returns:
        ``(batch, heads, queries, value_dim)`` in q's dtype, zeros at padded queries.

    Raises:
        ValueError, TypeError: an argument is of the wrong kind, shape, dtype or device, or not supported.
    """
    _check_arguments(q, k, v, far_keys, attention_mask, segment_ids, far_bias, softcap, dropout_p)
    check_sizes(block_size, rank)
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend is {backend!r}, but must be 'auto' or 'torch'")
    if downsample_queries or query_summary is not None:
        raise ValueError("downsample_queries and query_summary belong to the O(n) form, which is not available; leave them out")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    alignment = None
    if attention_mask is not None or segment_ids is not None:
        if not torch.compiler.is_compiling():
            check_rows(attention_mask, segment_ids)
        alignment = align_rows(attention_mask, segment_ids, block_of(k.shape[2], block_size))
    return aligned_attention(
        q,
        k,
        v,
        alignment,
        block_size=block_size,
        rank=rank,
        key_summary=key_summary,
        value_summary=value_summary,
        far_keys=far_keys,
        causal=causal,
        size_weighting=size_weighting,
        far_bias=far_bias,
        softcap=softcap,
        scale=scale,
        dropout_p=dropout_p,
    )[0]


def check_sizes(block_size: int, rank: int) -> None:
    for name, value in (("block_size", block_size), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be a positive integer")
    if block_size % rank:
        raise ValueError(
            f"rank {rank} does not divide block_size {block_size}: each summary starts as the mean of block_size / rank tokens"
        )


def _check_arguments(q, k, v, far_keys, attention_mask, segment_ids, far_bias, softcap, dropout_p) -> None:
    tensors = {"q": q, "k": k, "v": v} | ({} if far_keys is None else {"far_keys": far_keys})
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, tokens, head_dim), but is {got}")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, but attention needs a floating-point dtype")
        if x.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: convert them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move them to one device")
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")
    batch, heads, queries, dim = q.shape
    kv_heads, n = k.shape[1:3]
    for name, x, shape in (
        ("k", k, (batch, kv_heads, n, dim)),
        ("v", v, (batch, kv_heads, n, v.shape[-1])),
        ("far_keys", far_keys, k.shape),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but with q {tuple(q.shape)} and k {tuple(k.shape)} it must be {tuple(shape)}"
            )
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which the {kv_heads} heads of k and v do not divide")
    if queries > n:
        raise ValueError(f"q has {queries} tokens, but k has only {n}: queries are the last of the key tokens")
    for name, x in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if x is None:
            continue
        if x.dim() != 2 or x.shape != (batch, n):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but must be (batch, n) = {(batch, n)}: "
                "masks over pairs of tokens are not supported, use causal and segment_ids"
            )
        if x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, but must be bool or integers: additive masks are not supported")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move it there")
    if far_bias is not None and (far_bias.dim() != 2 or far_bias.shape[0] != heads or far_bias.shape[1] < 1):
        raise ValueError(f"far_bias has shape {tuple(far_bias.shape)}, but must be (heads, levels) with heads = {heads}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, but must be positive, or None for none")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, but must be at least 0 and less than 1")
