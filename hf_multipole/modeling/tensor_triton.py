"""GPU kernels of tensor attention of order 3: windows or none, forward and backward (arXiv 2507.02754 has such kernels for windows).

A tile has *rows*, one for each query; heads that share keys lie side by side, so that their tile is shared, too. Its rows go through
the tokens of the first index together: at step c each row takes the c-th token that it sees, which makes ``q * k1`` the queries of
ordinary attention over the second index, on tensor cores. So windows that move from row to row, documents and full attention are the
same loop, and no step computes what only some of its rows need. Its partial result times ``v1`` joins the sum of the row; one
softmax runs over all pairs. No kernel writes where another does: the gradients of q, of the first and of the second index have one
kernel each, whose programs own what they write.

Products are rounded to bfloat16, or for float16, whose range they may leave, to TF32; those of float32 are not rounded.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .operators import define
from .triton_common import INTERPRETED, round_to, tl, triton

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")
LN2 = tl.constexpr(math.log(2))


# What kernels share


@triton.jit
def _interval(first, last, token, inside, n, window, BACK: tl.constexpr, AHEAD: tl.constexpr):
    """Of each token, what lies in its document and window, backwards, ahead, or on both sides: lo, ..., hi - 1."""
    lo = tl.load(first + token, mask=inside, other=n)
    hi = tl.load(last + token, mask=inside, other=0)
    if BACK:
        lo = tl.maximum(lo, token - window + 1)
    else:
        lo = tl.maximum(lo, token)
    if AHEAD:
        hi = tl.minimum(hi, token + window)
    else:
        hi = tl.minimum(hi, token + 1)
    return lo, hi


@triton.jit
def _rows(matrix, rows, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix with DIM columns, zeros beyond them."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if DIM < BLOCK:
        mask = mask & (column < DIM)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * DIM + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(matrix, rows, inside, x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < DIM)[None, :]
    tl.store(matrix + rows[:, None] * DIM + column[None, :], round_to(x, matrix.dtype.element_ty), mask=mask)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """float32 numbers as operands of a matrix product."""
    if DTYPE == tl.bfloat16:
        return round_to(x, tl.bfloat16)
    elif DTYPE == tl.float16:
        # To the nearest, which the hardware does not do.
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x


@triton.jit
def _operand(x):
    """Numbers as they were loaded, as operands: float16 as TF32, which holds them."""
    if x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _dot(a, b, total, DTYPE: tl.constexpr):
    if DTYPE == tl.float16:
        return tl.dot(a, b, total, input_precision="tf32")
    elif INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


# Forward


@triton.jit
def _forward_kernel(
    q, k1, k2, v1, v2, first, last, out, lse, n, queries, kv_heads, window1, window2, scale,
    SPLITS: tl.constexpr, REPEATS: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    tiles = tl.cdiv(queries * REPEATS * SPLITS, M)
    # Causal: those with most to do first.
    tile, group = tiles - 1 - tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    first, last, base = first + group // kv_heads * n, last + group // kv_heads * n, group * n
    k2, v2 = k2 + base * DIM, v2 + base * VALUE_DIM

    # Where queries are few, each has several rows, which share its tokens of the first index out among them.
    row = tile * M + tl.arange(0, M)
    inside = row < queries * REPEATS * SPLITS
    query, row = row // (REPEATS * SPLITS), (row % (REPEATS * SPLITS)).to(tl.int64)
    token, split = n - queries + query, row % SPLITS
    into, row = (group * REPEATS * SPLITS + row) * queries + query, (group * REPEATS + row // SPLITS) * queries + query
    lo1, hi1 = _interval(first, last, token, inside, n, window1, True, not CAUSAL)
    lo2, hi2 = _interval(first, last, token, inside, n, window2, True, not CAUSAL)
    begin, end = tl.min(lo2), tl.max(hi2)

    query = _rows(q, row, inside, DIM, D).to(tl.float32) * scale
    largest = tl.full((M,), -3.4028234663852886e38, tl.float32)
    total = tl.full((M,), 0.0, tl.float32)
    result = tl.full((M, V), 0.0, tl.float32)
    for c in range(0, tl.max(hi1 - lo1), SPLITS):
        one = lo1 + c + split
        sees = one < hi1
        x = _rounded(query * _rows(k1, base + one, sees, DIM, D).to(tl.float32), DTYPE)
        stop = tl.where(sees, hi2, 0)
        seen_from, seen_to = tl.max(lo2), tl.min(stop)
        before = largest
        part = tl.full((M, V), 0.0, tl.float32)
        for low in range(begin, end, N):
            two = low + tl.arange(0, N)
            keys = _operand(_rows(k2, two, two < end, DIM, D))
            logits = _dot(x, tl.trans(keys), tl.full((M, N), 0.0, tl.float32), DTYPE)
            if (low < seen_from) | (low + N > seen_to):
                seen = (two[None, :] >= lo2[:, None]) & (two[None, :] < stop[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            larger = tl.maximum(largest, tl.max(logits, 1))
            weights = tl.exp2(logits - larger[:, None])
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(weights, 1)
            values = _operand(_rows(v2, two, two < end, VALUE_DIM, V))
            part = _dot(_rounded(weights, DTYPE), values, part * shrink[:, None], DTYPE)
            largest = larger
        result = result * tl.exp2(before - largest)[:, None] + part * _rows(v1, base + one, sees, VALUE_DIM, V).to(tl.float32)
    # Padding sees nothing.
    _store_rows(out, into, inside, result / tl.where(total == 0, 1.0, total)[:, None], VALUE_DIM, V)
    tl.store(lse + into, largest + tl.log2(total), mask=inside)


# Backward


@triton.jit
def _slopes(
    x, y, shift, center, lo, hi, k2, v2, DTYPE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients of rows x ``(M, D)`` and y ``(M, V)`` that see tokens lo, ..., hi - 1 of the second index."""
    begin, end, seen_from, seen_to = tl.min(lo), tl.max(hi), tl.max(lo), tl.min(hi)
    of_x = tl.full((M, D), 0.0, tl.float32)
    of_y = tl.full((M, V), 0.0, tl.float32)
    for low in range(begin, end, N):
        two = low + tl.arange(0, N)
        keys = _operand(_rows(k2, two, two < end, DIM, D))
        values = _operand(_rows(v2, two, two < end, VALUE_DIM, V))
        weights = tl.exp2(_dot(x, tl.trans(keys), tl.full((M, N), 0.0, tl.float32), DTYPE) - shift[:, None])
        slope = weights * (_dot(y, tl.trans(values), tl.full((M, N), 0.0, tl.float32), DTYPE) - center[:, None])
        if (low < seen_from) | (low + N > seen_to):
            seen = (two[None, :] >= lo[:, None]) & (two[None, :] < hi[:, None])
            weights, slope = tl.where(seen, weights, 0.0), tl.where(seen, slope, 0.0)
        of_x = _dot(_rounded(slope, DTYPE), keys, of_x, DTYPE)
        if WITH_VALUES:
            of_y = _dot(_rounded(weights, DTYPE), values, of_y, DTYPE)
    return of_x, of_y


