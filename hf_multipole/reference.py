"""Both attentions written from their definitions: dense, in float64, with loops. The oracle of every test.

Nothing here is shared with the fast implementations but the parameters of the summary modules.
"""

import math

import torch


def segment_means(rank: int, width: int) -> torch.Tensor:
    """``(rank, width, 1)`` weights of the mean of each of ``rank`` equal segments."""
    weight = torch.zeros(rank, width, 1, dtype=torch.float64)
    for r in range(rank):
        weight[r, r * width // rank : (r + 1) * width // rank] = rank / width
    return weight


def effective_weights(summary, head: int, level: int, block_size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a summary module does to the tokens of one full group: its linear map, the map's shares of absolute weight, both ``(rank,
    width of the level, dim or 1)``, and these shares for all channels at once ``(rank, width)``. None stands for means.
    """

    def shares(weight):
        size = weight.abs()
        return size / size.sum(1, keepdim=True)

    if hasattr(summary, "merge"):  # hierarchical
        linear = summary.tokens[head].double()
        share = shares(linear)
        even = share.mean(-1)
        merge = summary.merge[head].double()  # (rank, 2 * rank, dim)
        merge_share = shares(merge)
        for _ in range(2, level + 1):
            halves = merge[:, :rank], merge[:, rank:]
            linear = torch.cat([torch.einsum("rsc,stc->rtc", half, linear) for half in halves], 1)
            halves = merge_share[:, :rank], merge_share[:, rank:]
            share = torch.cat([torch.einsum("rsc,stc->rtc", half, share) for half in halves], 1)
            even = torch.cat([half.mean(-1) @ even for half in halves], 1)
        return linear, share, even
    if hasattr(summary, "levels"):  # direct
        linear = summary.levels[level - 1][head].double()
        return linear, shares(linear), shares(linear).mean(-1)
    mean = segment_means(rank, block_size * 2 ** (level - 1))
    return mean, mean, mean[..., 0]


def summarise(
    x: torch.Tensor, linear: torch.Tensor, share: torch.Tensor, even: torch.Tensor, token_masses: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summaries ``(rank, dim)`` of the first ``len(x)`` tokens of a group, and the mass ``(rank, dim or 1)`` of each.

    token_masses: ``(tokens,)``, what each token weighs; None for 1 each. A summary is then divided, and its mass multiplied, by the mean of
    these, weighted by ``even``.
    """
    size = len(x)
    mass = share[:, :size].sum(1)
    if token_masses is not None:
        x, of_tokens = token_masses[:, None] * x, even[:, :size].sum(1)
        mean = torch.where(of_tokens > 0, (even[:, :size] * token_masses).sum(1) / of_tokens.clamp(min=1e-300), 0)
        mass = mass * mean[:, None]
    total = (linear[:, :size] * x).sum(1)
    return torch.where(mass > 0, total / mass.clamp(min=1e-300), 0), mass


def segment_queries(q, head: int, block_size: int, rank: int, query_summary=None, causal_queries=None) -> dict:
    """What stands for the queries ``(n, dim)`` of one document in each segment, by level and first token of the segment.

    Bidirectional: the summaries of the queries, as of keys. Causal: the query of the segment's first token ("first"), or the mean of
    the segment before ("previous"; the first segment, which sees nothing far, has none).
    """
    pooled, level, width = {}, 1, block_size
    while len(q) > 2 * width:
        segment = width // rank
        maps = effective_weights(query_summary, head, level, block_size, rank)
        for first in range(0, len(q), segment):
            if causal_queries == "first":
                pooled[level, first] = q[first]
            elif causal_queries == "previous":
                pooled[level, first] = q[max(0, first - segment) : max(1, first)].mean(0)
            elif query_summary is None:
                pooled[level, first] = q[first : first + segment].mean(0)
            else:
                group = first // width * width
                pooled[level, first] = summarise(q[group : group + width], *maps)[0][(first - group) // segment]
        level, width = level + 1, 2 * width
    return pooled


def documents(mask: torch.Tensor, segments: torch.Tensor | None) -> list[torch.Tensor]:
    """Token indices of each document of one row: its real tokens, or those of each segment."""
    if segments is None:
        return [mask.nonzero()[:, 0]] if mask.any() else []
    return [((segments == s) & mask).nonzero()[:, 0] for s in segments[mask].unique()]


def multipole_attention_reference(
    q,
    k,
    v,
    *,
    block_size=64,
    rank=4,
    key_summary=None,
    value_summary=None,
    query_summary=None,
    far_keys=None,
    log_masses=None,
    sink_tokens=0,
    causal=True,
    attention_mask=None,
    segment_ids=None,
    size_weighting=True,
    far_bias=None,
    max_levels=None,
    softcap=None,
    downsample_queries=False,
    causal_queries="first",
    scale=None,
    dropout_near=None,
    dropout_far=None,
    rotate_summary=None,
    return_weights=False,
):
    """Arguments as :func:`hf_multipole.multipole_attention`, computed in float64.

    dropout_near: ``(batch, heads, n, n)`` factors of the near weights, by query and key token (0 or 1 / (1 - p));
    dropout_far: ``(batch, heads, n, summaries)``, by query token and summary of the row's document, levels side by side; with
    downsample_queries, those of a segment's first token serve all of its tokens.
    causal_queries: what stands for the queries of a segment in the causal case: "first", that of its first token, or "previous",
    the mean of the segment before it.
    log_masses: ``(batch, kv_heads, n)``, logarithms of what each token weighs in summaries; None for 0.
    rotate_summary: ``(summary (rank, dim), first token's offset in the document, width) -> (rank, dim)``, applied to keys.
    return_weights: also returns the weights ``(batch, heads, n, n + summaries)``, for rows of one document.
    """
    q, k, v = q.double(), k.double(), v.double()
    far_keys = k if far_keys is None else far_keys.double()
    batch, heads, n_q, dim = q.shape
    kv_heads, n = k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    mask = torch.ones(batch, n, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    cap = (lambda x: x) if softcap is None else (lambda x: softcap * torch.tanh(x / softcap))

    rows = []
    all_weights = {}
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            out = [torch.zeros(v.shape[-1], dtype=torch.float64) for _ in range(n)]
            for tokens in documents(mask[b], None if segment_ids is None else segment_ids[b]):
                size = len(tokens)
                keys, values, far = k[b, kv][tokens], v[b, kv][tokens], far_keys[b, kv][tokens]
                masses = torch.ones(size, dtype=torch.float64) if log_masses is None else log_masses[b, kv][tokens].double().exp()
                masses = torch.where(torch.arange(size) < sink_tokens, 0, masses)
                if log_masses is None and not sink_tokens:
                    masses = None
                pooled = {}  # by level and first token of a segment
                if downsample_queries:
                    queries = {"query_summary": query_summary} if not causal else {"causal_queries": causal_queries}
                    pooled = segment_queries(q[b, h][tokens], h, block_size, rank, **queries)

                summaries = []  # (first token, width, level, rank keys, rank values, rank counts)
                level, width = 1, block_size
                while size > 2 * width and (max_levels is None or level <= max_levels):
                    key_maps = effective_weights(key_summary, kv, level, block_size, rank)
                    value_maps = effective_weights(value_summary, kv, level, block_size, rank)
                    for first in range(0, size, width):
                        own = None if masses is None else masses[first : first + width]
                        key, mass = summarise(far[first : first + width], *key_maps, own)
                        value, _ = summarise(values[first : first + width], *value_maps, own)
                        if rotate_summary is not None:
                            key = rotate_summary(key, first, min(width, size - first))
                        summaries.append((first // width, width, level, key, value, mass.mean(-1) * width / rank))
                    level, width = level + 1, 2 * width

                for t in range(size):
                    if tokens[t] < n - n_q:
                        continue
                    query = q[b, h, tokens[t] - (n - n_q)]
                    block = t // block_size
                    low = max(0, (block - 1) * block_size)
                    high = t + 1 if causal else min(size, (block + 2) * block_size)
                    seen = [j for j in range(size) if low <= j < high or (j < sink_tokens and (j <= t or not causal))]
                    logits = [cap(scale * keys[seen] @ query)]
                    visible_values = [values[seen]]
                    columns = [tokens[seen]]
                    for position, (group, width, level, key, value, count) in enumerate(summaries):
                        own = t // width
                        if abs(group - own) < 2 or abs(group // 2 - own // 2) > 1 or (causal and group > own):
                            continue
                        segment = t // (width // rank) * (width // rank)
                        far_query = pooled[level, segment] if downsample_queries else query
                        logit = cap(scale * key @ far_query)
                        if size_weighting:
                            logit = logit + torch.where(count > 0, count, 1).log()
                        if far_bias is not None:
                            logit = logit + far_bias[h, min(level, far_bias.shape[1]) - 1].double()
                        kept = count > 0
                        logits.append(logit[kept])
                        visible_values.append(value[kept])
                        columns.append(n + position * rank + torch.arange(rank)[kept])
                    weights = torch.softmax(torch.cat(logits), 0)
                    columns = torch.cat(columns)
                    all_weights[b, h, int(tokens[t])] = columns, weights
                    if dropout_near is not None:
                        drawn = dropout_far[b, h, tokens[t]].clone()
                        for position, (_, width, *_) in enumerate(summaries if downsample_queries else ()):
                            own = slice(position * rank, (position + 1) * rank)
                            drawn[own] = dropout_far[b, h, tokens[t // (width // rank) * (width // rank)], own]
                        factors = torch.cat([dropout_near[b, h, tokens[t]], drawn])
                        weights = weights * factors[columns].double()
                    out[tokens[t]] = weights @ torch.cat(visible_values)
            rows.append(torch.stack(out[n - n_q :]))
    output = torch.stack(rows).view(batch, heads, n_q, -1)
    if not return_weights:
        return output
    levels = [block_size * 2**l for l in range(int(math.log2(n)) + 1) if n > 2 * block_size * 2**l][:max_levels]
    dense = torch.zeros(batch, heads, n, n + rank * sum(-(-n // width) for width in levels), dtype=torch.float64)
    for (b, h, t), (columns, weights) in all_weights.items():
        dense[b, h, t, columns] = weights
    return output, dense[:, :, n - n_q :]


def tensor_attention_reference(
    q,
    keys,
    values,
    *,
    causal=True,
    window=None,
    attention_mask=None,
    segment_ids=None,
    scale=None,
    dropout=None,
):
    """Arguments as :func:`hf_multipole.tensor_attention`, of any order, computed in float64 one query at a time.

    dropout: ``(batch, heads, n, n, ..., n)`` factors of the weights, by query and by each index (0 or 1 / (1 - p)).
    """
    q, keys, values = q.double(), [k.double() for k in keys], [v.double() for v in values]
    batch, heads, n_q, dim = q.shape
    kv_heads, n = keys[0].shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    mask = torch.ones(batch, n, dtype=torch.bool) if attention_mask is None else attention_mask.bool()

    rows = []
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            out = [torch.zeros(values[0].shape[-1], dtype=torch.float64) for _ in range(n)]
            for tokens in documents(mask[b], None if segment_ids is None else segment_ids[b]):
                for t in tokens[tokens >= n - n_q].tolist():
                    # Of every index, the tokens that the query sees; then the products over all choices of one token each.
                    seen = []
                    for width in window or [None] * len(keys):
                        near = torch.ones_like(tokens) == 1 if width is None else (tokens - t).abs() < width
                        seen.append(tokens[near & (tokens <= t)] if causal else tokens[near])
                    key, value = q[b, h, t - (n - n_q)], torch.ones(values[0].shape[-1], dtype=torch.float64)
                    for k, v, index in zip(keys, values, seen):
                        key, value = key[..., None, :] * k[b, kv][index], value[..., None, :] * v[b, kv][index]
                    weights = torch.softmax(scale * key.sum(-1).flatten(), 0)
                    if dropout is not None:
                        weights = weights * dropout[b, h, t][torch.meshgrid(*seen, indexing="ij")].flatten().double()
                    out[t] = weights @ value.flatten(0, -2)
            rows.append(torch.stack(out[n - n_q :]))
    return torch.stack(rows).view(batch, heads, n_q, -1)
