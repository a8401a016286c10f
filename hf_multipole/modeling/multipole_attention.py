"""Fast multipole attention (arXiv 2310.11960), the public function: rows of blocks, the field of their summaries, attention to both.

Dimensions: ``n`` tokens, ``slots`` of whole blocks, ``groups`` of a level, ``rank`` summaries of each; ``repeats`` query heads share a key
head; ``columns``: the summaries that a block sees, side by side.
"""

import math
from typing import NamedTuple

import torch

from .backends import takes_kernels
from .calls import Call, check_logits, check_tensors
from .hierarchy import FarColumns, align_rows, block_of, check_rows, far_columns, group_count, near_offsets, real_tokens
from .multipole_torch import Blocks, block_attention, block_weights
from .options import MultipoleOptions
from .rows import Rows, Sinks, find_sinks, lay_out
from .shared_query_torch import Segments, far_results, first_queries, merge, segment_attention
from .summaries import Field, MeanSummary


def aligned_attention(q, k, v, alignment, call: Call, far_keys=None, return_weights: bool = False):
    """:func:`multipole_attention` for arguments that have been checked, padding and segments given as their Alignment.

    A model aligns its rows once a forward and calls this in every layer. Also returns, when asked, the attention weights
    ``(batch, heads, queries, n + summaries)``: those of the tokens, then those of the summaries, level after level, groups
    counted from the start of the grid. They are for looking at: O(n ** 2) memory, without dropout, no gradient.
    """
    queries, n = q.shape[2], k.shape[2]
    shared = call.options.downsample_queries
    if shared and queries < n:
        raise ValueError(
            f"downsample_queries needs the queries of all {n} tokens, but q has {queries}: those before them are not in a cache of keys "
            "and values; for generation use a MultipoleCache, which keeps what came of them"
        )
    if shared and return_weights:
        raise ValueError("output_attentions is not supported with downsample_queries, where tokens share their far field; leave it out")
    call = call._replace(scale=q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    kernels = takes_kernels(call.backend, q, {"q": q.shape[-1], "v": v.shape[-1]}, call.dropout_p)
    rows = lay_out(n, queries, alignment, call)
    q, k, v = rows.place_queries(q), rows.place(k), rows.place(v)
    k, v, sinks = find_sinks(k, v, rows)
    k, v, field = summarise(k, v, None if far_keys is None else rows.place(far_keys), rows, call, kernels)
    if shared and rows.levels:
        return rows.take(_attend_by_segments(q, k, v, field, sinks, rows, call, kernels)), None
    k, v = (x[:, :, rows.first * rows.block_size :] for x in (k, v))
    attend = _attend_by_kernels if kernels else _attend_by_blocks
    out = rows.take(attend(q, k, v, field, sinks, rows, call))
    return out, _weights(q, k, v, field, sinks, rows, call) if return_weights else None


def summarise(k, v, far_keys, rows: Rows, call: Call, kernels: bool):
    """Keys and values in their slots, for further use (see summaries.py), and their Field; far_keys are summarised in place of keys."""
    dtype, heads = torch.promote_types(k.dtype, torch.float32), k.shape[:2]
    if not rows.levels:
        no_keys, no_values = ([x.new_zeros(*heads, 0, rows.rank, x.shape[-1], dtype=dtype)] for x in (k, v))
        return k, v, Field(no_keys, no_values, None)
    masses = rows.masses(call.log_masses, k)
    how, kept = (rows.validity(k.device), rows.levels), {"everything": True, "kernels": kernels, "token_masses": masses}
    of_keys, of_values = (x or MeanSummary(rows.block_size, rows.rank) for x in (call.key_summary, call.value_summary))
    if far_keys is None:
        k, far_k, counts = of_keys(k, *how, **kept)
    else:
        _, far_k, counts = of_keys(far_keys, *how, **kept)
    v, far_v, _ = of_values(v, *how, **kept)
    return k, v, Field(far_k, far_v, counts)


# Ways to attend: to the tokens of neighbouring blocks and to the summaries of a field, from q, k, v in whole blocks of the same tokens


def _attend_by_blocks(q, k, v, field: Field, sinks: Sinks | None, rows: Rows, call: Call) -> torch.Tensor:
    """The PyTorch path: ``(batch, heads, slots, value_dim)``."""
    return attend_blocks(q, k, v, _listed(field, sinks, rows, call, q), rows.document(q.device), rows.block_size, call)


def _attend_by_kernels(q, k, v, field: Field, sinks: Sinks | None, rows: Rows, call: Call) -> torch.Tensor:
    """The GPU kernels, which find the listed summaries by themselves."""
    far_k, far_v, counts = field.side_by_side()
    groups = [group_count(rows.slots, rows.block_size, level + 1) for level in range(rows.levels)]
    document, alignment = rows.document(q.device), rows.alignment
    return run_kernels(
        *(q, k, v, far_k, far_v),
        Listing([0] * rows.levels, groups, rows.block_size, rows.rank, rows.first),
        call,
        log_counts=None if counts is None else log_counts(counts, call.options.size_weighting),
        document=None if document is None else document.flatten(1),
        stretch=(None, None) if alignment is None else (alignment.first, alignment.last),
        sinks=sinks,
    )[0]


def _attend_by_segments(q, k, v, field: Field, sinks: Sinks | None, rows: Rows, call: Call, kernels: bool) -> torch.Tensor:
    """The O(n) form: the tokens of a segment share a far field."""
    if rows.causal:
        q, far_q = first_queries(q, rows.block_size, rows.rank, rows.levels)
    else:
        summary = call.query_summary or MeanSummary(rows.block_size, rows.rank)
        q, far_q, _ = summary(q, rows.validity(q.device), rows.levels, everything=True, kernels=kernels)
        far_q = [x.flatten(2, 3) for x in far_q]
    mean, total = far_results(far_q, field, rows.alignment, call)
    return attend_segments(q, k, v, (mean, total), sinks, rows.document(q.device), rows.block_size, call, kernels)


def _weights(q, k, v, field: Field, sinks: Sinks | None, rows: Rows, call: Call) -> torch.Tensor:
    """Attention weights ``(batch, heads, queries, n + summaries)``."""
    listed = _listed(field, sinks, rows, call, q)
    document = rows.document(q.device)
    weights = block_weights(_blocks(q, k, v, listed, document, rows.block_size, call._replace(dropout_p=0.0)))
    summaries = sum(x.shape[2] for x in field.keys) * rows.rank
    dense = _dense_weights(weights, listed.row, rows, summaries)
    near, far = (rows.take(from_blocks(x, k.shape[:2], rows.block_size)) for x in dense)
    if rows.alignment is not None:
        slot, valid = rows.alignment.slot[:, None, None], rows.alignment.valid[:, None, None]
        near = near.gather(3, slot.expand(*near.shape[:3], rows.n)) * valid
    return torch.cat([near[..., : rows.n], far], -1)


def _dense_weights(weights, row, rows: Rows, summaries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block weights ``(blocks of all rows, rows, columns)`` spread over the slots and over the summaries of their row."""
    offsets, block_size = near_offsets(rows.blocks, rows.causal), rows.block_size
    own = torch.arange(len(weights), device=weights.device)[:, None] % rows.blocks + rows.first
    shape = weights.shape[:2]
    # One more block on either side takes the (zero) weights of neighbours that do not exist.
    near = weights.new_zeros(*shape, rows.slots + 2 * block_size)
    for i, offset in enumerate(offsets):
        columns = (own + offset + 1) * block_size + torch.arange(block_size, device=weights.device)
        part = weights[..., i * block_size : (i + 1) * block_size]
        near.scatter_(2, columns[:, None].expand(*shape, -1), part)
    of_summaries, of_sinks = weights[..., len(offsets) * block_size :].tensor_split([row.shape[1] - rows.sinks], -1)
    if rows.sinks:
        slots = rows.sink_slots(weights.device)[0].expand(-1, rows.blocks, -1)
        slots = slots[:, None].expand(-1, len(weights) // (len(slots) * rows.blocks), -1, -1).flatten(0, 2)
        near.scatter_add_(2, (slots[:, None] + block_size).expand(*shape, -1), of_sinks)
    far = weights.new_zeros(*shape, summaries)
    row = row[:, : of_summaries.shape[-1]].repeat(len(weights) // rows.blocks, 1)[:, None].expand(*shape, -1)
    return near[..., block_size:-block_size], far.scatter_add_(2, row, of_summaries)


# What these share with the generation state


class Listed(NamedTuple):
    """The summaries of a row that blocks of queries see, and after them its sinks."""

    keys: torch.Tensor  # (batch, kv_heads, summaries and sinks, dim), in the compute dtype
    values: torch.Tensor  # (batch, kv_heads, summaries, value_dim)
    row: torch.Tensor  # (blocks, columns): which of them a block sees
    bias: torch.Tensor  # (batch or 1, kv_heads or 1, blocks, repeats or 1, columns): added to their logits, -inf where hidden


class Listing(NamedTuple):
    """Where the kernels find the summaries of each level."""

    begins: list[int]  # first group that is listed of each level
    counts: list[int]  # groups that are listed, from there on
    block_size: int
    rank: int
    first_block: int  # number of the first block of queries in its row


def log_counts(counts: torch.Tensor, size_weighting: bool) -> torch.Tensor:
    """What size weighting adds to the logits of summaries that stand for so many tokens; -inf where for none."""
    none = counts <= 0
    logarithm = torch.where(none, 1, counts).log() if size_weighting else torch.zeros_like(counts)
    return torch.where(none, -torch.inf, logarithm)


def _listed(field: Field, sinks: Sinks | None, rows: Rows, call: Call, q: torch.Tensor) -> Listed:
    columns = far_columns(rows.slots, rows.block_size, rows.levels, rows.causal, rows.first, q.device)
    hidden = columns.hidden[None]
    if rows.alignment is not None:
        first, last = rows.alignment.first[..., None], rows.alignment.last[..., None]
        hidden = hidden | (columns.first < first) | (columns.first + columns.width > last)
    keys, values, counts = field.side_by_side()
    return list_sinks(list_summaries(keys, values, columns, hidden, rows.rank, call, counts), sinks)


def list_sinks(listed: Listed, sinks: Sinks | None) -> Listed:
    """With the sinks in columns behind those of the summaries."""
    if sinks is None:
        return listed
    lists, count = sinks.keys.shape[2:4]
    keys, values = (torch.cat([x, y.flatten(2, 3).to(x.dtype)], 2) for x, y in ((listed.keys, sinks.keys), (listed.values, sinks.values)))
    row = torch.arange(lists * count, device=keys.device).view(lists, count) + listed.keys.shape[2]
    row = torch.cat([listed.row, row.expand(len(listed.row), -1)], 1)
    bias = sinks.bias(keys.dtype)[:, None, :, None]
    shape = [max(sizes) for sizes in zip(listed.bias.shape[:-1], bias.shape[:-1])]
    return Listed(keys, values, row, torch.cat([listed.bias.expand(*shape, -1), bias.expand(*shape, -1)], -1))


def list_summaries(keys, values, columns: FarColumns, hidden: torch.Tensor, rank: int, call: Call, counts=None) -> Listed:
    """The summaries of listed groups. hidden: ``(batch or 1, blocks, columns)`` bool, groups that are not seen; counts: tokens that each
    summary stands for, ``(batch or 1, kv_heads or 1, summaries)``, or None where all groups are full.
    """
    dtype = keys.dtype
    row = (columns.row[..., None] * rank + torch.arange(rank, device=columns.row.device)).flatten(1)
    hidden = hidden.repeat_interleave(rank, -1)[:, None]
    if counts is None:
        counts = (columns.width.to(dtype) / rank).repeat_interleave(rank).expand(1, 1, *row.shape)
    else:
        counts = counts[:, :, row]
    bias = torch.where(hidden, -torch.inf, log_counts(counts, call.options.size_weighting))[:, :, :, None]
    if call.far_bias is not None:
        level = (columns.level.clamp(max=call.far_bias.shape[1]) - 1).repeat_interleave(rank)
        bias = bias + call.far_bias.to(dtype)[:, level].unflatten(0, (keys.shape[1], -1))[None, :, None]
    return Listed(keys, values, row, bias)


def attend_blocks(q, k, v, listed: Listed, document, block_size: int, call: Call) -> torch.Tensor:
    """The operator on blocks: ``(batch, heads, slots, value_dim)``. document: ``(batch or 1, 1, blocks, block_size)`` or None."""
    return from_blocks(block_attention(*_blocks(q, k, v, listed, document, block_size, call)), k.shape[:2], block_size)


def attend_segments(q, k, v, far: tuple, sinks: Sinks | None, document, block_size: int, call: Call, kernels: bool) -> torch.Tensor:
    """The operator of the O(n) form: ``(batch, heads, slots, value_dim)``.

    far: the far field of the segments of the blocks, means ``(batch, heads, segments, value_dim)`` and log-sum-exps ``(batch, heads,
    segments)``.
    """
    far_mean, far_total = far
    kv_heads = k.shape[1]
    segments = far_total.shape[2] // (q.shape[2] // block_size)
    if kernels:
        # They attend to the near field, and the far field is merged with what comes of it.
        no_keys, no_values = (x.new_zeros(*k.shape[:2], 0, x.shape[-1], dtype=far_mean.dtype) for x in (k, v))
        document = None if document is None else document.flatten(1)
        near = Listing([], [], block_size, segments, 0)
        out, total = run_kernels(q, k, v, no_keys, no_values, near, call._replace(far_bias=None), document=document, sinks=sinks)
        of_tokens = tuple(x.repeat_interleave(block_size // segments, 2) for x in far)
        return merge((out.to(far_mean.dtype), total.to(far_mean.dtype)), of_tokens)[0].to(q.dtype)
    given = Segments(
        _to_blocks(q, kv_heads, block_size),
        _to_blocks(k, kv_heads, block_size),
        _to_blocks(v, kv_heads, block_size),
        _to_blocks(far_mean, kv_heads, segments),
        _to_blocks(far_total[..., None], kv_heads, segments).squeeze(2),
        *_sinks_of_blocks(k, v, sinks, block_size),
        *_on_blocks(k, document, block_size, call),
    )
    return from_blocks(segment_attention(*given), k.shape[:2], block_size)


def _sinks_of_blocks(k, v, sinks: Sinks | None, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values ``(blocks of all rows, sinks, dim)`` and what is added to their logits ``(blocks, sinks)``."""
    grid = *k.shape[:2], k.shape[2] // block_size
    if sinks is None:
        return tuple(x.new_zeros(math.prod(grid), 0, *x.shape[3:]) for x in (k, v)) + (k.new_zeros(math.prod(grid), 0),)
    keys, values = (x.expand(*grid, *x.shape[3:]).flatten(0, 2) for x in (sinks.keys, sinks.values))
    bias = sinks.bias(torch.promote_types(k.dtype, torch.float32))
    return keys, values, bias[:, None].expand(*grid, -1).flatten(0, 2)


def run_kernels(q, k, v, far_k, far_v, listing: Listing, call: Call, log_counts=None, document=None, stretch=(None, None), sinks=None):
    """The GPU kernels on whole blocks: their output, and the log-sum-exp of the logits ``(batch, heads, slots)`` float32.

    far_k, far_v: ``(batch, kv_heads, summaries, dim)``; log_counts: ``(batch or 1, kv_heads or 1, summaries)``; document: ``(batch or 1,
    slots)``; stretch: first and last slot of the document of each block ``(batch, blocks)``; sinks: :class:`Sinks` or None.
    """
    from .multipole_triton import KernelBlocks, attention

    far_bias = None if call.far_bias is None else call.far_bias.to(far_k.dtype)
    first, last = stretch
    sink_k, sink_v, hidden = (None, None, None) if sinks is None else sinks
    settings = call.causal, call.options.size_weighting, call.scale, call.softcap
    sizes = *listing, *settings
    given = KernelBlocks(q, k, v, far_k, far_v, log_counts, far_bias, document, first, last, sink_k, sink_v, hidden, *sizes)
    out, binary = attention(*given)
    return out, binary * math.log(2)


def _blocks(q, k, v, listed: Listed, document, block_size: int, call: Call) -> Blocks:
    """Arguments of the operator on blocks for queries and keys ``(batch, heads, slots, dim)``."""
    batch, kv_heads, slots, dim = k.shape
    grid = batch, kv_heads, slots // block_size
    start = torch.arange(batch * kv_heads, device=q.device).view(batch, kv_heads, 1, 1) * listed.keys.shape[2]
    return Blocks(
        _to_blocks(q, kv_heads, block_size),
        _to_blocks(k, kv_heads, block_size),
        _to_blocks(v, kv_heads, block_size),
        listed.keys.reshape(-1, dim),
        listed.values.reshape(-1, v.shape[-1]),
        (listed.row + start).flatten(0, 2),
        listed.bias.expand(*grid, *listed.bias.shape[3:]).flatten(0, 2),
        *_on_blocks(k, document, block_size, call),
    )


def _on_blocks(k: torch.Tensor, document: torch.Tensor | None, block_size: int, call: Call) -> tuple:
    """What Blocks and Segments have beside queries, keys and values, from their field ``document`` on."""
    batch, kv_heads, slots, _ = k.shape
    blocks = slots // block_size
    document = None if document is None else document.expand(batch, kv_heads, blocks, -1).flatten(0, 2)
    seed = torch.randint(2**62, ()) if call.dropout_p else None
    return document, call.causal, blocks, call.scale, call.softcap, call.dropout_p, seed


def _to_blocks(x: torch.Tensor, kv_heads: int, block_size: int) -> torch.Tensor:
    """``(batch, heads, slots, dim)`` to ``(blocks of all rows, repeats * block_size, dim)``: the heads of one key head are stacked in a
    block, so that keys are not repeated.
    """
    batch, heads, slots, dim = x.shape
    if heads > kv_heads:
        x = x.reshape(batch, kv_heads, heads // kv_heads, slots // block_size, block_size, dim).transpose(2, 3)
    return x.reshape(-1, heads // kv_heads * block_size, dim)


def from_blocks(x: torch.Tensor, grid: tuple[int, int], block_size: int) -> torch.Tensor:
    """``(blocks of all rows, repeats * block_size, dim)`` to ``(batch, heads, slots, dim)``; grid: batch and key heads."""
    (batch, kv_heads), repeats = grid, x.shape[1] // block_size
    blocks = x.shape[0] // (batch * kv_heads)
    x = x.reshape(batch, kv_heads, blocks, repeats, block_size, x.shape[-1]).transpose(2, 3)
    return x.reshape(batch, kv_heads * repeats, blocks * block_size, x.shape[-1])


# Wide: the public interface, in which every option has its name.
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
    max_levels: int | None = None,
    sink_tokens: int = 0,
    log_masses: torch.Tensor | None = None,
    softcap: float | None = None,
    downsample_queries: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Fast multipole attention, O(n log n), or O(n) with ``downsample_queries`` (arXiv 2310.11960).

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
        query_summary: as key_summary, for the queries of ``downsample_queries``, bidirectional; None for means.
        far_keys: ``(batch, kv_heads, n, head_dim)``, summarised in place of k (keys before the rotary embedding, say).
        causal: a query sees no later token. Otherwise attention is bidirectional.
        attention_mask: ``(batch, n)``, bool or 0/1: the real tokens; padding on either side of a row. The groups are aligned
            to the first real token, so that padding changes nothing.
        segment_ids: ``(batch, n)`` integers: rows packed with documents that do not see each other.
        size_weighting: adds log(c) to the logit of a summary that stands for c tokens.
        far_bias: ``(heads, levels)``, added to the logits of the summaries; the last column serves all further levels.
        max_levels: levels of groups at most: what is farther away than the last of them reaches takes no part. 0 leaves the near field;
            None is all levels, a global receptive field.
        sink_tokens: the first real tokens of each row or document, which every later query (bidirectional: every query) sees exactly, and
            which are in no summary. With as many as the row has tokens this is exact attention.
        log_masses: ``(batch, kv_heads, n)``, logarithms of what tokens weigh in summaries, which become weighted means, of keys and of
            values; log(c) becomes the logarithm of the mass. None for 0 everywhere: the same.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before size weighting and bias.
        downsample_queries: O(n): at the far levels, tokens share the query of their segment, of which a group has ``rank``: the segment's
            summary, or, causal, the query of its first token, which all of them know. Needs the queries of all tokens.
        scale: of the logits; ``head_dim ** -0.5`` by default.
        dropout_p: dropout of the attention weights.
        backend: "torch"; "triton", the GPU kernels, for float32, bfloat16 and float16, head_dim up to 256, no dropout; "auto": the
            kernels on CUDA devices, where they can, else the PyTorch path. Results are the same up to rounding. A value that is
            not finite reaches the queries that see it, and no others: their channel of it on the PyTorch path, all of their
            channels on the kernels.

    Returns:
        ``(batch, heads, queries, value_dim)`` in q's dtype, zeros at padded queries.

    Raises:
        ValueError, TypeError: an argument is of the wrong kind, shape, dtype or device, or not supported.
    """
    options = MultipoleOptions(
        block_size=block_size, rank=rank, size_weighting=size_weighting, sink_tokens=sink_tokens, downsample_queries=downsample_queries
    )
    summaries = key_summary, value_summary, query_summary
    call = Call(options, *summaries, log_masses, far_bias, max_levels, causal, softcap, scale, dropout_p, backend)
    check_tensors(q, k, v, far_keys, attention_mask, segment_ids, log_masses)
    check_logits(scale, softcap, dropout_p)
    _check_call(call, q, k, v)
    attention_mask = None if attention_mask is None else real_tokens(attention_mask)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    alignment = None
    if attention_mask is not None or segment_ids is not None:
        if not torch.compiler.is_compiling():
            check_rows(attention_mask, segment_ids)
        alignment = align_rows(attention_mask, segment_ids, block_of(k.shape[2], block_size))
    return aligned_attention(q, k, v, alignment, call, far_keys)[0]


def _check_call(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ValueError or TypeError for what is out of range, or does not fit the tensors."""
    heads, max_levels, far_bias = q.shape[1], call.max_levels, call.far_bias
    if max_levels is not None and (isinstance(max_levels, bool) or not isinstance(max_levels, int) or max_levels < 0):
        raise ValueError(f"max_levels is {max_levels!r}, but must be a number of levels, 0 for the near field alone, or None for all")
    if call.backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {call.backend!r}, but must be 'auto', 'torch' or 'triton'")
    if call.query_summary is not None and (call.causal or not call.options.downsample_queries):
        raise ValueError(
            "query_summary belongs to the bidirectional O(n) form (downsample_queries=True, causal=False): a causal one takes the query of "
            "each segment's first token; leave it out"
        )
    for name, x in (("key_summary", k), ("value_summary", v), ("query_summary", q)):
        summary = getattr(call, name)
        fits = {"block_size": call.options.block_size, "rank": call.options.rank, "heads": x.shape[1], "dim": x.shape[-1]}
        for size, value in fits.items():
            if getattr(summary, size, value) != value:
                raise ValueError(f"{name} was built for {size} {getattr(summary, size)}, but this call has {value}")
    if not isinstance(far_bias, torch.Tensor | None):
        raise TypeError(f"far_bias is {type(far_bias).__name__}, but must be a tensor (heads, levels)")
    if far_bias is not None and (far_bias.dim() != 2 or far_bias.shape[0] != heads or far_bias.shape[1] < 1):
        raise ValueError(f"far_bias has shape {tuple(far_bias.shape)}, but must be (heads, levels) with heads = {heads}")
    if far_bias is not None and far_bias.device != q.device:
        raise ValueError(f"far_bias is on {far_bias.device}, but q is on {q.device}: move it there")
