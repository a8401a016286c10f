"""Fast multipole attention: the function, its checks, and what it hands to the operator on blocks (arXiv 2310.11960)."""

import math

import torch
from torch import nn

from .backends import takes_kernels
from .hierarchy import Alignment, align_rows, block_of, check_rows, far_columns, group_count, level_count, near_offsets
from .multipole_torch import block_attention, block_weights
from .shared_query_torch import far_results, first_queries, merge, segment_attention
from .summaries import MeanSummary, compute_dtype


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


def log_counts(counts: torch.Tensor, size_weighting: bool) -> torch.Tensor:
    """What size weighting adds to the logits of summaries that stand for so many tokens; -inf where for none."""
    none = counts <= 0
    logarithm = torch.where(none, 1, counts).log() if size_weighting else torch.zeros_like(counts)
    return torch.where(none, -torch.inf, logarithm)


def far_field(columns, alignment, counts, rank, size_weighting, far_bias, kv_heads, dtype):
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
    bias = torch.where(hidden, -torch.inf, log_counts(counts, size_weighting))[:, :, :, None]
    if far_bias is not None:
        level = (columns.level.clamp(max=far_bias.shape[1]) - 1).repeat_interleave(rank)
        bias = bias + far_bias.to(dtype)[:, level].unflatten(0, (kv_heads, -1))[None, :, None]
    return row, bias


def _side_by_side(levels: list[torch.Tensor] | None) -> torch.Tensor | None:
    """``(batch, heads, groups, rank, ...)`` a level to ``(batch, heads, summaries, ...)``."""
    return None if levels is None else torch.cat([x.flatten(2, 3) for x in levels], 2)


