"""The kernels of multipole attention, written in Triton.

A program of the forward pass holds some queries of one block, so that they share their interaction lists. It goes over the
keys of the neighbouring blocks, then over the listed summaries of all levels and over the sinks, a tile at a time, with one running
softmax (FlashAttention-2, arXiv 2307.08691); lists and biases are worked out in the program from integers, so that nothing but the
arguments, the output and one number a query is in memory. The backward pass has a program for the same queries, one for some
keys of a block, and, since the queries that see a coarse group are a good part of the row, one for a fixed number of blocks of
queries and one level; their partial sums meet in a last kernel, always in the same order. Those of sinks, which nearly all queries see,
are made in the same way, and summed by PyTorch.

Logits are in units of log 2; products are taken in the arguments' dtype (float32: without TF32) and summed in float32. The strides
of a tensor are named after it: q_b, q_h and q_n of batch rows, heads and tokens. Tensors without them are contiguous.
"""

from .triton_common import LOG2E, absorb, dot, load_rows, logits, round_to, store_rows, tl, triton

# Parts of kernels


@triton.jit
def _listed(inner, level, own, table, RANK: tl.constexpr):
    """Groups in the columns ``inner`` of a level's list, for queries in group ``own``; their summaries; which of them are seen.

    ``table`` has for each level, counted from 0, the first group at hand, how many there are, and how many are listed before.
    """
    group = 2 * (own // 2 + inner // (2 * RANK) * 2 - 1) + inner // RANK % 2
    place = group - tl.load(table + 3 * level)
    seen = (place >= 0) & (place < tl.load(table + 3 * level + 1)) & (tl.abs(group - own) >= 2)
    return group, (tl.load(table + 3 * level + 2) + place) * RANK + inner % RANK, seen


@triton.jit
def _bias(level, summary, seen, counts, far_bias, biases, size):
    """What is added to the logits of summaries: size weighting, by logarithms of counts or by ``size`` of level 0; the far bias."""
    bias = tl.zeros_like(summary).to(tl.float32)
    if counts is not None:
        bias += tl.load(counts + summary, seen, 0.0) * LOG2E
    elif size is not None:
        bias += size + level
    if far_bias is not None:
        bias += tl.load(far_bias + tl.minimum(level, biases - 1)) * LOG2E
    return bias


@triton.jit
def _far_tile(
    start, block, block_size, levels, first_, last_, table, counts, far_bias, biases, size,
    SIDES: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of the list of one block, from ``start`` on: summaries, which of them are seen, and their bias."""
    column = start + tl.arange(0, BLOCK)
    level = tl.minimum(column // (SIDES * 2 * RANK), levels - 1)
    group, summary, seen = _listed(column % (SIDES * 2 * RANK), level, block >> level, table, RANK)
    seen &= column < levels * (SIDES * 2 * RANK)
    if first_ is not None:  # the document's stretch of the grid
        width = block_size << level
        seen &= (group * width >= tl.load(first_)) & ((group + 1) * width <= tl.load(last_))
    bias = _bias(level, summary, seen, counts, far_bias, biases, size)
    return summary, seen, tl.where(seen, bias, float("-inf"))


@triton.jit
def _visible(query, key, stop, document, slots, CAUSAL: tl.constexpr):
    """Which keys before ``stop`` which queries see, for indices of two tensors that broadcast."""
    seen = key < stop
    if CAUSAL:
        seen &= key <= query
    if document is not None:
        seen &= tl.load(document + key, key < slots, -2) == tl.load(document + query, query < slots, -3)
    return seen


@triton.jit
def _near(
    q, query, k_, v_, k_n, v_n, start, stop, document, slots, acc, top, total, scale, softcap,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys from ``start`` to ``stop`` into the running softmax; without MASKED every query sees them all."""
    for first in range(start, stop, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_, key, k_n, key < stop, DIM, BLOCK_D)
        v = load_rows(v_, key, v_n, key < stop, WIDTH, BLOCK_W)
        x, _ = logits(q, k, scale, softcap)
        if MASKED:
            seen = _visible(query[:, None], key[None, :], stop, document, slots, CAUSAL)
            # Zero times a value that is not finite is NaN: such a value must reach exactly the queries that see its key. So it
            # goes by way of their logits.
            nought = v.to(tl.float32) * 0.0
            v = tl.where(nought == 0, v, 0.0).to(v.dtype)
            x = tl.where(seen, x + tl.sum(nought, 1)[None, :], float("-inf"))
        acc, top, total = absorb(x, v, acc, top, total)
    return acc, top, total


@triton.jit
def _sink_tile(
    start, sinks, hidden_, sink_k_, sink_v_, dtype: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and values of some sinks of one block, from ``start`` on, zeros where they are hidden; and which of them are seen."""
    column = start + tl.arange(0, BLOCK)
    seen = tl.load(hidden_ + column, column < sinks, 1) == 0
    k = round_to(load_rows(sink_k_, column, DIM, seen, DIM, BLOCK_D), dtype)
    return k, round_to(load_rows(sink_v_, column, WIDTH, seen, WIDTH, BLOCK_W), dtype), seen


@triton.jit
def _place(tiles, blocks, block_size, heads, repeats, BLOCK: tl.constexpr):
    """A program for some tokens of one block: its batch row, head, key head, block, first token, tokens, and which of them there are."""
    block = tl.program_id(0) // tiles % blocks
    row = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    start = block * block_size + tl.program_id(0) % tiles * BLOCK
    token = start + tl.arange(0, BLOCK)
    return row // heads, row % heads, row % heads // repeats, block, start, token, token < (block + 1) * block_size


# Kernels


# Long: the near field, summaries and sinks, with one softmax that stays in registers.
@triton.jit
def forward(
    q_, k_, v_, far_k_, far_v_, counts_, far_bias_, document_, first_, last_, sink_k_, sink_v_, hidden_, table, out_, lse_,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, counts_b, counts_h, document_b, hidden_b,
    tiles, blocks, block_size, heads, repeats, begin, levels, summaries, lists, sinks, biases, size, scale, softcap,
    CAUSAL: tl.constexpr, RANK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    SIDES: tl.constexpr = 1 if CAUSAL else 2
    batch, head, kv_head, block, start, query, real = _place(tiles, blocks, block_size, heads, repeats, BLOCK_M)
    slots = blocks * block_size
    q = load_rows(q_ + batch * q_b + head * q_h, query, q_n, real, DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    k_ += batch * k_b + kv_head * k_h
    v_ += batch * v_b + kv_head * v_h
    low = tl.maximum(block - 1, 0) * block_size
    if document_ is not None:
        document_ += batch * document_b
    high = (block + 1) * block_size
    if CAUSAL:
        high = tl.minimum(high, start + BLOCK_M)
        shared = start  # keys that every query of the tile sees
    else:
        high = tl.minimum(high + block_size, slots)
        shared = high
    if document_ is not None:
        shared = low
    shared = low + (shared - low) // BLOCK_N * BLOCK_N
    acc, top, total = _near(
        q, query, k_, v_, k_n, v_n, low, shared, document_, slots, acc, top, total, scale, softcap,
        False, CAUSAL, DIM, WIDTH, BLOCK_D, BLOCK_W, BLOCK_N,
    )  # fmt: skip
    acc, top, total = _near(
        q, query, k_, v_, k_n, v_n, shared, high, document_, slots, acc, top, total, scale, softcap,
        True, CAUSAL, DIM, WIDTH, BLOCK_D, BLOCK_W, BLOCK_N,
    )  # fmt: skip

    far_k_ += (batch * (heads // repeats) + kv_head) * summaries * DIM
    far_v_ += (batch * (heads // repeats) + kv_head) * summaries * WIDTH
    if counts_ is not None:
        counts_ += batch * counts_b + kv_head * counts_h
    if far_bias_ is not None:
        far_bias_ += head * biases
    if first_ is not None:
        first_ += batch * blocks + block
        last_ += batch * blocks + block
    for column in range(0, levels * (SIDES * 2 * RANK), BLOCK_F):
        summary, seen, bias = _far_tile(
            column, begin + block, block_size, levels, first_, last_, table, counts_, far_bias_, biases, size, SIDES, RANK, BLOCK_F
        )
        k = round_to(load_rows(far_k_, summary, DIM, seen, DIM, BLOCK_D), q.dtype)
        v = round_to(load_rows(far_v_, summary, WIDTH, seen, WIDTH, BLOCK_W), q.dtype)
        x, _ = logits(q, k, scale, softcap)
        acc, top, total = absorb(x + bias[None, :], v, acc, top, total)

    if sink_k_ is not None:
        hidden_ += batch * hidden_b + block * sinks
        listed = ((batch * (heads // repeats) + kv_head) * lists + block % lists) * sinks
        sink_k_ += listed * DIM
        sink_v_ += listed * WIDTH
        for column in range(0, sinks, BLOCK_S):
            k, v, seen = _sink_tile(column, sinks, hidden_, sink_k_, sink_v_, q.dtype, DIM, WIDTH, BLOCK_D, BLOCK_W, BLOCK_S)
            x, _ = logits(q, k, scale, softcap)
            acc, top, total = absorb(tl.where(seen[None, :], x, float("-inf")), v, acc, top, total)

    store_rows(out_ + batch * out_b + head * out_h, query, out_n, real, acc / total[:, None], WIDTH, BLOCK_W)
    tl.store(lse_ + (batch * heads + head) * slots + query, top + tl.log2(total), real)


@triton.jit
def _logit_gradient(x, lse, grad, v, delta, seen):
    """Weights, and the gradient of the (capped, biased) logits; the rows are queries."""
    weights = tl.where(seen, tl.exp2(x - lse), 0.0)
    return weights, tl.where(seen, weights * (dot(grad, tl.trans(v)) - delta), 0.0)


# Long: the same three, with one sum that stays in registers.
@triton.jit
def backward_queries(
    grad_, grad_lse_, out_, q_, k_, v_, far_k_, far_v_, counts_, far_bias_, document_, first_, last_, sink_k_, sink_v_, hidden_,
    table, lse_, delta_, grad_q_,
    grad_b, grad_h, grad_n, out_b, out_h, out_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_q_b, grad_q_h, grad_q_n,
    counts_b, counts_h, document_b, hidden_b,
    tiles, blocks, block_size, heads, repeats, begin, levels, summaries, lists, sinks, biases, size, scale, softcap,
    CAUSAL: tl.constexpr, RANK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries; also keeps ``delta`` for the other kernels: what is taken from the slope of every logit of a query, the
    product of its output and the output's gradient, less what comes through its log-sum-exp.
    """
    SIDES: tl.constexpr = 1 if CAUSAL else 2
    batch, head, kv_head, block, start, query, real = _place(tiles, blocks, block_size, heads, repeats, BLOCK_M)
    slots = blocks * block_size
    q = load_rows(q_ + batch * q_b + head * q_h, query, q_n, real, DIM, BLOCK_D)
    grad = load_rows(grad_ + batch * grad_b + head * grad_h, query, grad_n, real, WIDTH, BLOCK_W)
    out = load_rows(out_ + batch * out_b + head * out_h, query, out_n, real, WIDTH, BLOCK_W)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if grad_lse_ is not None:
        delta -= tl.load(grad_lse_ + (batch * heads + head) * slots + query, real, 0.0) * LOG2E
    tl.store(delta_ + (batch * heads + head) * slots + query, delta, real)
    lse = tl.load(lse_ + (batch * heads + head) * slots + query, real, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    k_ += batch * k_b + kv_head * k_h
    v_ += batch * v_b + kv_head * v_h
    if document_ is not None:
        document_ += batch * document_b
    low = tl.maximum(block - 1, 0) * block_size
    high = (block + 1) * block_size
    if CAUSAL:
        high = tl.minimum(high, start + BLOCK_M)
    else:
        high = tl.minimum(high + block_size, slots)
    for key_start in range(low, high, BLOCK_N):
        key = key_start + tl.arange(0, BLOCK_N)
        k = load_rows(k_, key, k_n, key < high, DIM, BLOCK_D)
        v = load_rows(v_, key, v_n, key < high, WIDTH, BLOCK_W)
        x, slope = logits(q, k, scale, softcap)
        seen = _visible(query[:, None], key[None, :], high, document_, slots, CAUSAL)
        _, inner = _logit_gradient(x, lse[:, None], grad, v, delta[:, None], seen)
        acc += dot(round_to(inner * slope, k.dtype), k)

    far_k_ += (batch * (heads // repeats) + kv_head) * summaries * DIM
    far_v_ += (batch * (heads // repeats) + kv_head) * summaries * WIDTH
    if counts_ is not None:
        counts_ += batch * counts_b + kv_head * counts_h
    if far_bias_ is not None:
        far_bias_ += head * biases
    if first_ is not None:
        first_ += batch * blocks + block
        last_ += batch * blocks + block
    for column in range(0, levels * (SIDES * 2 * RANK), BLOCK_F):
        summary, seen, bias = _far_tile(
            column, begin + block, block_size, levels, first_, last_, table, counts_, far_bias_, biases, size, SIDES, RANK, BLOCK_F
        )
        k = round_to(load_rows(far_k_, summary, DIM, seen, DIM, BLOCK_D), q.dtype)
        v = round_to(load_rows(far_v_, summary, WIDTH, seen, WIDTH, BLOCK_W), q.dtype)
        x, slope = logits(q, k, scale, softcap)
        _, inner = _logit_gradient(x + bias[None, :], lse[:, None], grad, v, delta[:, None], seen[None, :])
        acc += dot(round_to(inner * slope, k.dtype), k)

    if sink_k_ is not None:
        hidden_ += batch * hidden_b + block * sinks
        listed = ((batch * (heads // repeats) + kv_head) * lists + block % lists) * sinks
        sink_k_ += listed * DIM
        sink_v_ += listed * WIDTH
        for column in range(0, sinks, BLOCK_S):
            k, v, seen = _sink_tile(column, sinks, hidden_, sink_k_, sink_v_, q.dtype, DIM, WIDTH, BLOCK_D, BLOCK_W, BLOCK_S)
            x, slope = logits(q, k, scale, softcap)
            _, inner = _logit_gradient(x, lse[:, None], grad, v, delta[:, None], seen[None, :])
            acc += dot(round_to(inner * slope, k.dtype), k)
    store_rows(grad_q_ + batch * grad_q_b + head * grad_q_h, query, grad_q_n, real, acc * scale, DIM, BLOCK_D)


@triton.jit
def backward_keys(
    grad_, q_, k_, v_, document_, lse_, delta_, grad_k_, grad_v_,
    grad_b, grad_h, grad_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, document_b,
    grad_k_b, grad_k_h, grad_k_n, grad_v_b, grad_v_h, grad_v_n,
    tiles, blocks, block_size, kv_heads, repeats, scale, softcap,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values in the near field: tiles of their own block and its neighbours, query heads one by one."""
    batch, kv_head, _, block, start, key, real = _place(tiles, blocks, block_size, kv_heads, 1, BLOCK_N)
    slots = blocks * block_size
    k = load_rows(k_ + batch * k_b + kv_head * k_h, key, k_n, real, DIM, BLOCK_D)
    v = load_rows(v_ + batch * v_b + kv_head * v_h, key, v_n, real, WIDTH, BLOCK_W)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    if document_ is not None:
        document_ += batch * document_b
    low = start if CAUSAL else tl.maximum(block - 1, 0) * block_size
    high = tl.minimum((block + 2) * block_size, slots)
    end = (block + 1) * block_size
    for repeat in range(repeats):
        head = kv_head * repeats + repeat
        row = (batch * kv_heads * repeats + head) * slots
        for query_start in range(low, high, BLOCK_M):
            query = query_start + tl.arange(0, BLOCK_M)
            q = load_rows(q_ + batch * q_b + head * q_h, query, q_n, query < high, DIM, BLOCK_D)
            grad = load_rows(grad_ + batch * grad_b + head * grad_h, query, grad_n, query < high, WIDTH, BLOCK_W)
            lse = tl.load(lse_ + row + query, query < high, float("inf"))
            delta = tl.load(delta_ + row + query, query < high, 0.0)
            x, slope = logits(k, q, scale, softcap)
            seen = _visible(query[None, :], key[:, None], end, document_, slots, CAUSAL) & (query < high)[None, :]
            weights = tl.where(seen, tl.exp2(x - lse[None, :]), 0.0)
            inner = dot(v, tl.trans(grad)) - delta[None, :]
            inner = tl.where(seen, weights * inner, 0.0) * slope
            grad_v += dot(round_to(weights, grad.dtype), grad)
            grad_k += dot(round_to(inner, q.dtype), q)
    store_rows(grad_k_ + batch * grad_k_b + kv_head * grad_k_h, key, grad_k_n, real, grad_k * scale, DIM, BLOCK_D)
    store_rows(grad_v_ + batch * grad_v_b + kv_head * grad_v_h, key, grad_v_n, real, grad_v, WIDTH, BLOCK_W)


@triton.jit
def backward_sinks(
    grad_, q_, sink_k_, sink_v_, hidden_, lse_, delta_, part_k_, part_v_,
    grad_b, grad_h, grad_n, q_b, q_h, q_n, hidden_b,
    tiles, pieces, span, blocks, block_size, kv_heads, repeats, lists, sinks, scale, softcap,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What ``span`` blocks of queries give to some of their sinks; parts ``(rows, pieces, sinks, dim)``."""
    column = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    piece = tl.program_id(0) // tiles % pieces
    row = (tl.program_id(0) // tiles // pieces).to(tl.int64)
    batch, kv_head = row // kv_heads, row % kv_heads
    slots = blocks * block_size
    listed = (row * lists + piece % lists) * sinks
    k = round_to(load_rows(sink_k_ + listed * DIM, column, DIM, column < sinks, DIM, BLOCK_D), q_.dtype.element_ty)
    v = round_to(load_rows(sink_v_ + listed * WIDTH, column, WIDTH, column < sinks, WIDTH, BLOCK_W), q_.dtype.element_ty)
    part_k = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    part_v = tl.zeros([BLOCK_S, BLOCK_W], tl.float32)
    low = piece * span * block_size
    high = tl.minimum(low + span * block_size, slots)
    for repeat in range(repeats):
        head = kv_head * repeats + repeat
        for query_start in range(low, high, BLOCK_M):
            query = query_start + tl.arange(0, BLOCK_M)
            q = load_rows(q_ + batch * q_b + head * q_h, query, q_n, query < high, DIM, BLOCK_D)
            grad = load_rows(grad_ + batch * grad_b + head * grad_h, query, grad_n, query < high, WIDTH, BLOCK_W)
            lse = tl.load(lse_ + (batch * kv_heads * repeats + head) * slots + query, query < high, float("inf"))
            delta = tl.load(delta_ + (batch * kv_heads * repeats + head) * slots + query, query < high, 0.0)
            there = (column < sinks)[:, None] & (query < high)[None, :]
            at = hidden_ + batch * hidden_b + column[:, None] + (query // block_size * sinks)[None, :]
            seen = tl.load(at, there, 1) == 0
            x, slope = logits(k, q, scale, softcap)
            weights = tl.where(seen, tl.exp2(x - lse[None, :]), 0.0)
            inner = tl.where(seen, weights * (dot(v, tl.trans(grad)) - delta[None, :]), 0.0) * slope
            part_v += dot(round_to(weights, grad.dtype), grad)
            part_k += dot(round_to(inner, q.dtype), q)
    at = (row * pieces + piece) * sinks
    store_rows(part_k_ + at * DIM, column, DIM, column < sinks, part_k * scale, DIM, BLOCK_D)
    store_rows(part_v_ + at * WIDTH, column, WIDTH, column < sinks, part_v, WIDTH, BLOCK_W)


# Long: one loop in which logits, slopes and both products stay in registers.
@triton.jit
def backward_summaries(
    grad_, q_, far_k_, far_v_, counts_, far_bias_, first_, last_, table, parts_table, lse_, delta_, part_k_, part_v_, sums_,
    grad_b, grad_h, grad_n, q_b, q_h, q_n, counts_b, counts_h,
    units, blocks, block_size, kv_heads, repeats, begin, levels, summaries, parts, biases, size, scale, softcap,
    CAUSAL: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """What UNIT blocks of queries give to the summaries that they see at one level, in parts of one parent's queries each.

    part_k, part_v: ``(rows, parts, columns, dim)``; sums, of the logits' gradients: ``(rows, repeats, parts, columns)``.
    """
    COLUMNS: tl.constexpr = 2 * RANK if CAUSAL else 4 * RANK
    TILES: tl.constexpr = (COLUMNS + BLOCK_F - 1) // BLOCK_F
    inner = tl.program_id(0) % TILES * BLOCK_F + tl.arange(0, BLOCK_F)
    level = tl.program_id(0) // TILES % levels
    unit = tl.program_id(0) // TILES // levels % units
    row = (tl.program_id(0) // TILES // levels // units).to(tl.int64)
    batch, kv_head = row // kv_heads, row % kv_heads
    slots = blocks * block_size
    far_k_ += row * summaries * DIM
    far_v_ += row * summaries * WIDTH
    if counts_ is not None:
        counts_ += batch * counts_b + kv_head * counts_h

    span = tl.minimum(2 << level, UNIT)
    for piece in range(UNIT // span):
        block = (begin // UNIT + unit) * UNIT + piece * span
        part = tl.load(parts_table + level) + unit * (UNIT // span) + piece
        low = tl.maximum(block - begin, 0) * block_size
        high = tl.minimum(block + span - begin, blocks) * block_size
        # Every column's summary is the same for all of them, but some queries do not see it.
        group, summary, _ = _listed(inner, level, block >> level, table, RANK)
        place = group - tl.load(table + 3 * level)
        exists = (inner < tl.where(low < high, COLUMNS, 0)) & (place >= 0) & (place < tl.load(table + 3 * level + 1))
        k = round_to(load_rows(far_k_, summary, DIM, exists, DIM, BLOCK_D), q_.dtype.element_ty)
        v = round_to(load_rows(far_v_, summary, WIDTH, exists, WIDTH, BLOCK_W), q_.dtype.element_ty)
        part_k = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        part_v = tl.zeros([BLOCK_F, BLOCK_W], tl.float32)
        for repeat in range(repeats):
            head = kv_head * repeats + repeat
            if far_bias_ is None:
                bias = _bias(level, summary, exists, counts_, None, biases, size)
            else:
                bias = _bias(level, summary, exists, counts_, far_bias_ + head * biases, biases, size)
            sums = tl.zeros([BLOCK_F], tl.float32)
            for query_start in range(low, high, BLOCK_M):
                query = query_start + tl.arange(0, BLOCK_M)
                q = load_rows(q_ + batch * q_b + head * q_h, query, q_n, query < high, DIM, BLOCK_D)
                grad = load_rows(grad_ + batch * grad_b + head * grad_h, query, grad_n, query < high, WIDTH, BLOCK_W)
                lse = tl.load(lse_ + (batch * kv_heads * repeats + head) * slots + query, query < high, float("inf"))
                delta = tl.load(delta_ + (batch * kv_heads * repeats + head) * slots + query, query < high, 0.0)
                own = (begin + query // block_size) >> level
                seen = exists[:, None] & (query < high)[None, :] & (tl.abs(group[:, None] - own[None, :]) >= 2)
                if first_ is not None:
                    at = batch * blocks + query // block_size
                    first = tl.load(first_ + at, query < high, 0)
                    last = tl.load(last_ + at, query < high, 0)
                    width = block_size << level
                    seen &= ((group * width)[:, None] >= first[None, :]) & (((group + 1) * width)[:, None] <= last[None, :])
                x, slope = logits(k, q, scale, softcap)
                weights = tl.where(seen, tl.exp2(x + bias[:, None] - lse[None, :]), 0.0)
                change = dot(v, tl.trans(grad)) - delta[None, :]
                change = tl.where(seen, weights * change, 0.0)
                sums += tl.sum(change, 1)
                part_v += dot(round_to(weights, grad.dtype), grad)
                part_k += dot(round_to(change * slope, q.dtype), q)
            tl.store(sums_ + ((row * repeats + repeat) * parts + part) * COLUMNS + inner, sums, inner < COLUMNS)
        at = (row * parts + part) * COLUMNS
        store_rows(part_k_ + at * DIM, inner, DIM, inner < COLUMNS, part_k * scale, DIM, BLOCK_D)
        store_rows(part_v_ + at * WIDTH, inner, WIDTH, inner < COLUMNS, part_v, WIDTH, BLOCK_W)


@triton.jit
def add_parts(
    parts_, grad_, table, parts_table, units, begin, levels, groups, parts, tiles,
    SIDES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of the parts that belong to one group; WIDTH numbers a group, the summaries' gradients side by side."""
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    listed = tl.program_id(0) // tiles % groups
    row = (tl.program_id(0) // tiles // groups).to(tl.int64)
    level = 0
    for i in range(1, levels):
        level += (listed >= tl.load(table + 3 * i + 2)).to(tl.int32)
    group = tl.load(table + 3 * level) + listed - tl.load(table + 3 * level + 2)
    span = tl.minimum(2 << level, UNIT)
    there = units * (UNIT // span)
    origin = begin // UNIT * (UNIT // span)
    acc = tl.zeros([BLOCK], tl.float32)
    for side in tl.static_range(SIDES):
        # The queries whose parent is the next one see the group on their left, those of the one before it on their right.
        start = (group // 2 + 1 - 2 * side) * ((2 << level) // span) - origin
        low, high = tl.maximum(start, 0), tl.minimum(start + (2 << level) // span, there)
        for part_start in range(low, high, BLOCK_P):
            part = part_start + tl.arange(0, BLOCK_P)
            at = (row * parts + tl.load(parts_table + level) + part) * (SIDES * 2 * WIDTH) + (side * 2 + group % 2) * WIDTH
            acc += tl.sum(tl.load(parts_ + at[:, None] + column, (part < high)[:, None] & (column < WIDTH), 0.0), 0)
    tl.store(grad_ + (row * groups + listed) * WIDTH + column, acc, column < WIDTH)