@triton.jit
def _query_kernel(
    q, k1, k2, v1, v2, grad, lse, inner, first, last, grad_q, n, queries, kv_heads, window1, window2, scale,
    REPEATS: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    tiles = tl.cdiv(queries * REPEATS, M)
    tile, group = tiles - 1 - tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    first, last, base = first + group // kv_heads * n, last + group // kv_heads * n, group * n
    k2, v2 = k2 + base * DIM, v2 + base * VALUE_DIM

    row = tile * M + tl.arange(0, M)
    inside = row < queries * REPEATS
    token = n - queries + row // REPEATS
    row = (group * REPEATS + row % REPEATS) * queries + row // REPEATS
    lo1, hi1 = _interval(first, last, token, inside, n, window1, True, not CAUSAL)
    lo2, hi2 = _interval(first, last, token, inside, n, window2, True, not CAUSAL)

    query, upstream = _rows(q, row, inside, DIM, D).to(tl.float32) * scale, _rows(grad, row, inside, VALUE_DIM, V).to(tl.float32)
    shift, center = tl.load(lse + row, mask=inside, other=0.0), tl.load(inner + row, mask=inside, other=0.0)
    result = tl.full((M, D), 0.0, tl.float32)
    for c in range(0, tl.max(hi1 - lo1)):
        one = lo1 + c
        sees = one < hi1
        key = _rows(k1, base + one, sees, DIM, D).to(tl.float32)
        x = _rounded(query * key, DTYPE)
        y = _rounded(upstream * _rows(v1, base + one, sees, VALUE_DIM, V).to(tl.float32), DTYPE)
        stop = tl.where(sees, hi2, 0)
        of_x, _ = _slopes(x, y, shift, center, lo2, stop, k2, v2, DTYPE, DIM, VALUE_DIM, D, V, M, N, False)
        result += of_x * key
    # Scores are in units of log 2.
    _store_rows(grad_q, row, inside, result * (scale * LN2), DIM, D)


@triton.jit
def _first_kernel(
    q, k1, k2, v1, v2, grad, lse, inner, first, last, grad_k1, grad_v1, n, queries, kv_heads, window1, window2, scale,
    REPEATS: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    tiles = tl.cdiv(n, M)
    # Causal: the first tokens are seen by most queries.
    tile, group = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    first, last, base = first + group // kv_heads * n, last + group // kv_heads * n, group * n
    k2, v2 = k2 + base * DIM, v2 + base * VALUE_DIM

    one = tile * M + tl.arange(0, M)
    inside = one < n
    lo1, hi1 = _interval(first, last, one, inside, n, window1, not CAUSAL, True)
    lo1 = tl.maximum(lo1, n - queries)
    key, value = _rows(k1, base + one, inside, DIM, D).to(tl.float32), _rows(v1, base + one, inside, VALUE_DIM, V).to(tl.float32)
    of_key = tl.full((M, D), 0.0, tl.float32)
    of_value = tl.full((M, V), 0.0, tl.float32)
    for c in range(0, tl.max(hi1 - lo1)):
        # Of each row, the c-th query that sees its token.
        token = lo1 + c
        asks = token < hi1
        lo2, hi2 = _interval(first, last, token, asks, n, window2, True, not CAUSAL)
        for head in range(0, REPEATS):
            row = (group * REPEATS + head) * queries + token - (n - queries)
            query = _rows(q, row, asks, DIM, D).to(tl.float32) * scale
            upstream = _rows(grad, row, asks, VALUE_DIM, V).to(tl.float32)
            shift, center = tl.load(lse + row, mask=asks, other=0.0), tl.load(inner + row, mask=asks, other=0.0)
            x, y = _rounded(query * key, DTYPE), _rounded(upstream * value, DTYPE)
            of_x, of_y = _slopes(x, y, shift, center, lo2, hi2, k2, v2, DTYPE, DIM, VALUE_DIM, D, V, M, N, True)
            of_key += of_x * query
            of_value += of_y * upstream
    _store_rows(grad_k1, base + one, inside, of_key * LN2, DIM, D)
    _store_rows(grad_v1, base + one, inside, of_value, VALUE_DIM, V)


@triton.jit
def _second_kernel(
    q, k1, k2, v1, v2, grad, lse, inner, first, last, grad_k2, grad_v2, n, queries, kv_heads, window1, window2, scale,
    REPEATS: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    tiles = tl.cdiv(n, M)
    tile, group = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    first, last, base = first + group // kv_heads * n, last + group // kv_heads * n, group * n

    two = tile * M + tl.arange(0, M)
    inside = two < n
    asked_from, asked_to = _interval(first, last, two, inside, n, window2, not CAUSAL, True)
    begin = tl.maximum(tl.min(asked_from), n - queries) - (n - queries)
    end = tl.max(asked_to) - (n - queries)
    keys, values = _operand(_rows(k2, base + two, inside, DIM, D)), _operand(_rows(v2, base + two, inside, VALUE_DIM, V))
    of_keys = tl.full((M, D), 0.0, tl.float32)
    of_values = tl.full((M, V), 0.0, tl.float32)
    for low in range(begin * REPEATS, end * REPEATS, N):
        row = low + tl.arange(0, N)
        asks = row < end * REPEATS
        token = n - queries + row // REPEATS
        row = (group * REPEATS + row % REPEATS) * queries + row // REPEATS
        lo1, hi1 = _interval(first, last, token, asks, n, window1, True, not CAUSAL)
        lo2, hi2 = _interval(first, last, token, asks, n, window2, True, not CAUSAL)
        query = _rows(q, row, asks, DIM, D).to(tl.float32) * scale
        upstream = _rows(grad, row, asks, VALUE_DIM, V).to(tl.float32)
        shift, center = tl.load(lse + row, mask=asks, other=0.0), tl.load(inner + row, mask=asks, other=0.0)
        for c in range(0, tl.max(hi1 - lo1)):
            one = lo1 + c
            sees = one < hi1
            x = _rounded(query * _rows(k1, base + one, sees, DIM, D).to(tl.float32), DTYPE)
            y = _rounded(upstream * _rows(v1, base + one, sees, VALUE_DIM, V).to(tl.float32), DTYPE)
            stop = tl.where(sees, hi2, 0)
            weights = tl.exp2(_dot(keys, tl.trans(x), tl.full((M, N), 0.0, tl.float32), DTYPE) - shift[None, :])
            slope = weights * (_dot(values, tl.trans(y), tl.full((M, N), 0.0, tl.float32), DTYPE) - center[None, :])
            if (tile * M < tl.max(lo2)) | (tile * M + M > tl.min(stop)):
                seen = (two[:, None] >= lo2[None, :]) & (two[:, None] < stop[None, :])
                weights, slope = tl.where(seen, weights, 0.0), tl.where(seen, slope, 0.0)
            of_keys = _dot(_rounded(slope, DTYPE), x, of_keys, DTYPE)
            of_values = _dot(_rounded(weights, DTYPE), y, of_values, DTYPE)
    _store_rows(grad_k2, base + two, inside, of_keys * LN2, DIM, D)
    _store_rows(grad_v2, base + two, inside, of_values, VALUE_DIM, V)


# Operators


class _Tiles(NamedTuple):
    rows: int  # M
    columns: int  # N
    warps: int


# By dtype and width, of the forward and of the backward kernels. The sums of a program (M rows of the width: two in the forward pass,
# up to four in the backward pass) and its M * N logits have to find room in the registers, 255 a thread, so that the innermost loop
# spills none; two stages of K2 and V2 tiles and the rows' products in the 99 KiB of shared memory of the smallest GPUs since the
# A100. For bfloat16 at width 128: 2 * 128 * 128 + 128 * 64 numbers, 160 registers; (4 * 64 + 128) * 128 * 2 bytes, 96 KiB.
_TILES = {
    (torch.bfloat16, 64): (_Tiles(128, 64, 8), _Tiles(64, 32, 8)),
    (torch.bfloat16, 128): (_Tiles(128, 64, 8), _Tiles(64, 32, 8)),
    (torch.bfloat16, 256): (_Tiles(32, 32, 8), _Tiles(32, 16, 8)),
    (torch.float16, 64): (_Tiles(128, 32, 8), _Tiles(64, 32, 8)),
    (torch.float16, 128): (_Tiles(64, 32, 8), _Tiles(32, 32, 8)),
    (torch.float16, 256): (_Tiles(32, 16, 8), _Tiles(16, 16, 8)),
    (torch.float32, 64): (_Tiles(32, 32, 8), _Tiles(32, 32, 8)),
    (torch.float32, 128): (_Tiles(16, 32, 8), _Tiles(16, 16, 8)),
    (torch.float32, 256): (_Tiles(16, 16, 8), _Tiles(16, 16, 8)),
}
# Programs of the forward pass that fill a GPU: two for each of the 132 processors of an H200.
_PROGRAMS = 264


def _tiles(q: torch.Tensor, v: torch.Tensor) -> tuple[_Tiles, _Tiles]:
    return _TILES[q.dtype, max(64, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))]


def _bounds(document: torch.Tensor | None, batch: int, n: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token, first token and end of its document, ``(batch, n)`` int32; n and 0 at padding."""
    if document is None:
        return torch.zeros(batch, n, dtype=torch.int32, device=device), torch.full((batch, n), n, dtype=torch.int32, device=device)
    token, padding = torch.arange(n, device=device), document < 0
    starts = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
    ends = F.pad(starts[:, 1:], (0, 1), value=True)
    first = torch.where(starts, token, 0).cummax(1).values.masked_fill(padding, n)
    last = torch.where(ends, token + 1, n).flip(1).cummin(1).values.flip(1).masked_fill(padding, 0)
    return first.int(), last.int()


class _Call(NamedTuple):
    """What the kernels read, and which queries ``(batch, heads, queries)`` see what is not finite."""

    tensors: list[torch.Tensor]  # q, k1, k2, v1, v2
    bounds: tuple[torch.Tensor, torch.Tensor]
    poisoned: torch.Tensor


class KernelTuples(NamedTuple):
    """Arguments of the operator :func:`tensor_kernels`, in bfloat16, float16 or float32, contiguous."""

    q: torch.Tensor  # (batch, heads, queries, dim), the last tokens
    k1: torch.Tensor  # (batch, kv_heads, n, dim)
    k2: torch.Tensor
    v1: torch.Tensor  # (batch, kv_heads, n, value_dim)
    v2: torch.Tensor
    document: torch.Tensor | None  # (batch, n): tokens of different numbers do not see each other, nor do negative ones see anything
    causal: bool
    windows: Sequence[int]  # of each index, n where it has none, the widest last
    scale: float


_DIFFERENTIABLE = ("q", "k1", "k2", "v1", "v2")


def _prepare(given: KernelTuples) -> _Call:
    """A hidden weight of 0 times not-a-number is not-a-number: the kernels get 0 in its place, and the queries that see it are marked."""
    tensors = q, k1, *_ = [getattr(given, name) for name in _DIFFERENTIABLE]
    (batch, kv_heads, n, _), before = k1.shape, k1.shape[2] - q.shape[2]
    first, last = _bounds(given.document, batch, n, q.device)
    finite = [x.isfinite() for x in tensors]
    bad = [~kept.all(-1) for kept in finite]
    poisoned, token = bad[0].unflatten(1, (kv_heads, -1)), torch.arange(before, n, device=q.device)
    for of_keys, of_values, window in zip(bad[1:3], bad[3:], given.windows):
        count = F.pad((of_keys | of_values).cumsum(-1), (1, 0))
        lo = torch.maximum(first[:, before:], token - window + 1)
        hi = torch.minimum(last[:, before:], token + (1 if given.causal else window))
        lo, hi = (x.clamp(0, n).long()[:, None].expand(-1, kv_heads, -1) for x in (lo, hi))
        poisoned = poisoned | (count.gather(2, hi) > count.gather(2, lo))[:, :, None]
    poisoned = poisoned.flatten(1, 2) & (first < last)[:, None, before:]
    return _Call([torch.where(kept, x, 0).contiguous() for kept, x in zip(finite, tensors)], (first, last), poisoned)


def _splits(tiles: _Tiles, rows: int, window: int) -> int:
    """Rows of a query that make enough programs of ``rows`` in all, and have at least one token of the first index each."""
    wanted = math.ceil(math.log2(max(1, _PROGRAMS * tiles.rows / rows)))
    return 2 ** min(wanted, int(math.log2(window)))


def _launch(kernel, tiles: _Tiles, owned: int, call: _Call, read, written, given: KernelTuples, **constants) -> None:
    """Runs a kernel on all tiles of the ``owned`` rows of each key head."""
    q, k1, _, v1, _ = call.tensors
    (batch, heads, queries, dim), (kv_heads, n, value_dim) = q.shape, v1.shape[1:]
    D, V = (max(16, triton.next_power_of_2(x)) for x in (dim, value_dim))
    with torch.cuda.device_of(q):
        kernel[(triton.cdiv(owned, tiles.rows) * batch * kv_heads,)](
            *(*call.tensors, *read, *call.bounds, *written, n, queries, kv_heads, *given.windows, given.scale / LN2.value),
            **constants,
            REPEATS=heads // kv_heads,
            CAUSAL=given.causal,
            DIM=dim,
            VALUE_DIM=value_dim,
            D=D,
            V=V,
            M=tiles.rows,
            N=tiles.columns,
            num_warps=tiles.warps,
            num_stages=2,
        )


def _run(given: KernelTuples) -> tuple[torch.Tensor, torch.Tensor]:
    call, q, k1 = _prepare(given), given.q, given.k1
    tiles, shape = _tiles(q, given.v1)[0], q.shape[:3]
    splits = _splits(tiles, shape.numel(), given.windows[0])
    out, lse = (q.new_empty(*shape[:2], splits, shape[2], *rest, dtype=torch.float32) for rest in ((given.v1.shape[-1],), ()))
    owned = shape[1] // k1.shape[1] * splits * shape[2]
    _launch(_forward_kernel, tiles, owned, call, [], [out, lse], given, SPLITS=splits)
    if splits > 1:
        total = torch.logsumexp(lse * LN2.value, 2) / LN2.value
        share = torch.where(lse > -torch.inf, (lse - total[:, :, None]).exp2(), 0)
        out, lse = (share[..., None] * out).sum(2), total
    else:
        out, lse = out.squeeze(2), lse.squeeze(2)
    return out.masked_fill_(call.poisoned[..., None], torch.nan), lse.masked_fill_(call.poisoned, torch.nan)


def _empty(given: KernelTuples) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = (given.q.new_empty(*given.q.shape[:3], *rest, dtype=torch.float32) for rest in ((given.v1.shape[-1],), ()))
    return out, lse


def _backward(given: KernelTuples, gradients, outputs) -> tuple[torch.Tensor, ...]:
    (grad, _), (out, lse), call, q, k1 = gradients, outputs, _prepare(given), given.q, given.k1
    grad = torch.zeros_like(out) if grad is None else grad
    read = [grad.to(q.dtype).contiguous(), lse, (grad * out).sum(-1)]
    of_q, of_k1, of_k2, of_v1, of_v2 = grads = tuple(torch.empty_like(x) for x in call.tensors)
    for kernel, owned, written in (
        (_query_kernel, q.shape[1] // k1.shape[1] * q.shape[2], [of_q]),
        (_first_kernel, k1.shape[2], [of_k1, of_v1]),
        (_second_kernel, k1.shape[2], [of_k2, of_v2]),
    ):
        _launch(kernel, _tiles(q, given.v1)[1], owned, call, read, written, given)
    return grads


# ``(KernelTuples) -> float32 (batch, heads, queries, value_dim)``, tensor attention of order 3, and the logarithms to base 2 of its sums
# ``(batch, heads, queries)``, which have no gradient; the output is float32 since the backward pass takes a difference of which it is a
# part. At padding, zeros and -inf.
tensor_kernels = define(_NAMESPACE + "::tensor_kernels", KernelTuples, _run, _empty, _backward, _DIFFERENTIABLE, outputs=2, constants=[1])