def run_kernels(
    q,
    k,
    v,
    far_k,
    far_v,
    begins: list[int],
    counts: list[int],
    *,
    block_size,
    rank,
    first_block,
    causal,
    size_weighting,
    far_bias,
    softcap,
    scale,
    alignment=None,
    document=None,
    tokens=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The GPU kernels on whole blocks, and the log-sum-exp of the logits, ``(batch, heads, slots)`` float32.

    begins, counts: groups that are listed of each level; tokens: those that each summary stands for.
    """
    from .multipole_triton import attention

    out, binary = attention(
        q,
        k,
        v,
        far_k,
        far_v,
        None if tokens is None else log_counts(tokens, size_weighting),
        None if far_bias is None else far_bias.to(far_k.dtype),
        None if document is None else document.flatten(1),
        None if alignment is None else alignment.first,
        None if alignment is None else alignment.last,
        begins,
        counts,
        block_size,
        rank,
        first_block,
        causal,
        size_weighting,
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
    )
    return out, binary * math.log(2)


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
    query_summary=None,
    far_keys=None,
    causal: bool = True,
    size_weighting: bool = True,
    far_bias=None,
    max_levels: int | None = None,
    softcap: float | None = None,
    downsample_queries: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
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
    if downsample_queries and queries < n:
        raise ValueError(
            f"downsample_queries needs the queries of all {n} tokens, but q has {queries}: those before them are not in a cache of keys "
            "and values; for generation use a MultipoleCache, which keeps what came of them"
        )
    if downsample_queries and return_weights:
        raise ValueError("output_attentions is not supported with downsample_queries, where tokens share their far field; leave it out")
    if block_of(n, block_size) != block_size:
        # One block that holds the row: exact attention.
        block_size, rank, key_summary, value_summary = n, 1, None, None
    dtype = compute_dtype(q.dtype)
    kernels = takes_kernels(backend, q, {"q": dim, "v": v.shape[-1]}, dropout_p)
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
    levels = min(level_count(n, block_size, max_levels), level_count(slots, block_size))
    far_k, far_v = ([x.new_zeros(batch, kv_heads, 0, rank, x.shape[-1], dtype=dtype)] for x in (k, v))
    counts, all_of_it = None, {"everything": True, "kernels": kernels}
    if levels:
        # In the causal case every visible group is full: no masses, and the counts are known.
        validity = None
        if not causal and alignment is not None:
            validity = alignment.document >= 0
        elif not causal and n % (block_size << (levels - 1)):
            validity = (torch.arange(slots, device=q.device) < n)[None]
        if far_keys is None:
            k, far_k, counts = (key_summary or means)(k, validity, levels, **all_of_it)
        else:
            _, far_k, counts = (key_summary or means)(_to_grid(far_keys, alignment, block_size), validity, levels, **all_of_it)
        v, far_v, _ = (value_summary or means)(v, validity, levels, **all_of_it)
    document = None
    if alignment is not None:
        document = alignment.document.view(batch, 1, blocks, block_size)
    elif not causal and slots != n:
        document = -(torch.arange(slots, device=q.device) >= n).long().view(1, 1, -1, block_size)[:, :, first:]
    if downsample_queries and levels:
        if causal:
            q, far_q = first_queries(q, block_size, rank, levels)
        else:
            q, far_q, _ = (query_summary or means)(q, validity, levels, **all_of_it)
            far_q = [x.flatten(2, 3) for x in far_q]
        options = {"scale": dim**-0.5 if scale is None else scale, "softcap": softcap, "dropout_p": dropout_p}
        far = far_results(far_q, far_k, far_v, counts, alignment, block_size, rank, causal, size_weighting, far_bias, **options)
        out = attend_segments(q, k, v, *far, document, block_size, causal, **options, kernels=kernels)
        return out[:, :, :n] if alignment is None else _from_grid(out, alignment, n), None

    far_k, far_v, counts = (_side_by_side(x) for x in (far_k, far_v, counts))
    k, v = (x[:, :, first * block_size :] for x in (k, v))

    def to_tokens(x):
        return x[:, :, before : before + queries] if alignment is None else _from_grid(x, alignment, queries)

    if kernels:
        groups = [group_count(slots, block_size, level + 1) for level in range(levels)]
        options = dict(causal=causal, size_weighting=size_weighting, far_bias=far_bias, softcap=softcap, scale=scale)
        options |= dict(block_size=block_size, rank=rank, first_block=first, alignment=alignment, document=document, tokens=counts)
        out, _ = run_kernels(q, k, v, far_k, far_v, [0] * levels, groups, **options)
        if not return_weights:
            return to_tokens(out), None
    columns = far_columns(slots, block_size, levels, causal, first, q.device)
    row, bias = far_field(columns, alignment, counts, rank, size_weighting, far_bias, kv_heads, dtype)
    arguments = block_arguments(q, k, v, far_k, far_v, row, bias, document, block_size, causal, scale, softcap, dropout_p)
    if not kernels:
        out = _from_blocks(block_attention(*arguments), batch, kv_heads, repeats, block_size)
    if not return_weights:
        return to_tokens(out), None
    weights = _dense_weights(block_weights(*arguments), row, blocks, first, slots, far_k.shape[2], block_size, causal)
    near, far = (to_tokens(_from_blocks(x, batch, kv_heads, repeats, block_size)) for x in weights)
    if alignment is not None:
        near = near.gather(3, alignment.slot[:, None, None].expand(*near.shape[:3], n)) * alignment.valid[:, None, None]
    return to_tokens(out), torch.cat([near[..., :n], far], -1)


def block_arguments(q, k, v, far_k, far_v, row, bias, document, block_size, causal, scale, softcap, dropout_p=0.0) -> tuple:
    """Arguments of the operator on blocks for queries and keys ``(batch, heads, slots, dim)``, whole blocks of the same tokens.

    far_k, far_v: ``(batch, kv_heads, summaries, dim)``; row and bias as from ``far_field``; document: ``(batch or 1, 1, blocks,
    block_size)``.
    """
    batch, kv_heads, slots, dim = k.shape
    blocks = slots // block_size
    grid = (batch, kv_heads, blocks)
    start = torch.arange(batch * kv_heads, device=q.device).view(batch, kv_heads, 1, 1) * far_k.shape[2]
    return (
        *(_to_blocks(x, kv_heads, block_size) for x in (q, k, v)),
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


def _to_blocks(x: torch.Tensor, kv_heads: int, block_size: int) -> torch.Tensor:
    """``(batch, heads, slots, dim)`` to ``(blocks of all rows, repeats * block_size, dim)``: the heads of one key head are stacked in a
    block, so that keys are not repeated.
    """
    batch, heads, slots, dim = x.shape
    if heads > kv_heads:
        x = x.reshape(batch, kv_heads, heads // kv_heads, slots // block_size, block_size, dim).transpose(2, 3)
    return x.reshape(-1, heads // kv_heads * block_size, dim)


def _from_blocks(x: torch.Tensor, batch: int, kv_heads: int, repeats: int, block_size: int) -> torch.Tensor:
    """``(blocks of all rows, repeats * block_size, dim)`` to ``(batch, heads, slots, dim)``."""
    blocks = x.shape[0] // (batch * kv_heads)
    x = x.reshape(batch, kv_heads, blocks, repeats, block_size, x.shape[-1]).transpose(2, 3)
    return x.reshape(batch, kv_heads * repeats, blocks * block_size, x.shape[-1])


def attend_blocks(*arguments) -> torch.Tensor:
    """The operator on blocks for :func:`block_arguments`' arguments; ``(batch, heads, slots, value_dim)``."""
    q, k, block_size = arguments[0], arguments[1], arguments[8]
    out = block_attention(*block_arguments(*arguments))
    return _from_blocks(out, k.shape[0], k.shape[1], q.shape[1] // k.shape[1], block_size)


def attend_segments(
    q, k, v, far_mean, far_total, document, block_size, causal, scale, softcap, dropout_p=0.0, kernels=False
) -> torch.Tensor:
    """The operator of the O(n) form for queries and keys ``(batch, heads, slots, dim)``, whole blocks of the same tokens, and the far
    field of their segments ``(batch, heads, segments, value_dim)`` and ``(batch, heads, segments)``; document: as in
    :func:`block_arguments`. Returns ``(batch, heads, slots, value_dim)``.
    """
    (batch, heads, slots, _), kv_heads = q.shape, k.shape[1]
    blocks = slots // block_size
    segments = far_total.shape[2] // blocks
    if kernels:
        # They attend to the near field, and the far field is merged with what comes of it.
        none = (x.new_zeros(batch, kv_heads, 0, x.shape[-1], dtype=far_mean.dtype) for x in (k, v))
        options = {"causal": causal, "size_weighting": False, "far_bias": None, "softcap": softcap, "scale": scale, "document": document}
        out, total = run_kernels(q, k, v, *none, [], [], block_size=block_size, rank=segments, first_block=0, **options)
        far = (x.repeat_interleave(block_size // segments, 2) for x in (far_mean, far_total))
        return merge((out.to(far_mean.dtype), total.to(far_mean.dtype)), tuple(far))[0].to(q.dtype)
    out = segment_attention(
        *(_to_blocks(x, kv_heads, block_size) for x in (q, k, v)),
        _to_blocks(far_mean, kv_heads, segments),
        _to_blocks(far_total[..., None], kv_heads, segments).squeeze(2),
        None if document is None else document.expand(batch, kv_heads, blocks, -1).flatten(0, 2),
        causal,
        blocks,
        scale,
        softcap,
        dropout_p,
        torch.randint(2**62, ()) if dropout_p else None,
    )
    return _from_blocks(out, batch, kv_heads, heads // kv_heads, block_size)


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
    max_levels: int | None = None,
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
    _check_arguments(q, k, v, far_keys, attention_mask, segment_ids, far_bias, softcap, scale, dropout_p)
    check_sizes(block_size, rank)
    if max_levels is not None and (isinstance(max_levels, bool) or not isinstance(max_levels, int) or max_levels < 0):
        raise ValueError(f"max_levels is {max_levels!r}, but must be a number of levels, 0 for the near field alone, or None for all")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, but must be 'auto', 'torch' or 'triton'")
    if query_summary is not None and (causal or not downsample_queries):
        raise ValueError(
            "query_summary belongs to the bidirectional O(n) form (downsample_queries=True, causal=False): a causal one takes the query of "
            "each segment's first token; leave it out"
        )
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    parts = (("key_summary", key_summary, k), ("value_summary", value_summary, v), ("query_summary", query_summary, q))
    for name, summary, x in parts:
        for size, value in {"block_size": block_size, "rank": rank, "heads": x.shape[1], "dim": x.shape[-1]}.items():
            if getattr(summary, size, value) != value:
                raise ValueError(f"{name} was built for {size} {getattr(summary, size)}, but this call has {value}")
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
        query_summary=query_summary,
        far_keys=far_keys,
        causal=causal,
        size_weighting=size_weighting,
        far_bias=far_bias,
        max_levels=max_levels,
        softcap=softcap,
        downsample_queries=downsample_queries,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )[0]


def check_sizes(block_size: int, rank: int) -> None:
    for name, value in (("block_size", block_size), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be a positive integer")
    if block_size % rank:
        raise ValueError(
            f"rank {rank} does not divide block_size {block_size}: each summary starts as the mean of block_size / rank tokens"
        )


def _check_arguments(q, k, v, far_keys, attention_mask, segment_ids, far_bias, softcap, scale, dropout_p) -> None:
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
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, but must be a tensor (batch, n)")
        if x.dim() != 2 or x.shape != (batch, n):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but must be (batch, n) = {(batch, n)}: "
                "masks over pairs of tokens are not supported, use causal and segment_ids"
            )
        if x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, but must be bool or integers: additive masks are not supported")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move it there")
    if not isinstance(far_bias, torch.Tensor | None):
        raise TypeError(f"far_bias is {type(far_bias).__name__}, but must be a tensor (heads, levels)")
    if far_bias is not None and (far_bias.dim() != 2 or far_bias.shape[0] != heads or far_bias.shape[1] < 1):
        raise ValueError(f"far_bias has shape {tuple(far_bias.shape)}, but must be (heads, levels) with heads = {heads}")
    if far_bias is not None and far_bias.device != q.device:
        raise ValueError(f"far_bias is on {far_bias.device}, but q is on {q.device}: move it there")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, but must be a finite number, or None for head_dim ** -0.5")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, but must be positive and finite, or None for none")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, but must be at least 0 and less than 1")
